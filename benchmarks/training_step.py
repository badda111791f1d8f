"""A training step of a language model, by its loss: ms a step, and MB that it holds at most.

The model and the optimizer are those of examples/language_model.py, on its text, and a step is
forward pass, backward pass and update, with donated buffers, on JAX's default device. Hidden
states and the tied table are cast to the head's dtype in front of the loss, and every target
counts. MB are XLA's count of the compiled step: arguments + outputs - outputs in an argument's
buffer + temporaries. Beside the score are the tokens a second.
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxent

from .engine import Row, interleaved, number, outcome
from .exactness_sides import INSTALLED, jax_cce, tokamax

UNIT = "ms"
SIDES = ("jaxent head", "jaxent dense", "optax", "optax on float32", "tokamax", "jax-cce")
BOUND = "Score: the jaxent head's figure divided by the smallest. MB rows are in MB."
DTYPES = ("float32", "bfloat16")
# Rows, length and width: with the first, a step on two CPU cores is some half a second.
SIZES = {"cpu": (2, 256, 64), "gpu": (8, 1024, 1024), "tpu": (8, 1024, 1024)}
EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "language_model.py"


def optax_loss(hidden, table, targets, dtype=None):
    logits = hidden @ table.T
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(dtype or logits.dtype), targets
    ).mean()


def dense(hidden, table, targets):
    return jaxent.cross_entropy(hidden @ table.T, targets, axis=-1)


def tokamax_loss(hidden, table, targets):
    return tokamax.linear_softmax_cross_entropy_loss(
        flat(hidden), targets.ravel(), table.T, reduction="mean"
    )


def cce_loss(hidden, table, targets):
    return jax_cce.linear_cross_entropy(flat(hidden), table, targets.ravel())


def flat(hidden):
    return hidden.reshape(-1, hidden.shape[-1])


LOSSES = {
    "jaxent head": functools.partial(jaxent.linear_cross_entropy, class_axis=0),
    "jaxent dense": dense,
    "optax": optax_loss,
    "optax on float32": functools.partial(optax_loss, dtype=jnp.float32),
    "tokamax": tokamax_loss,
    "jax-cce": cce_loss,
}


def load_example(size):
    """The example as a module, with this length and width."""
    spec = importlib.util.spec_from_file_location("language_model", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    _, example.LENGTH, example.WIDTH = size
    return example


def train_step(loss, dtype, model, optimizer, rows):
    inputs, targets = rows[:, :-1], rows[:, 1:]

    def of(model):
        table = model.embed.embedding[...]
        return loss(model(inputs).astype(dtype), table.astype(dtype), targets)

    value, gradients = nnx.value_and_grad(of)(model)
    optimizer.update(model, gradients)
    return value


class Step:
    """A compiled step, with a model and an optimizer of its own; a call makes it once."""

    def __init__(self, example, loss, dtype, rows):
        self.model, self.optimizer = example.create()
        self.rows = rows
        step = nnx.jit(functools.partial(train_step, loss, dtype), donate_argnums=(0, 1))
        self.compiled = step.lower(self.model, self.optimizer, rows).compile()

    def __call__(self):
        value = self.compiled(self.model, self.optimizer, self.rows)
        return jax.block_until_ready((value, nnx.state((self.model, self.optimizer))))

    def megabytes(self):
        found = self.compiled.memory_analysis()
        held = found.argument_size_in_bytes + found.output_size_in_bytes
        return (held - found.alias_size_in_bytes + found.temp_size_in_bytes) / 1e6


def compiled_steps(example, size, dtype):
    """Of each side that is installed its step, or the name of its exception."""
    rows = jnp.asarray(example.pack(example.read_files(), size[0]))
    return {
        side: outcome(Step, example, loss, dtype, rows)
        for side, loss in LOSSES.items()
        if INSTALLED.get(side, True) and not (side == "optax on float32" and dtype == "float32")
    }


def ratio(values):
    figures = [x for x in map(number, values.values()) if x is not None]
    mine = number(values["jaxent head"])
    return None if mine is None else mine / min(figures)


def rows(options):
    size = SIZES.get(jax.default_backend(), SIZES["gpu"])
    example, tokens = load_example(size), size[0] * size[1]
    for dtype in DTYPES:
        case = {"head's dtype": dtype, "tokens": tokens, "width": size[2]}
        time, memory = (Row(case | {"of": of}, {}) for of in ("ms a step", "peak MB"))
        if options.only not in time.name and options.only not in memory.name:
            continue
        steps = compiled_steps(example, size, dtype)
        failed = {k: x for k, x in steps.items() if isinstance(x, str)}
        alive = {k: x for k, x in steps.items() if k not in failed}
        if options.only in time.name:
            time.values = failed | interleaved(alive, options.reps)
            speeds = {k: number(x) for k, x in time.values.items() if number(x)}
            time.notes = "tokens/s: " + ", ".join(
                f"{k} {tokens / seconds:.0f}" for k, seconds in speeds.items()
            )
            time.score = ratio(time.values)
            yield time
        if options.only in memory.name:
            memory.values = failed | {k: outcome(x.megabytes) for k, x in alive.items()}
            memory.score = ratio(memory.values)
            yield memory
