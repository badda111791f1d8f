"""Many processes, for real: examples/distributed.py, run as a user runs it.

Two processes of four CPU devices each, over loopback and gloo, are compared with one process
of eight. Then one of two is killed.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

for package in ("optax", "orbax.checkpoint"):
    pytest.importorskip(package, reason="the example trains with Optax and saves with Orbax")

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[1] / "examples" / "distributed.py"
STEPS, SAVE_EVERY, KILLED_AFTER = 60, 5, 10
LIMIT = 240  # seconds for a whole run, however loaded the machine
BOUND = 60  # seconds in which the death of one process ends the others

# The devices' eight partial sums are added in another order: at most a rounding for each.
ROUNDINGS = 8 * float(np.finfo(np.float32).eps)


def start(*options, log=None):
    """The example with these options; it sets the number of its devices itself."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, str(EXAMPLE), "--steps", str(STEPS), "--save-every", str(SAVE_EVERY)]
    return subprocess.Popen(
        [*command, *map(str, options)], env=env, stdout=log, stderr=subprocess.STDOUT, text=True
    )


def run(*options):
    process = start("--no-compare", *options)
    try:
        assert process.wait(LIMIT) == 0
    finally:
        process.kill()


def wait_for(pattern, log, processes):
    """What the log says, once it says it."""
    for _ in range(20 * LIMIT):
        if found := re.search(pattern, log.read_text()):
            return found
        assert not any(process.poll() for process in processes), log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"no {pattern!r} in {LIMIT} seconds: {log.read_text()}")


def start_pair(folder):
    """Two processes, each started by itself, as on a cluster; and what they print."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    logs, processes = [folder / "0.log", folder / "1.log"], []
    for i, path in enumerate(logs):
        options = "--coordinator", coordinator, "--num-processes", 2, "--process-id", i
        options += "--devices", 4, "--checkpoint", folder / "checkpoints"
        with path.open("w") as log:
            processes.append(start(*options, log=log))
    return processes, logs


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes report that were never interrupted."""
    out = tmp_path_factory.mktemp("two") / "out.json"
    run("--processes", 2, "--devices", 4, "--out", out)
    return json.loads(out.read_text())


def test_two_processes_train_and_evaluate_as_one_does(two_processes, tmp_path):
    run("--processes", 1, "--devices", 8, "--out", tmp_path / "out.json")
    one = json.loads((tmp_path / "out.json").read_text())
    assert list(one["losses"]) == list(map(str, range(1, STEPS + 1)))
    assert list(two_processes["losses"]) == list(one["losses"])
    for actual, whole in (
        (list(two_processes["losses"].values()), list(one["losses"].values())),
        *((two_processes[name], one[name]) for name in one if name != "losses"),
    ):
        np.testing.assert_allclose(actual, whole, rtol=ROUNDINGS, atol=0)


def test_training_learns_and_mean_of_means_is_another_number(two_processes):
    assert two_processes["losses"][str(STEPS)] < 0.7 * two_processes["losses"]["1"]
    loss, wrong = two_processes["held-out loss"], two_processes["mean of means"]
    assert abs(wrong - loss) > 0.01 * loss


def kill(victim, folder):
    """Start two processes and kill this one: the other must end by itself, with an error."""
    processes, logs = start_pair(folder)
    try:
        wait_for(rf"step {KILLED_AFTER}:", logs[0], processes)
        processes[victim].kill()
        assert processes[victim].wait(BOUND) == -signal.SIGKILL, "it was done before the kill"
        assert processes[1 - victim].wait(BOUND) != 0
    finally:
        for process in processes:
            process.kill()


def test_death_of_the_coordinator_ends_the_other_process(tmp_path):
    kill(0, tmp_path)


def test_death_of_a_process_ends_the_coordinator_and_a_rerun_resumes(two_processes, tmp_path):
    kill(1, tmp_path)
    out, checkpoints = tmp_path / "out.json", tmp_path / "checkpoints"
    run("--processes", 2, "--devices", 4, "--out", out, "--checkpoint", checkpoints, "--resume")
    resumed = json.loads(out.read_text())
    first = min(map(int, resumed["losses"]))
    assert first > KILLED_AFTER
    assert first % SAVE_EVERY == 1
    expected = {k: v for k, v in two_processes["losses"].items() if int(k) >= first}
    assert resumed == {**two_processes, "losses": expected}


def test_launcher_fails_with_a_process_it_started(tmp_path):
    path = tmp_path / "log"
    with path.open("w") as log:
        launcher = start("--no-compare", "--steps", 10**6, log=log)
    try:
        pid = int(wait_for(r"process 1 of 2: pid (\d+)", path, [launcher])[1])
        wait_for("step 5:", path, [launcher])
        os.kill(pid, signal.SIGKILL)
        assert launcher.wait(BOUND) == 1
    finally:
        launcher.kill()
    assert f"process 1 (exit status {-signal.SIGKILL})" in path.read_text()
