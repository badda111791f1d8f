"""The head and the loss in one: time of loss and gradients against the tokens that do not count.

The targets of a part of the tokens, drawn at random, are `ignore_index`. naive is optax on the
logits with everything counted, which takes as long whatever counts; "by classes" is jaxent without
its choice of making gradients forward.
"""

import functools
import itertools

import jax.numpy as jnp
import numpy as np

import jaxent

from .engine import Row, interleaved, number
from .head_speed import in_order
from .heads import case_of, draw, naive, runner

UNIT = "ms"
SIDES = ("jaxent", "by classes", "naive")
BOUND = (
    "Score: jaxent's time divided by naive's; at most 1.0 in float32 and 1.05 in bfloat16, 0.58 "
    "with half of the tokens ignored, 0.28 with nine tenths."
)
SHAPES = (  # tokens, width, classes
    (4096, 512, 16384),
    (2048, 512, 32768),
    (1024, 256, 131072),
    (2048, 2048, 16384),
    (4096, 256, 32768),
)
DTYPES = ("float32", "bfloat16")
PARTS = (0.0, 0.5, 0.9)


def targets_of(arrays, part):
    hidden, kernel, targets = arrays
    ignored = np.random.default_rng(1).permutation(len(targets)) < part * len(targets)
    return hidden, kernel, jnp.where(ignored, -100, targets)


def rows(options):
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        found = [Row(case_of(shape, dtype) | {"ignored": part}, {}) for part in PARTS]
        if not any(options.only in row.name for row in found):
            continue
        arrays = draw(shape, dtype)
        runs = {("naive", 0.0): runner(naive, arrays)}
        for part in PARTS:
            given = targets_of(arrays, part)
            runs["jaxent", part] = runner(jaxent.linear_cross_entropy, given)
            runs["by classes", part] = runner(functools.partial(in_order, False), given)
        times = interleaved(runs, options.reps)
        for row in found:
            part = row.case["ignored"]
            row.values = {side: times[side, part] for side in ("jaxent", "by classes")}
            row.values["naive"] = times["naive", 0.0]
            mine, other = number(row.values["jaxent"]), number(row.values["naive"])
            of_all = 1.0 if dtype == "float32" else 1.05
            row.score, row.bound = mine / other, {0.0: of_all, 0.5: 0.58, 0.9: 0.28}[part]
            yield row
