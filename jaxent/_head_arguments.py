"""Checks of a head's arguments: hidden states, kernel, bias, and the product of the two."""

import functools
import inspect
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._arguments import (
    DotGeneral,
    describe,
    describe_pair,
    describe_static,
    is_float,
    read_array,
    read_positive,
    read_real,
)
from ._numerics import compute_dtype, widened_dtype
from ._sparse import SparseTargets


def read_hidden_and_kernel(
    hidden: Any, kernel: Any, class_axis: Any, dtype: Any, num_shards: int
) -> tuple[Any, Any, int, Any]:
    """Return both, the class axis as 0 or 1, and the dtype of their product.

    `num_shards` is the number of parts of the kernel's width.
    """
    hidden, kernel = read_array("hidden", hidden), read_array("kernel", kernel)
    shapes = describe_pair("hidden", hidden, "kernel", kernel)
    if not (is_float(hidden) and is_float(kernel)):
        swapped = hidden.ndim + 1 == kernel.ndim if is_float(kernel) else kernel.ndim != 2
        hint = "; the order of arguments is hidden, kernel, targets" if swapped else ""
        raise TypeError(f"{shapes}: both must be float arrays{hint}")
    for name, array in (("hidden", hidden), ("kernel", kernel)):
        if jnp.finfo(array.dtype).bits < 8:
            raise TypeError(f"{shapes}: pass {name}.astype(jnp.bfloat16), or another wider dtype")
    class_axis = read_kernel_axis(class_axis) % 2
    if hidden.ndim == 0 or kernel.ndim != 2:
        raise ValueError(f"{shapes}: they must be (..., D) and (D, C), or (C, D) with class_axis=0")
    width, other = hidden.shape[-1], kernel.shape[1 - class_axis]
    if width != other * num_shards:
        hint = "" if num_shards == 1 else f" over {num_shards} shards of width_axis_name"
        if width == kernel.shape[class_axis] * num_shards:
            hint += f"; if its classes are on the other axis, pass class_axis={class_axis - 1}"
        wanted = f"[{width}, C]" if class_axis else f"[C, {width}]"
        raise ValueError(f"{shapes}: the kernel must be {wanted}{hint}")
    if kernel.shape[class_axis] == 0:
        raise ValueError(f"{shapes}: there are no classes along its axis {class_axis}")
    if width == 0:
        raise ValueError(f"{shapes}: the hidden states have no features, D is 0")
    promoted = jnp.result_type(widened_dtype(hidden), widened_dtype(kernel))
    return hidden, kernel, class_axis, read_dtype(dtype) or promoted


def read_kernel_axis(class_axis: Any) -> int:
    if not isinstance(class_axis, (int, np.integer)) or class_axis not in (-2, -1, 0, 1):
        raise ValueError(
            "class_axis must be -1, for a (D, C) kernel, or 0, got "
            f"{describe_static('class_axis', class_axis)}"
        )
    return int(class_axis)


def read_dtype(dtype: Any) -> Any:
    if dtype is None:
        return None
    read: Any = None
    try:
        if isinstance(dtype, (jax.Array, np.ndarray, np.generic)):
            raise TypeError
        read = jnp.dtype(dtype)
        wide_enough = jnp.issubdtype(read, jnp.floating) and jnp.finfo(read).bits >= 16
    except (TypeError, ValueError):
        wide_enough = False
    if not wide_enough:
        got = str(dtype) if isinstance(dtype, (np.dtype, type)) else describe(dtype)
        raise TypeError(f"dtype must be a float type of 16 bits or more, or None, got {got}")
    return jax.dtypes.canonicalize_dtype(read)


def read_precision(precision: Any, dtype: Any = jnp.float32) -> Any:
    """Return a precision that `jax.lax.dot_general` takes, in a form that can be hashed."""
    if isinstance(precision, list):
        precision = tuple(precision)
    try:
        _try_precision(precision, dtype)
    except (TypeError, ValueError) as error:
        raise type(error)(
            "precision must be one that jax.lax.dot_general takes for "
            f"{jnp.dtype(dtype)}, got {describe(precision)}"
        ) from None
    return precision


@functools.lru_cache
def _try_precision(precision: Any, dtype: Any) -> None:
    one = jax.ShapeDtypeStruct((1, 1), dtype)
    jax.eval_shape(lambda a, b: jax.lax.dot(a, b, precision=precision), one, one)


