"""Time to trace and compile each function, and to import jaxent.

A run clears JAX's caches, then lowers and compiles a jitted function, with no compilation cache on
disk: alone, with its gradient, or in a training step (a two-layer network and optax's adam).
optax is its loss of class indices, behind `hidden @ kernel` for the head; plain is the same
function in `jax.numpy`: of cross_entropy with what optax's leaves out, which is ignored targets,
NaN for others out of range, and losses near 0 to their last digit. Imports run in a Python process
of their own; plain is then the import of what jaxent is built on.
"""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax

import jaxent

from . import exactness_sides as sides_of
from .engine import Row, interleaved, number

UNIT = "ms"
SIDES = ("jaxent", "optax", "plain")
BOUND = (
    "Score: jaxent's time divided by plain's, or else optax's; at most 1.2 for cross_entropy and "
    "1.1 for imports."
)
TOKENS, WIDTH, CLASSES = 256, 64, 1000
LOGITS = jax.ShapeDtypeStruct((TOKENS, CLASSES), "float32")
HIDDEN = jax.ShapeDtypeStruct((TOKENS, WIDTH), "float32")
KERNEL = jax.ShapeDtypeStruct((WIDTH, CLASSES), "float32")
TARGETS = jax.ShapeDtypeStruct((TOKENS,), "int32")
WEIGHT = jax.ShapeDtypeStruct((CLASSES,), "float32")


def mean_of(function):
    return lambda *arguments: function(*arguments).mean()


def optax_head(hidden, kernel, targets):
    return sides_of.optax_loss(hidden @ kernel, targets).mean()


def stats_sum(function):
    """One number of the three differentiable statistics."""

    def total(*arguments):
        stats = function(*arguments)
        return (stats.log_prob + stats.log_normalizer + stats.entropy).sum()

    return total


def plain_of_same_meaning(logits, targets):
    """What `cross_entropy` says of class indices, in a screen."""
    num_classes = logits.shape[-1]
    counted = targets != sides_of.IGNORE
    outside = counted & ((targets < 0) | (targets >= num_classes))
    index = jnp.where(counted & ~outside, targets, 0)[:, None]
    logits = jnp.where(counted[:, None], logits, 0)
    centred = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    left = jnp.take_along_axis(centred, index, -1)
    exps = jnp.where(index == jnp.arange(num_classes), 0, jnp.exp(centred))
    loss = jnp.log1p(exps.sum(-1, keepdims=True) + (jnp.exp(left) - 1)) - left
    loss = jnp.where(outside, jnp.nan, jnp.where(counted, loss[:, 0], 0))
    return loss.sum() / jnp.maximum(counted.sum(), 1)


def plain_stats(logits, targets):
    return sides_of.plain_stats(logits, targets).sum()


def all_options(logits, targets, weight):
    return jaxent.cross_entropy(logits, targets, weight=weight, **sides_of.OPTIONS)


def plain_nll(log_probs, targets):
    counted = targets != sides_of.IGNORE
    picked = sides_of.pick(log_probs, jnp.where(counted, targets, 0))
    return -jnp.mean(picked, where=counted)


def plain_total(targets, weight):
    counted = targets != sides_of.IGNORE
    return jnp.sum(jnp.where(counted, weight[jnp.where(counted, targets, 0)], 0))


