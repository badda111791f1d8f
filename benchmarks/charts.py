"""The charts of the README, drawn from the results that are kept."""

import importlib.util
import json
import pathlib

from . import engine

RESULTS = pathlib.Path(__file__).parent / "results"
DOCS = RESULTS.parents[1] / "docs"
EXACT_FUNCTIONS = ("cross_entropy", "cross_entropy, all options", "linear_cross_entropy")
EXACT_DTYPES = ("float32", "bfloat16")
EXACT_CLASSES = (1000, 128256)


def of_speed(row):
    return row["case"]["pass"] == "with backward" and row["case"]["options"] == "plain"


def of_exactness(row):
    case = row["case"]
    return (
        case["of"] == "loss"
        and case["function"] in EXACT_FUNCTIONS
        and case["dtype"] in EXACT_DTYPES
        and case["classes"] in EXACT_CLASSES
    )


CHARTS = {  # the picture's name: of which question, and how
    "speed": (
        "dense_speed",
        {
            "relative_to": "optax on float32",
            "label": "time of loss and gradient, of that of optax on float32; less is better",
            "only": of_speed,
            "log": False,
            "hide": ("pass", "options"),
            "without": ("reference",),
        },
    ),
    "memory": (
        "head_memory",
        {"label": "scratch memory of loss and gradients, MB; less is better", "floor": 1},
    ),
    "exactness": (
        "exactness",
        {
            "label": "largest error of a loss, in eps of float32 (0.01: no more than that)",
            "only": of_exactness,
            "floor": 0.01,
            "hide": ("of",),
        },
    ),
}


def draw(folder: pathlib.Path) -> None:
    """Draw what `folder` has: into docs for the results kept, otherwise beside them."""
    target = DOCS if folder.resolve() == RESULTS else folder
    for picture, (question, how) in CHARTS.items():
        saved = folder / f"{question}.json"
        if not saved.exists():
            print(f"{picture}.png is not drawn: {question}.json is absent")
            continue
        if not importlib.util.find_spec("matplotlib"):
            print(f"{picture}.png is not drawn: matplotlib is not installed")
            continue
        engine.chart(json.loads(saved.read_text()), target / f"{picture}.png", **how)
        print(f"{picture}.png is drawn")
