"""The head and the loss in one: scratch memory on accelerators and on the CPU.

MB beyond inputs and outputs, by XLA's count of the compiled program. The accelerators need not be
here: XLA compiles the gradients for them ahead of time, in bfloat16. On the CPU they are compiled
in two dtypes, and derivatives of second order too. Each library gets the kernel in the layout that
the row says, (D, C) or (C, D), and transposes it where it wants the other; on the CPU it gets the
layout that it documents.
"""

import itertools
import sys

from . import targets as accelerators
from .engine import Row, number, outcome
from .heads import DTYPES, INSTALLED, ORDERS, PEERS, SHAPES, TAKES_TABLE, scratch
from .heads import SIDES as LIBRARIES

UNIT = "MB"
SIDES = tuple(side for side in LIBRARIES if side != "torch chunked")  # it counts none on a CPU
BOUND = "Score: jaxent's memory divided by the smallest of its peers'."
HEADS = {  # (tokens, width, classes), and whether the kernel is (C, D)
    "Gemma 2 2B": ((8192, 2304, 256000), False),
    "Gemma 2 2B, kernel (C, D)": ((8192, 2304, 256000), True),
    "Gemma 2 2B, 255989 classes": ((8192, 2304, 255989), False),
    "Llama 3 8B": ((8192, 4096, 128256), False),
}


def measured(row, layout, *arguments):
    """The row with each side's scratch; `layout` is by side whether its kernel is (C, D)."""
    order, shape, dtype, sharding = arguments
    row.values = {
        side: outcome(scratch, side, order, shape, dtype, layout(side), sharding)
        for side in SIDES
        if side in INSTALLED
    }
    mine = number(row.values["jaxent"])
    peers = [x for x in (number(row.values.get(side)) for side in PEERS) if x is not None]
    if mine is not None and peers:
        row.score = mine / min(peers)
    return row


def rows(options):
    for device in accelerators.NAMES:
        heads = {name: x for name, x in HEADS.items() if options.only in f"{name} {device}"}
        sharding = outcome(accelerators.sharding, device) if heads else None
        if isinstance(sharding, str):
            needed = accelerators.needs(device)
            print(f"{device}: {sharding}; it needs {needed}.", file=sys.stderr)
            continue
        for head, (shape, table) in heads.items():
            row = Row({"head": head, "device": device}, {})
            yield measured(row, lambda _, t=table: t, "gradients", shape, "bfloat16", sharding)
    for shape, dtype, order in itertools.product(SHAPES, DTYPES, ORDERS):
        row = Row({"head": str(shape), "device": f"CPU, {dtype}, {order}"}, {})
        if options.only in row.name:
            yield measured(row, lambda side: side in TAKES_TABLE, order, shape, dtype, None)