FUNCTIONS = {  # arguments, and the sides
    "cross_entropy": (
        (LOGITS, TARGETS),
        {
            "jaxent": jaxent.cross_entropy,
            "plain": plain_of_same_meaning,
            "optax": mean_of(sides_of.optax_loss),
        },
    ),
    "cross_entropy, all options": (
        (LOGITS, TARGETS, WEIGHT),
        {"jaxent": all_options, "plain": mean_of(sides_of.plain_with_options)},
    ),
    "log_softmax": (
        (LOGITS,),
        {"jaxent": mean_of(jaxent.log_softmax), "plain": mean_of(jax.nn.log_softmax)},
    ),
    "nll": ((LOGITS, TARGETS), {"jaxent": jaxent.nll, "plain": plain_nll}),
    "total_weight": (
        (TARGETS, WEIGHT),
        {"jaxent": lambda y, weight: jaxent.total_weight(y, weight=weight), "plain": plain_total},
    ),
    "token_stats": (
        (LOGITS, TARGETS),
        {"jaxent": stats_sum(jaxent.token_stats), "plain": plain_stats},
    ),
    "linear_cross_entropy": (
        (HIDDEN, KERNEL, TARGETS),
        {"jaxent": jaxent.linear_cross_entropy, "optax": optax_head},
    ),
    "linear_token_stats": (
        (HIDDEN, KERNEL, TARGETS),
        {
            "jaxent": stats_sum(jaxent.linear_token_stats),
            "plain": lambda hidden, kernel, targets: plain_stats(hidden @ kernel, targets),
        },
    ),
}
TRAINED = {  # losses of hidden states, kernel and targets
    "cross_entropy": {
        "jaxent": lambda h, k, targets: jaxent.cross_entropy(h @ k, targets),
        "plain": lambda h, k, targets: plain_of_same_meaning(h @ k, targets),
        "optax": optax_head,
    },
    "linear_cross_entropy": {"jaxent": jaxent.linear_cross_entropy, "optax": optax_head},
}
IMPORTS = {"import jaxent": "jax, flax", "from jaxent import CrossEntropyLoss": "flax.nnx"}


def compile_anew(function, arguments):
    jax.clear_caches()
    jax.jit(function).lower(*arguments).compile()


def with_gradient(function, arguments):
    floats = [i for i, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jax.value_and_grad(function, argnums=floats)


OPTIMIZER = optax.adam(1e-3)
PARAMETERS = {"first": jax.ShapeDtypeStruct((WIDTH, WIDTH), "float32"), "second": KERNEL}
STEP_ARGUMENTS = (PARAMETERS, jax.eval_shape(OPTIMIZER.init, PARAMETERS), HIDDEN, TARGETS)


def training_step(loss):
    def step(parameters, state, x, targets):
        def of(parameters):
            return loss(jax.nn.relu(x @ parameters["first"]), parameters["second"], targets)

        value, gradients = jax.value_and_grad(of)(parameters)
        updates, state = OPTIMIZER.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, value

    return step


def compilations():
    """Function, what of it, and each side's run."""
    for name, (arguments, sides) in FUNCTIONS.items():
        yield name, "forward", {k: (f, arguments) for k, f in sides.items()}
        if name != "total_weight":
            both = {k: (with_gradient(f, arguments), arguments) for k, f in sides.items()}
            yield name, "with gradient", both
        if name in TRAINED:
            steps = {k: (training_step(f), STEP_ARGUMENTS) for k, f in TRAINED[name].items()}
            yield name, "training step", steps


def rows(options):
    jax.config.update("jax_enable_compilation_cache", False)
    for function, of, sides in compilations():
        row = Row({"function": function, "of": of}, {})
        if options.only in row.name:
            runs = {k: functools.partial(compile_anew, *run) for k, run in sides.items()}
            bound = 1.2 if function == "cross_entropy" else None
            yield measured(row, runs, options.reps, bound)
    for mine, modules in IMPORTS.items():
        row = Row({"function": mine, "of": f"plain: import {modules}"}, {})
        if options.only in row.name:
            lines = {"jaxent": mine, "plain": f"import {modules}"}
            commands = {k: [sys.executable, "-c", line] for k, line in lines.items()}
            runs = {
                k: functools.partial(subprocess.run, command, check=True)
                for k, command in commands.items()
            }
            yield measured(row, runs, options.reps, 1.1)


def measured(row, runs, reps, bound):
    row.values = interleaved(runs, reps, least=0)
    mine, other, *_ = (number(x) for x in row.values.values())
    if mine and other:
        row.score, row.bound = mine / other, bound
    return row
