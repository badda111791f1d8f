"""Targets of few classes: time of losses of `SparseTargets` against class indices.

Sixteen classes an example, drawn at random, their probabilities too. "probabilities" are the same
targets as an array of all classes, which is made beforehand.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import jaxent

from .engine import Row, interleaved, number
from .heads import draw

UNIT = "ms"
SIDES = ("sparse", "class indices", "probabilities")
BOUND = "Score: time of sparse targets divided by that of class indices; at most 1.15."
PLACES = 16
LOGITS = ((4096, 1000), (1024, 32000))
HEADS = ((1024, 256, 32768), (512, 256, 131072))  # tokens, width, classes


def targets_of(examples, classes):
    random = np.random.default_rng(0)
    indices = random.integers(0, classes, (examples, PLACES)).astype("int32")
    probabilities = random.dirichlet(np.ones(PLACES), examples).astype("float32")
    dense = np.zeros((examples, classes), "float32")
    np.add.at(dense, (np.arange(examples)[:, None], indices), probabilities)
    return {
        "sparse": jaxent.SparseTargets(jnp.asarray(indices), jnp.asarray(probabilities)),
        "class indices": jnp.asarray(indices[:, 0]),
        "probabilities": jnp.asarray(dense),
    }


def runs_of(loss, arrays, targets, gradients):
    numbers = tuple(range(len(arrays)))
    function = jax.jit(jax.value_and_grad(loss, numbers) if gradients else loss)
    return {
        side: lambda y=y: jax.block_until_ready(function(*arrays, y)) for side, y in targets.items()
    }


def filled(row, loss, arrays, gradients, reps):
    targets = targets_of(row.case["examples"], row.case["classes"])
    row.values = interleaved(runs_of(loss, arrays, targets, gradients), reps)
    row.score = number(row.values["sparse"]) / number(row.values["class indices"])
    row.bound = 1.15
    return row


def rows(options):
    for shape, gradients in itertools.product((*LOGITS, *HEADS), (False, True)):
        examples, *width, classes = shape
        case = {"loss of": f"a head of width {width[0]}" if width else "logits"}
        case |= {"examples": examples, "classes": classes}
        row = Row(case | {"pass": "with backward" if gradients else "forward"}, {})
        if options.only not in row.name:
            continue
        if width:
            arrays, loss = draw(shape, "float32")[:2], jaxent.linear_cross_entropy
        else:
            arrays = (jax.random.normal(jax.random.key(0), shape),)
            loss = jaxent.cross_entropy
        yield filled(row, loss, arrays, gradients, options.reps)
