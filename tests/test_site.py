"""The documentation is built without a warning, and is whole: links, formulas, names."""

import functools
import html
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urljoin, urlparse

import pytest

import jaxent

ROOT = pathlib.Path(__file__).parent.parent
HERE = "http://here/"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ELSEWHERE = {"github.com"}  # reports of bugs, which are followed and not fetched
NEEDED = ("mkdocs", "material", "mkdocstrings", "latex2mathml")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason="the extra `docs` is not installed",
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The text of each page, by its path, and the folder of the site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, {
        str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.html")
    }


def test_every_public_name_has_a_page(pages):
    _, texts = pages
    for name in jaxent.__all__:
        assert f'id="jaxent.{name}"' in texts[f"api/{name}/index.html"]


def test_every_argument_of_a_function_is_described(pages):
    _, texts = pages
    for name in ("cross_entropy", "nll", "linear_cross_entropy", "CrossEntropyLoss"):
        text = texts[f"api/{name}/index.html"]
        described = " ".join(re.findall(r"<b><code>(.*?)</code></b>", text))
        for argument in ("weight", "ignore_index", "reduction", "class_axis_name"):
            assert argument in described, (name, argument)


def test_every_link_leads_somewhere(pages):
    folder, texts = pages
    names = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in texts.items()}
    for path, text in texts.items():
        for link in map(html.unescape, re.findall(r'\b(?:href|src)="([^"]*)"', text)):
            url = urlparse(urljoin(HERE + path, link))
            target = url.path.lstrip("/")
            target += "index.html" if target.endswith("/") or not target else ""
            if url.netloc in ELSEWHERE:
                continue
            assert url.netloc == "here", f"{path} fetches {link} from elsewhere"
            assert (folder / target).exists(), f"{path} links to {link}"
            if url.fragment and target in names:
                assert url.fragment in names[target], f"{path} links to {link}"


def test_no_formula_is_left_as_it_was_written(pages):
    _, texts = pages
    assert "<math" in texts["api/cross_entropy/index.html"]
    for path, text in texts.items():
        prose = re.sub(r"<(code|script).*?</\1>", "", text, flags=re.DOTALL)
        assert not re.search(r"arithmatex|\$\$|\\[a-z]+\{|:math:|\.\. math", prose), path


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_reports_no_error_on_any_page(pages):
    folder, texts = pages
    handler = functools.partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://localhost:{server.server_address[1]}/"
        for path in texts:
            command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
            command += ["--enable-logging=stderr", root + path.removesuffix("index.html")]
            result = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert "</article>" in result.stdout or path == "404.html", path
            wrong = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
            assert not wrong, (path, wrong)
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_nothing_is_fetched_by_a_stylesheet(pages):
    folder, _ = pages
    for path in folder.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(?:https?:)?//", path.read_text()), path
