"""The charts of the README, drawn from the results that are kept."""

import functools
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


def of_memory(row):
    return row["case"]["head"] == "Llama 3 8B"


def of_exactness(row):
    case = row["case"]
    return (
        case["of"] == "loss"
        and case["function"] in EXACT_FUNCTIONS
        and case["dtype"] in EXACT_DTYPES
        and case["classes"] in EXACT_CLASSES
    )


def of_counted(saved: dict, path: pathlib.Path) -> None:
    """A line for each shape of a head: its time of naive's, against the tokens that count."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, 2, figsize=(9, 3.6), layout="constrained", facecolor="white", sharey=True
    )
    for axes, dtype in zip(panels, ("float32", "bfloat16")):
        rows = [row for row in saved["rows"] if row["case"]["dtype"] == dtype]
        shapes = dict.fromkeys(
            tuple(row["case"][key] for key in ("tokens", "width", "classes")) for row in rows
        )
        axes.axhline(1, color="0.4", lw=1, ls="--", label="loss on the logits")
        axes.plot([0, 1], [0, 1], color="0.8", lw=1, label="in proportion to what counts")
        for i, shape in enumerate(shapes):
            points = sorted(
                (1 - row["case"]["ignored"], row["score"])
                for row in rows
                if tuple(row["case"][key] for key in ("tokens", "width", "classes")) == shape
            )
            label = None if i else "jaxent's head, five shapes"
            axes.plot(*zip(*points), "o-", color=engine.OURS, lw=1.2, ms=4, alpha=0.8, label=label)
        axes.set(title=dtype, xlabel="part of the tokens that counts", xlim=(0, 1.03))
        axes.set_ylim(0, 1.4)
        axes.grid(color="0.93")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time of loss and gradients\nof that of the loss on the logits")
    panels[0].legend(fontsize=9, frameon=False, loc="lower right")
    engine.keep(figure, saved, path)


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
        {
            "label": "scratch memory of loss and gradients, MB; less is better",
            "only": of_memory,
            "floor": 1,
        },
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
    "counted": ("head_ignored", of_counted),
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
        draw_it = how if callable(how) else functools.partial(engine.chart, **how)
        draw_it(json.loads(saved.read_text()), target / f"{picture}.png")
        print(f"{picture}.png is drawn")
