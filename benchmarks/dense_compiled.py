"""Losses on logits: scratch memory and bytes touched, of the compiled program.

Loss and gradient, compiled ahead of time for accelerators that need not be here, and for the CPU.
Scratch is what is held beyond inputs and outputs, by XLA's count, in MB and as a share of the
logits. A pass is the logits' bytes: any loss with a stable gradient has to touch three of them
(read, read, write). XLA counts no bytes for GPUs. Targets that are probabilities and masks of the
logits' shape are arrays of their size themselves, and are not bounded.
"""

import itertools
import sys

import jax
import jax.numpy as jnp
import optax

import jaxent

from . import targets as accelerators
from .engine import Row, outcome

UNIT = "MB, %, passes"
SIDES = ("scratch, MB", "scratch, % of logits", "bytes, passes")
BOUND = (
    "Score: the share of scratch, at most 1 %; passes are at most 1.35 of three (beside the score "
    "where not)."
)
DTYPES = ("bfloat16", "float32")
CPU, LARGE, SMALL = "CPU", (8192, 128256), (1024, 32000)
PASSES = 3 * 1.35


def plain(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def on_float32(logits, targets):
    return plain(logits.astype(jnp.float32), targets)


# An option is a number, or the dtype and the axes of an array.
EVERY = {
    "weight": ("float32", "C"),
    "class_mask": ("bool", "C"),
    "sample_weight": ("float32", "N"),
    "label_smoothing": ("float32", ""),
    "z_loss": ("float32", ""),
    "softcap": 30.0,
}
PROBABILITIES = {"targets": ("float32", "NC")}
UNBOUNDED = {
    "jaxent, probability targets": PROBABILITIES,
    "jaxent, class_mask (N, C)": {"class_mask": ("bool", "NC")},
    "jaxent, both": PROBABILITIES | {"class_mask": ("bool", "NC")},
}
LOSSES = {
    "optax as is": (plain, {}),
    "optax on float32": (on_float32, {}),
    "jaxent": (jaxent.cross_entropy, {}),
    **{f"jaxent, {k}": (jaxent.cross_entropy, {k: v}) for k, v in EVERY.items()},
    "jaxent, all of these": (jaxent.cross_entropy, EVERY),
    **{name: (jaxent.cross_entropy, options) for name, options in UNBOUNDED.items()},
}


def compiled(shape, dtype, loss, options, sharding):
    sizes = dict(zip("NC", shape))

    def array(dtype, axes):
        shape = tuple(sizes[axis] for axis in axes)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    given = {"targets": ("int32", "N")} | options
    static = {k: v for k, v in given.items() if not isinstance(v, tuple)}
    arrays = {k: array(*v) for k, v in given.items() if k not in static}

    def evaluated(logits, arrays):
        return loss(logits, **arrays, **static)

    return jax.jit(jax.value_and_grad(evaluated)).lower(array(dtype, "NC"), arrays).compile()


def figures(shape, dtype, loss, options, sharding):
    """What SIDES are."""
    program = compiled(shape, dtype, loss, options, sharding)
    one_pass = shape[0] * shape[1] * jnp.dtype(dtype).itemsize
    scratch = program.memory_analysis().temp_size_in_bytes
    touched = (program.cost_analysis() or {}).get("bytes accessed")
    return scratch / 1e6, 100 * scratch / one_pass, touched and touched / one_pass


def measured(row, name, *arguments):
    found = outcome(figures, *arguments)
    if isinstance(found, str):
        row.values = dict.fromkeys(SIDES, found)
        return row
    row.values = dict(zip(SIDES, found))
    if name.startswith("jaxent"):
        _, row.score, passes = found
        if name not in UNBOUNDED:
            row.bound = 1.0
            row.notes = f"passes: {passes:.2f} > {PASSES:.2f}" if (passes or 0) > PASSES else ""
    return row


def cases(device, shape):
    for dtype, name in itertools.product(DTYPES, LOSSES):
        logits = "x".join(map(str, shape))
        yield Row({"device": device, "logits": logits, "dtype": dtype, "loss": name}, {})


def rows(options):
    for device in (*accelerators.NAMES, CPU):
        shape = SMALL if device == CPU else LARGE
        chosen = [row for row in cases(device, shape) if options.only in row.name]
        sharding = None
        if chosen and device != CPU:
            sharding = outcome(accelerators.sharding, device)
        if isinstance(sharding, str):
            needed = accelerators.needs(device)
            print(f"{device}: {sharding}; it needs {needed}.", file=sys.stderr)
            continue
        for row in chosen:
            name = row.case["loss"]
            yield measured(row, name, shape, row.case["dtype"], *LOSSES[name], sharding)
