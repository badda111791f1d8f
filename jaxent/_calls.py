"""What every public function does around its formula: compile it once, and explain a wrong call."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp

P = ParamSpec("P")
R = TypeVar("R")

# What optax, PyTorch and others call it, and what jaxent does.
OTHERS_NAMES = {
    "input": "logits",
    "inputs": "logits",
    "y_pred": "logits",
    "log_probabilities": "log_probs",
    "target": "targets",
    "labels": "targets",
    "label": "targets",
    "y_true": "targets",
    "where": "sample_weight (a bool array will do), or class_mask for classes",
    "mask": "sample_weight (a bool array will do), or class_mask for classes",
    "weights": "weight for classes, sample_weight for examples",
    "class_weight": "weight",
    "class_weights": "weight",
    "sample_weights": "sample_weight",
    "dim": "axis",
    "ignore_id": "ignore_index",
    "pad_id": "ignore_index",
    "smoothing": "label_smoothing",
    "smooth": "label_smoothing",
    "size_average": "reduction (jaxent.porting.legacy_reduction says which)",
    "reduce": "reduction (jaxent.porting.legacy_reduction says which)",
    "logit_softcap": "softcap",
    "lse_square_scale": "z_loss",
    "features": "hidden",
    "x": "hidden",
    "w": "kernel",
    "embedding": "kernel, with class_axis=0",
    "linear_weight": "kernel, with class_axis=0",
}


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile one program for each first argument, which is static; part of the program around it.

    Eagerly, a second call like the first is a look-up, and so is its gradient. (With `inline=True`,
    jax 0.10 would run the gradient's operations one by one, and compile its loops each time.)
    """

    @functools.wraps(function)
    def run(options: Any, *arrays: Any) -> R:
        # With jax_disable_jit, NumPy arrays come here as they are.
        untyped: Callable[..., R] = function
        return untyped(options, *jax.tree.map(jnp.asarray, arrays))

    return cast(Callable[P, R], jax.jit(run, static_argnums=0))


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Explain the wrong calls of a function. A right call passes through."""

    @functools.wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        try:
            return function(*args, **keywords)
        except (TypeError, AttributeError) as error:
            message = _wrong_call(function, args, keywords) or _forward_mode(function, error)
            if message is None:
                raise
        raise TypeError(message)

    return call


def _wrong_call(function: Callable[..., Any], args: Any, keywords: Any) -> str | None:
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **keywords)
    except TypeError as error:
        name = f"jaxent.{function.__qualname__}"
        unknown = [k for k in keywords if k not in signature.parameters]
        hints = [
            f"{k} is called {_ours(k, signature)} here" for k in unknown if _ours(k, signature)
        ]
        by_position, others = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_KEYWORD
        kinds = {k: p.kind for k, p in signature.parameters.items() if k != "self"}
        positional = [k for k, kind in kinds.items() if kind == by_position]
        if len(args) > len(positional) + ("self" in signature.parameters):
            taken = f"only {', '.join(positional)} are" if positional else "nothing is"
            hints.append(
                f"{taken} taken by position, and the rest by name (weight=..., reduction=...)"
            )
        named = [k for k, kind in kinds.items() if kind != others]
        hint = "; ".join(hints) or f"its arguments are {', '.join(named)}"
        if unknown and not hints and unknown[0] not in str(error) and others not in kinds.values():
            hint = f"it has no argument {', '.join(unknown)}; {hint}"
        return f"{name}: {error}; {hint}"
    return None


def _ours(name: str, signature: inspect.Signature) -> str | None:
    """Return our name for it, where the function has one."""
    other = OTHERS_NAMES.get(name)
    if other is None or other.split(" ")[0].strip(",") not in signature.parameters:
        return None
    return other


def _forward_mode(function: Callable[..., Any], error: Exception) -> str | None:
    # The second is jax.experimental.jet's, of which the error says nothing.
    if "to a custom_vjp function" not in str(error) and "'process_primitive'" not in str(error):
        return None
    return (
        f"jaxent.{function.__name__} has a hand-written gradient, which forward mode (jvp, jacfwd, "
        f"jet) cannot use: take jaxent.reference.{function.__name__}, of the same signature"
    )
