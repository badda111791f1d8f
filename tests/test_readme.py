"""The pages tell the truth: their snippets run, their commands are CI's, their tables come out."""

import math
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(text, info):
    return re.findall(rf"^```{info}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


SITE = [
    "docs/index.md",
    "docs/design/how_it_works.md",
    "docs/porting.md",
    "docs/sharding.md",
]
GUIDES = [f"docs/guides/{path.name}" for path in sorted((ROOT / "docs" / "guides").glob("*.md"))]


@pytest.mark.parametrize("page", ["README.md", *SITE, *GUIDES])
def test_snippets_run(page):
    text = (ROOT / page).read_text()
    for package in ("optax", "equinox"):
        if f"import {package}" in text:
            pytest.importorskip(package)
    snippets = re.findall(r"^```(python|python torch)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(snippets) >= 2
    namespace = {}
    for info, snippet in snippets:
        if info == "python torch":
            try:
                import torch  # noqa: F401
            except ImportError:
                continue
        exec(compile(snippet, page, "exec"), namespace)


def test_continuous_integration_runs_the_commands_of_the_readme():
    commands = [c.strip() for c in blocks(README, "sh") if "-m venv" in c]
    assert len(commands) == 2
    script = (ROOT / ".ci" / "run").read_text()
    for command in commands:
        assert command in script


def table_rows(heading):
    lines = README.split(f"## {heading}")[1].split("\n## ")[0].splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.mark.filterwarnings("ignore")  # of the libraries that are compared
def test_hard_cases_come_out_as_the_readme_says(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    hard_cases = pytest.importorskip("benchmarks.hard_cases")
    rows = table_rows("The hard cases")
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
