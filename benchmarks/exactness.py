"""How exact: errors of losses and gradients, in roundings of their dtype.

Every side gets the same inputs, drawn and rounded to the dtype. Of up to 1000 classes, errors are
the median of five draws: the largest of one is a matter of which row cancels most. What is right is
computed by its formula in float64, for float64 inputs in NumPy's longdouble (80 bits on x86, no
wider than float64 on some machines). "Shifted" logits are 30 times a normal one
plus 10000, where a normalizer minus a logit cancels.

The error of a loss is the largest |found - right| / max(1, |right|) over the examples, in eps of
float32 (of float64 for float64 inputs), whatever dtype a side returns: that of the mean loss for
the head. Log-probabilities are by contract of the logits' dtype, and measured in its eps. The error
of a gradient, of the summed losses in the logits, is the largest of a row relative to the row's
largest right entry, in eps of the inputs' dtype: one that is rounded once has at most 0.5. The
head's gradients, in hidden states and kernel, are measured as whole arrays. "Confident" logits are
24 larger at the target, whose loss is 1e-10 for ten classes: there the error of each number is
relative to its own size, of which the difference of two such logits costs up to 12 roundings.
"""

import dataclasses
import itertools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from . import exactness_sides as sides_of
from .engine import Row, number, outcome
from .exactness_sides import torch

UNIT = "eps"
BOUND = "Score: jaxent's error less the smallest error of another side; at most 1."
SIDES = sides_of.SIDES
FUNCTIONS = tuple(sides_of.FUNCTIONS)
DTYPES = ("float32", "bfloat16", "float16", "float64")
CLASSES = (10, 1000, 32000, 128256, 262144)
LOGITS = {  # and the functions that get them
    "normal": FUNCTIONS,
    "shifted": ("cross_entropy", "log_softmax", "token_stats"),
    "confident": ("cross_entropy", "token_stats"),
}
WIDTH = 64  # of the head
DRAWS = 5  # of up to 1000 classes; else 1
LARGEST = 100_000  # classes, beyond which 16 examples do


@dataclasses.dataclass
class Problem:
    """Floats to differentiate, what else is given, and the cotangent of the output."""

    floats: tuple
    given: dict
    cotangent: np.ndarray


def draw(function, dtype, classes, kind, seed) -> Problem:
    """Inputs as NumPy arrays of the dtype."""
    random = np.random.default_rng(seed)
    examples = 16 if classes > LARGEST else 32
    logits = random.standard_normal((examples, classes))
    if kind == "shifted":
        logits = 30 * logits + 1e4
    targets = random.integers(0, classes, examples).astype("int32")
    if kind == "confident":
        logits[np.arange(examples), targets] += 24
    floats, given, cotangent = (logits,), {"targets": targets}, np.ones(examples)
    if function == "linear_cross_entropy":
        hidden = random.standard_normal((examples, WIDTH))
        floats = hidden, random.standard_normal((WIDTH, classes)) / WIDTH**0.5
        cotangent = np.ones(())
    elif function == "log_softmax":
        given, cotangent = {}, random.standard_normal(logits.shape)
    elif function == "token_stats":
        cotangent = np.ones((3, examples))
    elif function == "nll":
        floats = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)),)
        given["weight"] = random.uniform(0.5, 2, classes)
    elif function == "cross_entropy, all options":
        targets[::8] = sides_of.IGNORE
        given["weight"] = random.uniform(0.5, 2, classes)

    def rounded(x):
        return x if x.dtype == "int32" else x.astype(jnp.dtype(dtype))

    return Problem(
        tuple(map(rounded, floats)), {k: rounded(x) for k, x in given.items()}, rounded(cotangent)
    )


def by_jax(side, problem):
    """Output and gradients of a function of JAX arrays, as one compiled program."""

    @jax.jit
    def both(floats, given, cotangent):
        output, pull = jax.vjp(lambda *floats: side(*floats, **given), *floats)
        return output, pull(cotangent.astype(output.dtype))

    return both(*jax.tree.map(jnp.asarray, (problem.floats, problem.given, problem.cotangent)))


