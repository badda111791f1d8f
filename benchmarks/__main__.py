"""Run benchmarks by name, and draw what they found.

    python -m benchmarks                      what there is
    python -m benchmarks dense_speed          one of them, or several
    python -m benchmarks all
    python -m benchmarks dense_speed --only "bfloat16" --reps 5
    python -m benchmarks draw                 the charts again, from the results kept

Rows are printed as they come, results are kept in `--out` as JSON. A partial run (`--only`) keeps
nothing unless `--out` says where. Each question runs in a process of its own.
"""

import argparse
import importlib
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
QUESTIONS = (
    "dense_speed",
    "dense_compiled",
    "head_speed",
    "head_ignored",
    "head_stats",
    "head_memory",
    "head_gpu",
    "sparse_targets",
    "sharded",
    "compile_time",
    "call_cost",
    "exactness",
    "training_step",
)
# Read by JAX, and by PyTorch's OpenMP, whose threads otherwise spin into the turn of the next side.
QUIET = {"OMP_WAIT_POLICY": "PASSIVE"}
# XLA says into the table that folding a constant takes long, of optax's scatter.
SILENT = {"TF_CPP_MIN_LOG_LEVEL": "3"}
ENVIRONMENT = {
    "dense_compiled": {"JAX_PLATFORMS": "cpu"},
    "head_speed": {"JAX_PLATFORMS": "cpu"} | QUIET,
    "head_ignored": {"JAX_PLATFORMS": "cpu"} | QUIET,
    "dense_speed": {"JAX_PLATFORMS": "cpu"} | QUIET,
    "head_stats": {"JAX_PLATFORMS": "cpu"} | QUIET,
    "head_memory": {"JAX_PLATFORMS": "cpu"},
    "sparse_targets": {"JAX_PLATFORMS": "cpu"} | QUIET,
    "call_cost": {"JAX_PLATFORMS": "cpu"} | QUIET,
    "sharded": {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "questions", nargs="*", metavar="QUESTION", help=f"{', '.join(QUESTIONS)}, all or draw"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--reps", type=int, default=9, help="turns of each timing")
    parser.add_argument("--out", type=pathlib.Path, help="where results are kept as JSON")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Not by `choices`, which some versions of argparse check an absent list against.
    if unknown := {*options.questions} - {*QUESTIONS, "all", "draw"}:
        parser.error(f"{', '.join(sorted(unknown))}: there is no such question")
    if options.here:
        return run(options.questions[0], options)
    if not options.questions:
        for name in QUESTIONS:
            print(f"{name:16} {title(name)}")
        return
    chosen = QUESTIONS if "all" in options.questions else options.questions
    for name in (name for name in chosen if name != "draw"):
        command = [sys.executable, "-m", "benchmarks", name, "--here", "--reps", str(options.reps)]
        command += ["--only", options.only] if options.only else []
        command += ["--out", str(options.out)] if options.out else []
        environment = SILENT | ENVIRONMENT.get(name, {}) | os.environ
        subprocess.run(command, check=True, env=environment, cwd=HERE.parent)
    draw(options)


def title(name):
    return (HERE / f"{name}.py").read_text().splitlines()[0].strip('"')


def run(name, options):
    from . import engine

    question = importlib.import_module(f".{name}", __package__)
    saved = engine.record(question, name, options)
    absent = [package for package, version in saved["versions"].items() if not version]
    print(f"\n{engine.origin(saved)}. Not installed: {', '.join(absent) or 'nothing'}.\n")
    if options.out or not options.only:
        folder = options.out or HERE / "results"
        folder.mkdir(parents=True, exist_ok=True)
        engine.save(saved, folder / f"{name}.json")


def draw(options):
    """The charts of the README, from what is kept."""
    from . import charts

    charts.draw(options.out or HERE / "results")


if __name__ == "__main__":
    main()
