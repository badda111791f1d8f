"""Statistics from the loss's own pass: time of a head's loss and gradients with `return_stats`.

"two passes" is the loss and `linear_token_stats` beside it.
"""

import functools
import itertools

import jax

import jaxent

from .engine import Row, interleaved, number
from .head_ignored import SHAPES
from .heads import DTYPES, case_of, draw

UNIT = "ms"
SIDES = ("with statistics", "two passes", "loss alone")
BOUND = "Score: time with statistics divided by that of the loss alone; at most 1.05."


def two_passes(hidden, kernel, targets):
    stats = jaxent.linear_token_stats(*jax.lax.stop_gradient((hidden, kernel)), targets)
    return jaxent.linear_cross_entropy(hidden, kernel, targets), stats


SCALARS = {
    "with statistics": functools.partial(jaxent.linear_cross_entropy, return_stats=True),
    "two passes": two_passes,
    "loss alone": lambda *arrays: (jaxent.linear_cross_entropy(*arrays), None),
}


def run(function, arrays):
    return jax.block_until_ready(function(*arrays))


def filled(row, shape, reps):
    arrays = draw(shape, row.case["dtype"])
    functions = {
        s: jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)) for s, f in SCALARS.items()
    }
    runs = {side: functools.partial(run, function, arrays) for side, function in functions.items()}
    row.values = interleaved(runs, reps)
    row.score = number(row.values["with statistics"]) / number(row.values["loss alone"])
    row.bound = 1.05
    return row


def rows(options):
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        row = Row(case_of(shape, dtype), {})
        if options.only in row.name:
            yield filled(row, shape, options.reps)
