"""What type checkers say of an outside project, `typing_user`, that uses the library."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxent

USER = Path(__file__).parent / "typing_user"


def check(*command):
    """Run a type checker on the project, where the library that is tested here is installed."""
    if importlib.util.find_spec(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    installed = [str(Path(jaxent.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, installed))}
    command = [sys.executable, "-m", *command]
    return subprocess.run(
        command, cwd=USER, env=environment, capture_output=True, text=True, check=False
    ).stdout


def mypy_errors():
    report = check("mypy", "--strict", "--config-file=", "--cache-dir=../../.mypy_cache/user", ".")
    assert "(checked 2 source files)" in report, report
    return re.findall(r"^(\w+\.py):(\d+): error:", report, re.MULTILINE), report


def pyright_errors():
    report = check("pyright", "--outputjson", "--pythonpath", sys.executable, "-p", ".")
    found = json.loads(report[report.index("{") :])
    assert found["summary"]["filesAnalyzed"] == 2, report
    places = [
        (Path(error["file"]).name, error["range"]["start"]["line"] + 1)
        for error in found["generalDiagnostics"]
        if error["severity"] != "information"
    ]
    return places, report


@pytest.mark.slow
@pytest.mark.parametrize("errors", [mypy_errors, pyright_errors])
def test_right_calls_are_clean_and_wrong_ones_are_errors(errors):
    lines = (USER / "wrong.py").read_text().splitlines()
    expected = {("wrong.py", i) for i, line in enumerate(lines, 1) if line.endswith("# error")}
    places, report = errors()
    assert {(name, int(line)) for name, line in places} == expected, report


def test_the_right_calls_use_every_public_name():
    used = re.findall(r"\bjaxent\.(\w+)", (USER / "right.py").read_text())
    assert {*used} == {*jaxent.__all__}
