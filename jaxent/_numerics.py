"""The rules that keep 0 * inf out of values and gradients.

| factor | value | `safe_multiply` | `factor * blank_uncounted(factor, value)` |
| --- | --- | --- | --- |
| 0 | finite | 0 | 0 |
| 0 | inf, -inf | 0, derivatives 0 | 0, derivatives 0 |
| 0 | NaN | NaN: it shows | 0: nobody asked for it |
| other | any | the product | the product |

`safe_multiply` is for what is counted, `blank_uncounted` for what a weight of 0 leaves out. Neither
makes a NaN on the way, which `jax_debug_nans` would report.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def compute_dtype(*arrays: Any) -> Any:
    """Return float64 if one has dtype float64, else float32."""
    return jnp.dtype("float64" if any(x.dtype == jnp.float64 for x in arrays) else "float32")


def widened_dtype(x: Any) -> Any:
    """Return its dtype, but bfloat16 for float8: it has all values, and promotes to others."""
    return jnp.dtype("bfloat16") if jnp.finfo(x.dtype).bits == 8 else x.dtype


def safe_value(factor: Any, value: Any) -> Array:
    """Return `value`, but 0 where `factor` is 0 and `value` infinite.

    So 0 * inf is 0, and 0 * NaN is NaN.
    """
    return jnp.where((factor == 0) & jnp.isinf(value), 0, value)


def safe_multiply(factor: Any, value: Any) -> Array:
    """Return `factor * value`, and 0 with derivatives 0 where that would be 0 * inf."""
    product: Array = factor * safe_value(factor, value)
    return product


def blank_uncounted(weight: Any, value: Any) -> Array:
    """Return `value`, but 0 where `weight` is 0 and `value` is not finite, NaN included."""
    return jnp.where((weight == 0) & ~jnp.isfinite(value), 0, value)


def nan_where(condition: Any, dtype: Any) -> Array:
    """Return NaN where the condition holds, else 0, to be added: the root of -1 or 0.

    There is no literal NaN in it: with jit off, `jax_debug_nans` judges each operation, and a
    select that does not take its NaN would be reported as one that does.
    """
    return jax.lax.sqrt(-jnp.asarray(condition, dtype))


@jax.custom_jvp
def finite_exp(x: Array) -> Array:
    """Return exp(x), whose derivative is 0 where it is not finite."""
    return jnp.exp(x)


@finite_exp.defjvp
def _finite_exp_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    exp = finite_exp(*primals)
    return exp, jnp.where(jnp.isfinite(exp), exp, 0) * tangents[0]