def read_dot_general(dot_general: Any) -> DotGeneral | None:
    """Return a function that is called as `jax.lax.dot_general` and can be static; None for it."""
    if dot_general is None or dot_general is jax.lax.dot_general:
        return None
    got = describe(dot_general)
    if not callable(dot_general):
        raise TypeError(f"dot_general must be a function like jax.lax.dot_general, got {got}")
    own, held = jax.tree.leaves(dot_general), jax.tree.leaves(_closed_over(dot_general))
    arrays = (jax.Array, np.ndarray)
    if any(isinstance(x, arrays) for x in own) or any(isinstance(x, Tracer) for x in held):
        raise TypeError(
            f"dot_general must be static, without arrays or traced values of its own, got {got}; "
            "let it compute scales from its operands, or from constants"
        )
    try:
        hash(dot_general)
        keywords = {"precision": None, "preferred_element_type": None}
        inspect.signature(dot_general).bind(None, None, None, **keywords)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "dot_general must be hashable, and take (lhs, rhs, dimension_numbers, precision=..., "
            f"preferred_element_type=...) as jax.lax.dot_general does, got {got}: {error}"
        ) from None
    return cast(DotGeneral, dot_general)


def _closed_over(function: Any) -> list[Any]:
    """Return what a function or a partial one holds."""
    if isinstance(function, functools.partial):
        return [function.args, function.keywords, _closed_over(function.func)]
    cells = getattr(function, "__closure__", None) or ()
    return [cell.cell_contents for cell in cells]


def read_product(
    hidden: Any, kernel: Any, class_axis: int, dtype: Any, precision: Any, dot_general: Any
) -> tuple[Any, DotGeneral | None]:
    """Return precision and dot_general of a product of hidden and kernel in this dtype."""
    precision, dot_general = read_precision(precision, dtype), read_dot_general(dot_general)
    if dot_general is None:
        return precision, None
    width, num_classes = hidden.shape[-1], kernel.shape[class_axis]
    product = _try_product(dot_general, class_axis, width, num_classes, dtype, precision)
    if getattr(product, "shape", None) != (1, num_classes) or not is_float(product):
        raise TypeError(
            f"dot_general must return a float array, [1, {num_classes}] for hidden "
            f"[1, {width}] and this kernel, got {describe(product)}"
        )
    return precision, dot_general


@functools.lru_cache
def _try_product(
    dot_general: DotGeneral, axis: int, width: int, num_classes: int, dtype: Any, precision: Any
) -> Any:
    shapes = (1, width), (width, num_classes) if axis == 1 else (num_classes, width)
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    dimensions = (((1,), (1 - axis,)), ((), ()))
    keywords = {"precision": precision, "preferred_element_type": compute_dtype(*operands)}
    return jax.eval_shape(lambda a, b: dot_general(a, b, dimensions, **keywords), *operands)


def check_head_targets(targets: Any, hidden: Any, num_classes: int) -> None:
    shape = hidden.shape[:-1]
    if isinstance(targets, SparseTargets):
        indices: Any = targets.indices
        if indices.shape[:-1] != shape:
            raise ValueError(
                f"{describe_pair('hidden', hidden, 'targets.indices', indices)}: they must be "
                f"{[*shape]} and K, the number of classes of each"
            )
        return
    shapes = f"hidden is {list(hidden.shape)}, targets {describe(targets)}"
    if is_float(targets):
        if targets.shape != (*shape, num_classes):
            raise ValueError(
                f"{shapes}: float targets are class probabilities and must be "
                f"{[*shape, num_classes]}; class indices need an integer dtype"
            )
    elif targets.shape != shape:
        raise ValueError(f"{shapes}: class indices must be {list(shape)}")


def read_bias(bias: Any, num_classes: int) -> Any:
    if bias is None:
        return None
    bias = read_real("bias", bias)
    if bias.shape != (num_classes,):
        raise ValueError(f"bias is {list(bias.shape)}: it must be [{num_classes}]")
    return bias


def read_chunk_size(chunk_size: Any) -> int | None:
    if chunk_size is None:
        return None
    return read_positive("chunk_size", chunk_size, "a positive integer or None")
