"""The pages tell the truth: their snippets run, their commands are CI's, their tables come out."""

import importlib.util
import math
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(text, info):
    return re.findall(rf"^```{info}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


PAGES = ["README.md", "docs/sharding.md", "docs/design/how_it_works.md"] + [
    str(path.relative_to(ROOT))
    for folder in ("guides", "porting")
    for path in sorted((ROOT / "docs" / folder).glob("*.md"))
    if path.name != "README.md"
]
PYTHON = re.compile(r"^```python(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:tokamax")
def test_snippets_run(page):
    text = (ROOT / page).read_text()
    for package in ("optax", "equinox"):
        if f"import {package}" in text:
            pytest.importorskip(package)
    snippets = PYTHON.findall(text)
    assert len(snippets) >= 2
    namespace = {}
    for package, snippet in snippets:
        if package and importlib.util.find_spec(package) is None:
            continue
        exec(compile(snippet, page, "exec"), namespace)


ALL_PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("[be]*/README.md")]


@pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in ALL_PAGES])
def test_links_lead_to_files_of_the_repository(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s:#]+)(?:#[^)]*)?\)", text):
        if "/jaxent/" in target and not (ROOT / "jaxent").exists():
            continue  # an installed wheel is judged, without a checkout
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_continuous_integration_runs_the_commands_of_the_readme():
    commands = [c.strip() for c in blocks(README, "sh") if "-m venv" in c]
    assert len(commands) == 2
    script = (ROOT / ".ci" / "run").read_text()
    for command in commands:
        assert command in script


def table_rows(page):
    lines = page.read_text().splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.mark.filterwarnings("ignore")  # of the libraries that are compared
def test_hard_cases_come_out_as_the_page_says(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    hard_cases = pytest.importorskip("benchmarks.hard_cases")
    rows = table_rows(ROOT / "docs" / "evidence" / "hard_cases.md")
    assert rows.keys() == hard_cases.CASES.keys()
    checked = 0
    for case, (right, *said) in rows.items():
        assert right == hard_cases.CASES[case][0]
        for name, was in zip(hard_cases.COLUMNS, said):
            now = hard_cases.cells(case)[name]
            if now == "":
                continue
            checked += 1
            if "error of" in case and now != "-":  # rounding differs between versions
                assert abs(math.log10(float(now) / float(was))) < 1, (case, name, now)
            else:
                assert now == was, (case, name)
    assert checked >= len(rows)
    sys.modules.pop("benchmarks.hard_cases", None)
