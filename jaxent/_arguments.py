"""The arguments, checked: everything that can be refused while tracing is refused here.

Every public function says the same thing in the same words: the argument's name, the
shapes, and what to pass.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._axes import num_shards, read_axis_names

ArrayOrList = ArrayLike | Sequence[Any]

REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")


def _as_array(name: str, value) -> Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array or a number, got {value!r}") from None


def read_logits(logits, name: str) -> Array:
    logits = _as_array(name, logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be a float array, got {logits.dtype}{list(logits.shape)}; "
            f"the order of arguments is {name}, targets"
        )
    if logits.ndim == 0:
        raise ValueError(f"{name} must have a class axis, got a scalar")
    return logits


def read_targets(targets) -> Array:
    """Targets; integers of fewer than 32 bits widened, so that all numbers compare."""
    targets = _as_array("targets", targets)
    if jnp.issubdtype(targets.dtype, jnp.integer):
        return targets.astype(jnp.int32) if jnp.iinfo(targets.dtype).bits < 32 else targets
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        raise TypeError(
            "targets must be integer class indices or float class probabilities, got "
            f"{targets.dtype}{list(targets.shape)}"
        )
    return targets


def read_index_targets(
    targets,
    wanted: str = "total_weight counts class indices; for class probabilities the mean divides "
    "by the sum of sample weights",
) -> Array:
    targets = read_targets(targets)
    if jnp.issubdtype(targets.dtype, jnp.floating):
        raise TypeError(f"targets are {targets.dtype}{list(targets.shape)}: {wanted}")
    return targets


def check_axis(axis) -> None:
    if not isinstance(axis, (int, np.integer)):
        raise TypeError(f"axis must be an integer, got {axis!r}")


def read_axis(axis, ndim: int, name: str) -> int:
    check_axis(axis)
    if ndim == 1 and axis == 1:  # PyTorch's class axis, of one example
        return 0
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis={axis} is out of range for {name} of {ndim} dimensions")
    return axis % ndim


def read_class_axis(axis, logits: Array, targets: Array, name: str) -> int:
    """The class axis, given or read off the shapes; never guessed."""
    shape, ndim = logits.shape, logits.ndim
    shapes = f"{name} are {list(shape)}, targets {targets.dtype}{list(targets.shape)}"
    # Read off the shapes, it is PyTorch's 1 or JAX's -1; of 1-D logits it is 0.
    likely = sorted({min(1, ndim - 1), ndim - 1})
    axes = likely if axis is None else [read_axis(axis, ndim, name)]
    if jnp.issubdtype(targets.dtype, jnp.floating):
        if targets.shape != shape:
            raise ValueError(
                f"{shapes}: float targets are class probabilities and need the shape of the "
                f"{name}; class indices need an integer dtype"
            )
    elif targets.shape == shape:
        raise ValueError(
            f"{shapes}: class indices have no class axis; if these are one-hot or "
            f"probabilities, pass floats: targets.astype({name}.dtype)"
        )
    else:
        lacking = {a: shape[:a] + shape[a + 1 :] for a in axes}
        axes = [a for a in axes if lacking[a] == targets.shape]
        if not axes:
            wanted = " or ".join(f"{list(s)} (axis={a})" for a, s in lacking.items())
            raise ValueError(
                f"{shapes}: class indices must be {wanted}, the shape of the {name} without "
                "the class axis; if that is another axis, pass axis"
            )
    if len(axes) == 2:
        raise ValueError(
            f"{shapes}: the class axis could be 1 or -1; pass axis=1 (PyTorch's "
            "(N, C, d1..dK)) or axis=-1 ((..., C))"
        )
    if shape[axes[0]] == 0:
        raise ValueError(f"{shapes}: there are no classes along axis {axes[0]}")
    return axes[0]


def check_class_mask(class_mask) -> None:
    if (dtype := _as_array("class_mask", class_mask).dtype) != jnp.bool:
        raise TypeError(f"class_mask is {dtype}: it must be bool, True for the classes that exist")


def read_class_mask(class_mask, logits: Array, axis: int, name: str) -> Array | None:
    """Which classes exist, as a table (1, C, 1, ...) or of the logits' shape."""
    if class_mask is None:
        return None
    check_class_mask(class_mask)
    class_mask = jnp.asarray(class_mask)
    table = tuple(size if i == axis else 1 for i, size in enumerate(logits.shape))
    got = f"class_mask is {class_mask.dtype}{list(class_mask.shape)}, {name} {list(logits.shape)}"
    if class_mask.shape in [(logits.shape[axis],), table]:
        return class_mask.reshape(table)
    if class_mask.ndim != logits.ndim or not _broadcasts(class_mask.shape, logits.shape):
        raise ValueError(
            f"{got}: it must be [{logits.shape[axis]}], one value a class, or have "
            f"{logits.ndim} dimensions and broadcast to the {name}"
        )
    return jnp.broadcast_to(class_mask, logits.shape)


def read_weight(weight, num_classes: int | None, dtype=jnp.float32) -> Array | None:
    """Class weights, (C,); `num_classes` None leaves their number open."""
    if weight is None:
        return None
    weight = _as_array("weight", weight)
    length = "C" if num_classes is None else num_classes
    if weight.ndim != 1 or num_classes not in (None, weight.size):
        raise ValueError(
            f"weight is {list(weight.shape)}: it must be [{length}], one number a class"
        )
    return _real("weight", weight, dtype)


