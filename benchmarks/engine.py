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


def chart(
    saved: dict,
    path: pathlib.Path,
    *,
    relative_to: str | None = None,
    label: str = "",
    only: Callable[[dict], bool] = lambda row: True,
    hide: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    floor: float = 0,
    log: bool = True,
) -> None:
    """Bars of each row's sides, grouped by case; `relative_to` divides them by one side's.

    `hide` are keys of the case that a group's name leaves out, `without` are sides that have no
    bars, `floor` is the shortest bar.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in saved["rows"] if only(row)]
    if relative_to:
        rows = [row for row in rows if number(row["values"].get(relative_to))]
    sides = [
        side
        for side in saved["sides"]
        if side not in without and any(number(r["values"].get(side)) is not None for r in rows)
    ]
    palette = plt.get_cmap("Set2").colors
    colors = {side: palette[i % len(palette)] for i, side in enumerate(sides)}
    colors["jaxent"] = OURS
    bars = {side: ([], []) for side in sides}  # places, lengths
    ticks, names, place = [], [], 0
    for row in rows:
        base = number(row["values"][relative_to]) if relative_to else 1
        figures = {side: number(row["values"].get(side)) for side in sides}
        figures = {side: x / base for side, x in figures.items() if x is not None}
        ticks.append(place + (len(figures) - 1) / 2)
        names.append(" ".join(str(x) for key, x in row["case"].items() if key not in hide))
        for side, figure in figures.items():
            bars[side][0].append(place)
            bars[side][1].append(max(figure, floor))
            place += 1
        place += 1
    inches = 0.1 * place + 1.6
    figure, axes = plt.subplots(figsize=(10, inches), layout="constrained", facecolor="white")
    for side, (places, lengths) in bars.items():
        axes.barh(places, lengths, 1, label=side, color=colors[side], edgecolor="white", lw=0.4)
    axes.set_yticks(ticks, names, fontsize=9)
    axes.set_ylim(place - 1, -1)
    axes.tick_params(axis="y", length=0)
    if log:
        axes.set_xscale("log")
    if floor:
        axes.set_xlim(left=floor * 0.9)
    if relative_to:
        axes.axvline(1, color="grey", linewidth=0.8)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(label or saved["unit"])
    axes.set_title(saved["title"], fontsize=11, loc="left")
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    keep(figure, saved, path)


def keep(figure: Any, saved: dict, path: pathlib.Path) -> None:
    """Write a figure to a file, with a caption that says where it was measured."""
    import matplotlib.pyplot as plt

    caption = textwrap.fill(origin(saved), 150)
    figure.supxlabel(caption, fontsize=7, color="grey", x=0.01, ha="left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
