"""The engine: sides timed in turn, rows of figures, kept as JSON, shown as a table and a chart.

A question is a module with a docstring (its first line is the title) and

    UNIT, SIDES   what is counted, and the columns
    BOUND         what jaxent has to keep, in words
    rows(options) the rows, one after the other

whose rows are `Row`s. Nothing here knows what is measured.
"""

import argparse
import dataclasses
import datetime
import gc
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import random
import statistics
import textwrap
import time
from collections.abc import Callable
from typing import Any

from .tables import header, line

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "tokamax", "jax-cce", "libtpu")


@dataclasses.dataclass
class Timing:
    """Seconds: the median, and the middle half of the runs."""

    median: float
    low: float
    high: float


@dataclasses.dataclass
class Row:
    """One case, and what each side did in it: a number, a Timing, or why there is none.

    `score` is the figure that is bounded, `bound` its bound; None where there is none.
    """

    case: dict[str, Any]
    values: dict[str, Any]
    score: float | None = None
    bound: float | None = None
    notes: str = ""

    @property
    def name(self) -> str:
        return " ".join(map(str, self.case.values()))


def outcome(function: Callable, *arguments: Any, **keywords: Any) -> Any:
    """Its result, or the name of its exception."""
    try:
        return function(*arguments, **keywords)
    except Exception as error:
        return type(error).__name__


def interleaved(runs: dict[str, Callable[[], Any]], reps: int, least: float = 0.02) -> dict:
    """A Timing for each side, or the name of its exception.

    The sides take turns, so that what else the machine does falls on all of them. A turn runs
    a side for at least `least` seconds (a fast one several times, and its mean counts), after one
    run that compiles and one that warms up. The order is drawn for each turn: what a side leaves
    behind (threads that spin, memory) falls on another each time.
    """
    first = {name: outcome(run) for name, run in runs.items()}
    failed = {name: x for name, x in first.items() if isinstance(x, str)}
    alive = [name for name in runs if name not in failed]
    del first
    counts = {}
    for name in alive:
        start = time.perf_counter()
        runs[name]()
        counts[name] = max(1, round(least / (time.perf_counter() - start)))
    seconds = {name: [] for name in alive}
    gc.collect()
    order = random.Random(0)
    for name in itertools.chain(*(order.sample(alive, len(alive)) for _ in range(reps))):
        start = time.perf_counter()
        for _ in range(counts[name]):
            runs[name]()
        seconds[name].append((time.perf_counter() - start) / counts[name])
    return {name: failed.get(name) or summary(seconds[name]) for name in runs}


def summary(seconds: list[float]) -> Timing:
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    return Timing(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter])


def number(value: Any) -> float | None:
    """The figure of a value; None where it is not one."""
    if isinstance(value, Timing):
        return value.median
    if isinstance(value, dict):
        return value["median"]
    return value if isinstance(value, (int, float)) else None


def machine() -> str:
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} core{'s' * (cores != 1)} of {model}"


def versions() -> dict[str, str]:
    """Of what the sides are made of; "" for what is not installed."""

    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def record(question: Any, name: str, options: argparse.Namespace) -> dict:
    """Run a question: its rows are printed as they come, and returned with where and when."""
    found, title = [], question.__doc__.splitlines()[0]
    for row in question.rows(options):
        if not found:
            caption = f"\n{title} Unit: {question.UNIT}. {question.BOUND}"
            header(caption, *row.case, *question.SIDES, "jaxent's score", "bound")
        found.append(row)
        line(*cells(row, question))
    return {
        "question": name,
        "title": title,
        "unit": question.UNIT,
        "sides": list(question.SIDES),
        "bound": question.BOUND,
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "rows": [dataclasses.asdict(row) for row in found],
    }


def shown(value: Any, unit: str) -> str:
    figure = number(value)
    if figure is None:
        return "" if value is None else str(value)
    figure *= 1000 if unit == "ms" and not isinstance(value, (int, float)) else 1
    return f"{figure:.3g}" if abs(figure) < 1000 else f"{figure:.0f}"