def read_sample_weight(sample_weight, shape: tuple[int, ...], dtype) -> Array:
    """Sample weights of the per-example shape; ones if None."""
    if sample_weight is None:
        return jnp.ones(shape, dtype)
    sample_weight = _as_array("sample_weight", sample_weight)
    if not _broadcasts(sample_weight.shape, shape):
        raise ValueError(
            f"sample_weight is {list(sample_weight.shape)}: it must broadcast to {list(shape)}, "
            "one number an example"
        )
    return jnp.broadcast_to(_real("sample_weight", sample_weight, dtype), shape)


def read_ignore_index(ignore_index, targets: Array | None = None) -> int | None:
    if ignore_index is None:
        return None
    try:
        ignore_index = operator.index(ignore_index)
    except (TypeError, jax.errors.JAXTypeError):
        raise TypeError(
            f"ignore_index must be a Python integer or None, got {ignore_index!r}; for a mask "
            "that is computed, pass sample_weight"
        ) from None
    probabilities = targets is not None and jnp.issubdtype(targets.dtype, jnp.floating)
    if probabilities and ignore_index >= 0:
        raise ValueError(
            f"ignore_index={ignore_index} has no meaning for class probabilities: give those "
            "examples a sample_weight of 0, and leave ignore_index negative or None"
        )
    return ignore_index


def read_label_smoothing(label_smoothing, dtype=jnp.float32) -> Array | None:
    """A scalar array, or None for a Python 0. A traced value outside [0, 1] becomes NaN."""
    smoothing = _read_coefficient("label_smoothing", label_smoothing, dtype, 0, 1)
    if smoothing is None:
        return None
    return jnp.where((smoothing >= 0) & (smoothing <= 1), smoothing, jnp.nan)


def read_z_loss(z_loss, dtype=jnp.float32) -> Array | None:
    return _read_coefficient("z_loss", z_loss, dtype, -math.inf, math.inf)


def _read_coefficient(name: str, value, dtype, low, high) -> Array | None:
    """A scalar array, or None for a Python 0; Python numbers are range-checked."""
    if isinstance(value, (int, float, np.generic)) or (
        type(value) is np.ndarray and value.ndim == 0
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
        if value == 0:
            return None
    value = _as_array(name, value)
    if value.ndim != 0:
        raise ValueError(f"{name} must be a scalar, got {value.dtype}{list(value.shape)}")
    return _real(name, value, dtype)


def read_softcap(softcap) -> float | None:
    if softcap is None:
        return None
    if not isinstance(softcap, (int, float, np.number)) or not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a positive Python number or None, got {softcap!r}")
    return float(softcap)


def _real(name, array, dtype):
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be real, got {array.dtype}{list(array.shape)}")
    return array.astype(dtype)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return jnp.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def read_hidden_and_kernel(hidden, kernel, class_axis, dtype, width_axis_name=None):
    """Both, the class axis as 0 or 1, and the dtype of their product."""
    hidden, kernel = _as_array("hidden", hidden), _as_array("kernel", kernel)
    shapes = f"hidden is {hidden.dtype}{list(hidden.shape)}, kernel {kernel.dtype}"
    shapes += f"{list(kernel.shape)}"
    for array in (hidden, kernel):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{shapes}: both must be float arrays; the order of arguments is hidden, "
                "kernel, targets"
            )
    class_axis = read_kernel_axis(class_axis) % 2
    if hidden.ndim == 0 or kernel.ndim != 2:
        raise ValueError(f"{shapes}: they must be (..., D) and (D, C), or (C, D) with class_axis=0")
    (names,) = read_axis_names(hidden, kernel, width_axis_name=width_axis_name)
    width, other, shards = hidden.shape[-1], kernel.shape[1 - class_axis], num_shards(names)
    if width != other * shards:
        hint = "" if shards == 1 else f" over {shards} shards of width_axis_name"
        if width == kernel.shape[class_axis] * shards:
            hint += f"; if its classes are on the other axis, pass class_axis={class_axis - 1}"
        wanted = f"[{width}, C]" if class_axis else f"[C, {width}]"
        raise ValueError(f"{shapes}: the kernel must be {wanted}{hint}")
    if kernel.shape[class_axis] == 0:
        raise ValueError(f"{shapes}: there are no classes along its axis {class_axis}")
    return hidden, kernel, class_axis, read_dtype(dtype) or jnp.result_type(hidden, kernel)


def read_kernel_axis(class_axis) -> int:
    if not isinstance(class_axis, (int, np.integer)) or class_axis not in (-2, -1, 0, 1):
        raise ValueError(f"class_axis must be -1, for a (D, C) kernel, or 0, got {class_axis!r}")
    return int(class_axis)


def read_dtype(dtype):
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a float type or None, got {dtype!r}")
    return None if dtype is None else jnp.dtype(dtype)


def read_head_targets(targets, hidden: Array, num_classes: int) -> Array:
    targets = read_targets(targets)
    shape = hidden.shape[:-1]
    shapes = f"hidden is {list(hidden.shape)}, targets {targets.dtype}{list(targets.shape)}"
    if jnp.issubdtype(targets.dtype, jnp.floating):
        if targets.shape != (*shape, num_classes):
            raise ValueError(
                f"{shapes}: float targets are class probabilities and must be "
                f"{[*shape, num_classes]}; class indices need an integer dtype"
            )
    elif targets.shape != shape:
        raise ValueError(f"{shapes}: class indices must be {list(shape)}")
    return targets


def read_bias(bias, num_classes: int, dtype) -> Array | None:
    if bias is None:
        return None
    bias = _as_array("bias", bias)
    if bias.shape != (num_classes,):
        raise ValueError(f"bias is {list(bias.shape)}: it must be [{num_classes}]")
    return _real("bias", bias, dtype)


def read_chunk_size(chunk_size) -> int | None:
    if chunk_size is None:
        return None
    if not isinstance(chunk_size, (int, np.integer)) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size!r}")
    return int(chunk_size)