def by_torch(side, problem):
    def tensor(x):
        if x.dtype == "int32":
            return torch.tensor(x).long()
        return torch.tensor(x.astype("float64")).to(getattr(torch, str(x.dtype)))

    leaves = [tensor(x).requires_grad_() for x in problem.floats]
    output = side(*leaves, **{k: tensor(x) for k, x in problem.given.items()})
    gradients = torch.autograd.grad(output, leaves, tensor(problem.cotangent).to(output.dtype))
    return output.detach().double(), [x.double() for x in gradients]


def errors(run, side, problem, right, function, kind) -> dict[str, float]:
    """In eps: of the output, "loss" even where it is no loss, and of the gradients."""
    (output, gradients), (right_output, right_gradients) = run(side, problem), right
    dtype = problem.floats[0].dtype
    apart = abs(np.asarray(output, right_output.dtype) - right_output)
    confident = kind == "confident"
    smallest = float(jnp.finfo(dtype).smallest_normal / jnp.finfo(dtype).eps)
    loss = np.max(apart / np.maximum(smallest if confident else 1, abs(right_output)))
    gradient = 0
    for found, expected in zip(gradients, right_gradients):
        apart, size = abs(np.asarray(found, expected.dtype) - expected), abs(expected)
        if confident:
            size = np.maximum(size, smallest)
        else:
            axis = None if function == "linear_cross_entropy" else -1
            apart, size = apart.max(axis), size.max(axis)
        gradient = max(gradient, np.max(apart / np.where(size > 0, size, 1)))
    of_loss = dtype if function == "log_softmax" else jnp.promote_types(dtype, "float32")
    return {
        "loss": float(loss / float(jnp.finfo(of_loss).eps)),
        "gradient": float(gradient / float(jnp.finfo(dtype).eps)),
    }


def median_errors(function, dtype, classes, kind):
    """The median over draws of each side's errors, or the name of its exception."""
    seeds = range(DRAWS if classes <= 1000 else 1)
    found = [all_errors(function, dtype, classes, kind, seed) for seed in seeds]
    return {
        side: first if isinstance(first, str) else jax.tree.map(median, *(x[side] for x in found))
        for side, first in found[0].items()
    }


def median(*errors):
    return statistics.median(errors)


def all_errors(function, dtype, classes, kind, seed):
    """Of each side its errors by what they are of, or the name of its exception."""
    problem = draw(function, dtype, classes, kind, seed)
    of = sides_of.FUNCTIONS[function]
    wide = np.longdouble if dtype == "float64" else np.float64

    def widened(x):
        return x if x.dtype == "int32" else x.astype(wide)

    right = of.exact(
        *map(widened, problem.floats),
        **{k: widened(x) for k, x in problem.given.items()},
        **({"cotangent": widened(problem.cotangent)} if function == "log_softmax" else {}),
    )
    found = {}
    for name, side in of.sides.items():
        if name == "optax on float32" and dtype in ("float32", "float64"):
            continue  # it is optax
        run = by_torch if name == "torch" else by_jax
        found[name] = outcome(errors, run, side, problem, right, function, kind)
    return found


def rows(options):
    for function, dtype, kind, classes in itertools.product(FUNCTIONS, DTYPES, LOGITS, CLASSES):
        if function not in LOGITS[kind] or (kind != "normal" and dtype != "float32"):
            continue
        case = {"function": function, "dtype": dtype, "logits": kind, "classes": classes}
        chosen = [Row(case | {"of": of}, {}) for of in ("loss", "gradient")]
        chosen = [row for row in chosen if options.only in row.name]
        if not chosen:
            continue
        with jax.enable_x64(dtype == "float64"):
            found = median_errors(function, dtype, classes, kind)
        for row in chosen:
            of = row.case["of"]
            row.values = {k: x if isinstance(x, str) else x[of] for k, x in found.items()}
            figures = {k: x for k, x in row.values.items() if number(x) is not None}
            if "jaxent" in figures and len(figures) > 1:
                mine = figures.pop("jaxent")
                row.score, row.bound = mine - min(figures.values()), 1.0
            yield row
