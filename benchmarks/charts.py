"""The charts of the documentation, drawn from the results that are kept."""

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


SHAPES = {
    (65536, 10): "10 classes",
    (4096, 1000): "1000 classes",
    (1024, 32000): "32000 classes",
    (256, 128256): "128256 classes",
    (8, 21, 512, 512): "pixels, 21 classes",
}


def name_of_speed(case: dict) -> str | None:
    if case["pass"] == "with backward" and case["options"] == "plain":
        return f"{SHAPES[tuple(case['shape'])]}, {case['dtype']}"
    return None


def name_of_memory(case: dict) -> str | None:
    if "CPU" in case["device"] or case["head"] not in ("Gemma 2 2B", "Llama 3 8B"):
        return None
    return f"{case['head']}, {case['device']}"


def name_of_exactness(case: dict) -> str | None:
    if (
        case["of"] == "loss"
        and case["function"] in EXACT_FUNCTIONS
        and case["dtype"] in EXACT_DTYPES
        and case["classes"] in EXACT_CLASSES
    ):
        logits = {"normal": "", "shifted": ", near 10000", "confident": ", nearly certain"}
        function = {"cross_entropy": "loss", "linear_cross_entropy": "head"}.get(
            case["function"], "all options"
        )
        return f"{function}, {case['classes']} classes, {case['dtype']}{logits[case['logits']]}"
    return None


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
            "name": name_of_speed,
            "label": "time of loss and gradient, of optax's on a float32 copy; less is better",
            "ticks": {x: f"{x:g}" for x in (0.25, 0.5, 1, 2, 4)},
            "relative_to": "optax on float32",
            "limit": 1,
            "without": ("reference", "by hand"),
        },
    ),
    "memory": (
        "head_memory",
        {
            "name": name_of_memory,
            "label": "scratch memory of loss and gradients; less is better",
            "ticks": {100: "100 MB", 300: "300 MB", 1000: "1 GB", 3000: "3 GB", 10000: "10 GB"},
            "without": ("reference",),
        },
    ),
    "exactness": (
        "exactness",
        {
            "name": name_of_exactness,
            "label": "largest error of a loss, in roundings of float32; less is better",
            "ticks": {0.1: "0.1 or less", 1: "1", 1e2: "100", 1e4: "10 000", 1e6: "1 000 000"},
            "limit": 1,
            "without": ("reference",),
            "least": 0.1,
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
