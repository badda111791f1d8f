"""What a call costs: eager, jitted, and in a training step of many parameter arrays.

A loss of few numbers takes as long as its dispatch. Eager calls are those of a notebook; a step
has 50 or 500 small parameter arrays and plain gradient descent, as its dispatch passes them all.
optax is its loss of class indices, behind `hidden @ kernel` for the head, of smoothed one-hot
labels for the object, and the formulas in `jax.numpy` for the statistics.
"""

import jax
import jax.numpy as jnp
import optax

import jaxent

from . import exactness_sides as sides_of
from .engine import Row, interleaved, number

UNIT = "ms"
SIDES = ("jaxent", "optax")
BOUND = (
    "Score: jaxent's time divided by optax's; at most 1.5 for jitted losses, 1.2 for steps, 1 for "
    "eager losses, 2 for the eager head and statistics."
)
SHAPES = ((8, 10), (128, 10), (128, 100), (32, 1000))
PARAMETERS = (50, 500)
TOKENS, WIDTH, CLASSES = 128, 64, 1000


def optax_loss(logits, targets):
    return sides_of.optax_loss(logits, targets).mean()


def optax_smoothed(logits, targets):
    labels = optax.smooth_labels(jax.nn.one_hot(targets, logits.shape[-1]), 0.1)
    return optax.softmax_cross_entropy(logits, labels).mean()


def optax_head(hidden, kernel, targets):
    return optax_loss(hidden @ kernel, targets)


def plain_stats(logits, targets):
    log_probs = jax.nn.log_softmax(logits)
    prediction = jnp.argmax(logits, -1)
    return (
        jnp.take_along_axis(log_probs, targets[:, None], -1)[:, 0],
        jax.nn.logsumexp(logits, -1),
        -jnp.sum(jnp.exp(log_probs) * log_probs, -1),
        prediction,
        prediction == targets,
    )


def draw(*shape):
    return jax.random.normal(jax.random.key(0), shape), jnp.arange(shape[0]) % shape[-1]


def training_step(loss, count):
    """A step and its arguments: gradient descent on many small arrays, of which logits are made."""
    logits, targets = draw(8, 10)

    def step(parameters, targets):
        def of(parameters):
            return loss(logits + sum(p[0] for p in parameters.values()), targets)

        value, gradients = jax.value_and_grad(of)(parameters)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradients)

    return jax.jit(step), ({f"p{i}": jnp.ones(10) for i in range(count)}, targets)


def calls():
    """A name, a bound, and each side's function and arguments."""
    losses = {"jaxent": jaxent.cross_entropy, "optax": optax_loss}
    for shape in SHAPES:
        arguments = draw(*shape)
        for name, transform in (("", lambda f: f), (", with gradient", jax.value_and_grad)):
            sides = {side: (jax.jit(transform(f)), arguments) for side, f in losses.items()}
            yield f"jitted loss of {shape}{name}", 1.5, sides
    for count in PARAMETERS:
        sides = {side: training_step(f, count) for side, f in losses.items()}
        yield f"jitted step, {count} arrays", 1.2, sides
    small = draw(128, 10)
    objects = {"jaxent": jaxent.CrossEntropyLoss(label_smoothing=0.1), "optax": optax_smoothed}
    yield "eager loss", 1.0, {side: (f, small) for side, f in losses.items()}
    yield "eager object, smoothing", 1.0, {side: (f, small) for side, f in objects.items()}
    gradients = {side: (jax.value_and_grad(f), small) for side, f in losses.items()}
    yield "eager gradient", 1.0, gradients
    hidden, targets = draw(TOKENS, WIDTH)
    kernel = draw(WIDTH, CLASSES)[0]
    heads = {"jaxent": jaxent.linear_cross_entropy, "optax": optax_head}
    yield "eager head", 2.0, {side: (f, (hidden, kernel, targets)) for side, f in heads.items()}
    stats = {"jaxent": jaxent.token_stats, "optax": plain_stats}
    yield "eager statistics", 2.0, {side: (f, small) for side, f in stats.items()}


def rows(options):
    for name, bound, sides in calls():
        row = Row({"call": name}, {})
        if options.only in row.name:
            runs = {
                side: _run(function, arguments) for side, (function, arguments) in sides.items()
            }
            row.values = interleaved(runs, options.reps)
            mine, other = (number(row.values[side]) for side in SIDES)
            if mine and other:
                row.score, row.bound = mine / other, bound
            yield row


def _run(function, arguments):
    return lambda: jax.block_until_ready(function(*arguments))
