"""Losses on logits: time on the CPU, forward and with backward.

Every side computes the same mean loss of the same logits, plain or with class weights, label
smoothing and ignored targets. A peer whose loss, in float64, is not within 4 eps of float32 of the
right one does not count as one (PyTorch's rounding of its result to half precision is forgiven);
it is named in the last column. "By hand" is no peer: it is the smallest program of jaxent's
meaning, where there are no options, with a gradient written by hand.
"""

import itertools

import jax.numpy as jnp
import numpy as np

from .dense_sides import IGNORE, SIDES, runner, torch
from .engine import Row, interleaved, number

UNIT = "ms"
BOUND = "Score: jaxent's time divided by that of the fastest exact peer; at most 1.05."
CASES = (
    ((65536, 10), -1),
    ((4096, 1000), -1),
    ((1024, 32000), -1),
    ((256, 128256), -1),
    ((8, 21, 512, 512), 1),
)
DTYPES = ("float32", "bfloat16", "float16")
PASSES = {"forward": False, "with backward": True}
OPTIONS = ("plain", "weight, smoothing, ignoring")


def draw(shape, axis, dtype, name):
    """Logits, targets and options."""
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.standard_normal(shape, "float32"), dtype)
    classes = shape[axis]
    targets = random.integers(0, classes, np.delete(shape, axis)).astype("int32")
    if name == "plain":
        return logits, targets, {}
    targets[random.random(targets.shape) < 0.1] = IGNORE
    weight = random.uniform(0.5, 2, classes).astype("float32")
    return logits, targets, {"weight": weight, "label_smoothing": 0.1}


def exact(logits, targets, axis, options):
    """The mean loss in float64."""
    x = np.moveaxis(np.asarray(logits, "float64"), axis, -1)
    x = x - x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    weight = np.asarray(options.get("weight", np.ones(x.shape[-1])), "float64")
    smoothing = options.get("label_smoothing", 0.0)
    counted = targets != IGNORE
    safe = np.where(counted, targets, 0)
    picked = np.take_along_axis(x, safe[..., None], -1)[..., 0]
    losses = (1 - smoothing) * weight[safe] * picked + smoothing * (x @ weight) / x.shape[-1]
    return -losses[counted].sum() / weight[safe][counted].sum()


def is_exact(side, loss, right, dtype):
    eps = jnp.finfo("float32").eps
    if side == "torch" and dtype != "float32":
        eps = jnp.finfo(dtype).eps
    return abs(float(loss) - right) <= 4 * eps * max(1, abs(right))


def rows(options):
    for (shape, axis), dtype, how, of in itertools.product(CASES, DTYPES, OPTIONS, PASSES):
        case = {"shape": shape, "dtype": dtype, "options": how, "pass": of}
        row = Row(case, {})
        if options.only in row.name:
            logits, targets, chosen = draw(shape, axis, dtype, how)
            absent = {"torch": not torch, "by hand": how != "plain"}
            sides = [side for side in SIDES if not absent.get(side)]
            runs = {s: runner(s, logits, targets, axis, chosen, PASSES[of]) for s in sides}
            row.values = interleaved(runs, options.reps)
            right = exact(logits, targets, axis, chosen)
            found = {s: runs[s]() for s in sides if number(row.values[s])}
            losses = {s: x[0] if PASSES[of] else x for s, x in found.items()}
            inexact = [s for s, x in losses.items() if not is_exact(s, x, right, dtype)]
            no_peers = ("jaxent", "by hand", *inexact)
            peers = [number(row.values[s]) for s in losses if s not in no_peers]
            row.score, row.bound = number(row.values["jaxent"]) / min(peers), 1.05
            row.notes = f"inexact: {', '.join(inexact)}" if inexact else ""
            yield row