def cells(row: Row, question: Any) -> list[str]:
    """A row of the table."""
    score, bound = row.score, row.bound
    outside = score is not None and bound is not None and score > bound
    verdict = "" if score is None else f"**{score:.3g}**" if outside else f"{score:.3g}"
    return [
        *map(str, row.case.values()),
        *(shown(row.values.get(side), question.UNIT) for side in question.SIDES),
        verdict + (f" ({row.notes})" if row.notes else ""),
        "" if bound is None else f"{bound:.3g}",
    ]


def origin(saved: dict) -> str:
    """Where and when, for a caption."""
    used = [f"{k} {v}" for k, v in saved["versions"].items() if v and k != "libtpu"]
    return f"{saved['machine']}; {', '.join(used)}; {saved['date']}"


def save(saved: dict, path: pathlib.Path) -> None:
    path.write_text(json.dumps(saved, indent=1) + "\n")


OURS = "#0b3d91"  # jaxent's colour in every chart
OTHER = "#d55e00"


def chart(
    saved: dict,
    path: pathlib.Path,
    *,
    name: Callable[[dict], str | None],
    label: str,
    ticks: dict[float, str],
    relative_to: str | None = None,
    limit: float | None = None,
    without: tuple[str, ...] = (),
    least: float = 0,
) -> None:
    """Draw a dot of jaxent's, one of the best other side's, and small ones of the rest, by row.

    A side that the row's notes call inexact is among the rest.
    `name` is what a row of a case is called, None leaves it out. `relative_to` divides values by
    one side's, which is at 1; `limit` is a line. `without` are sides that have no dots, and `least`
    is where a smaller value is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in saved["rows"] if name(row["case"])]
    figure, axes = plt.subplots(
        figsize=(9, 0.3 * len(rows) + 1.6), layout="constrained", facecolor="white"
    )
    for place, row in enumerate(rows):
        base = number(row["values"][relative_to]) if relative_to else 1
        values = {side: number(row["values"].get(side)) for side in saved["sides"]}
        values = {k: max(v / base, least) for k, v in values.items() if v and k not in without}
        ours = values.pop("jaxent")
        inexact = row["notes"].partition("inexact: ")[2].split(", ")
        exact = [side for side in values if side not in inexact]
        best = min(exact or values, key=values.__getitem__)
        axes.plot([ours, values[best]], [place, place], color="0.8", lw=2, zorder=1)
        axes.plot([*values.values()], [place] * len(values), "o", color="0.75", ms=4, zorder=2)
        axes.plot(values[best], place, "o", color=OTHER, ms=7, zorder=3)
        axes.plot(ours, place, "o", color=OURS, ms=7, zorder=4)
        axes.text(
            1.01,
            place,
            best,
            color=OTHER,
            fontsize=8,
            va="center",
            transform=axes.get_yaxis_transform(),
        )
    axes.set_xscale("log")
    axes.set_xticks([*ticks], [*ticks.values()])
    axes.xaxis.set_minor_locator(plt.NullLocator())
    axes.set_yticks(range(len(rows)), [name(row["case"]) for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="both", length=0)
    if limit is not None:
        axes.axvline(limit, color="0.4", lw=1, ls="--", zorder=0)
    axes.grid(axis="x", color="0.93")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(label)
    that_is = " that is exact" if any("inexact" in row["notes"] for row in rows) else ""
    for color, size, what in (
        (OURS, 7, "jaxent"),
        (OTHER, 7, f"the best other{that_is}, named on the right"),
        ("0.75", 4, "the rest"),
    ):
        axes.plot([], [], "o", color=color, ms=size, label=what)
    figure.legend(loc="outside upper left", ncols=3, fontsize=9, frameon=False)
    keep(figure, saved, path)


def keep(figure: Any, saved: dict, path: pathlib.Path) -> None:
    """Write a figure to a file, with a caption that says where it was measured."""
    import matplotlib.pyplot as plt

    caption = textwrap.fill(origin(saved), 150)
    figure.supxlabel(caption, fontsize=7, color="grey", x=0.01, ha="left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
