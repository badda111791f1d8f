"""Checks of the arguments; long, since each error says what to pass.

Everything that can be refused while tracing is refused here.

Every public function says the same thing in the same words: the argument's name, the
shapes, and what to pass. Nothing is computed: arrays come out as they came in, JAX's or
NumPy's, for one compiled function to read.
"""

import functools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from ._sparse import SparseTargets

P = ParamSpec("P")
R = TypeVar("R")

ArrayOrList = ArrayLike | Sequence[Any]
TargetsLike = ArrayOrList | SparseTargets
DotGeneral = Callable[..., jax.Array]
Reduction = Literal["mean", "sum", "none"]

REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "none")
NUMBERS = (bool, int, float, complex, np.generic)


def describe(value: Any) -> str:
    """Describe a value in a few words, for an error message."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    text = repr(value) if isinstance(value, (str, *NUMBERS, list, tuple, type(None))) else ""
    return text if 0 < len(text) <= 60 else f"a {type(value).__name__}"


def describe_pair(a_name: str, a: Any, b_name: str, b: Any) -> str:
    return f"{a_name} is {describe(a)}, {b_name} {describe(b)}"


def check_reduction(reduction: Any) -> None:
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {describe(reduction)}")


def check_return_stats(value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"return_stats must be True or False, got {describe(value)}")


def read_array(name: str, value: Any) -> Any:
    """Return an array of a dtype that JAX has: JAX's as it came, else NumPy's if it can be."""
    try:
        if _is_hosts(value):
            value = np.asarray(value)
            dtype = jax.dtypes.canonicalize_dtype(value.dtype.newbyteorder("="))
            with np.errstate(over="ignore"):  # to inf, as JAX does
                array: Any = value.astype(dtype, copy=False)
        else:
            array = value if isinstance(value, jax.Array) else jnp.asarray(value)
        if jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool:
            return array
    except (TypeError, ValueError, OverflowError):
        pass
    raise TypeError(f"{name} must be an array or a number, got {describe(value)}")


def _is_hosts(value: Any) -> bool:
    """Return whether NumPy reads it without JAX: numbers, or an array that is not JAX's."""
    if isinstance(value, (jax.Array, np.ma.MaskedArray)) or hasattr(value, "__jax_array__"):
        return False
    return hasattr(value, "__array__") or _is_of_numbers(value)


def _is_of_numbers(value: Any) -> bool:
    """Return whether it is a number, an array of NumPy's, or lists of numbers."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_of_numbers, value))
    return isinstance(value, (np.ndarray, *NUMBERS))


def is_float(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def read_logits(logits: Any, name: str, targets: Any = None) -> Any:
    logits = read_array(name, logits)
    if not is_float(logits):
        swapped = hasattr(targets, "dtype") and is_float(targets)
        hint = f"; the order of arguments is {name}, targets" if swapped else ""
        raise TypeError(f"{name} must be a float array, got {describe(logits)}{hint}")
    if logits.ndim == 0:
        raise ValueError(f"{name} must have a class axis, got a scalar")
    return logits


def read_targets(targets: Any, ignore_index: Any) -> tuple[Any, Any]:
    """Return the targets and the ignored one, of their dtype.

    Integers have at least 32 bits. None is cut: one that JAX's integers lack becomes another that
    is out of range, or ignored, as it is itself.
    """
    if isinstance(targets, SparseTargets):
        return _read_sparse_targets(targets, ignore_index)
    ignore_index = read_ignore_index(ignore_index)
    whole = whole_numbers(targets)
    if whole is not None and whole.dtype.itemsize == 8:
        _check_holds(whole, ignore_index)
        return _cut(whole, ignore_index)
    targets = read_array("targets", targets if whole is None else whole)
    if is_float(targets):
        if ignore_index is not None and ignore_index >= 0:
            raise ValueError(
                f"ignore_index={ignore_index} has no meaning for class probabilities: give those "
                "examples a sample_weight of 0, and leave ignore_index negative or None"
            )
        return targets, None
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(
            "targets must be integer class indices or float class probabilities, got "
            f"{describe(targets)}; if they are one-hot, pass targets.astype(float)"
        )
    _check_holds(targets, ignore_index)
    dtype = targets.dtype if jnp.iinfo(targets.dtype).bits >= 32 else jnp.dtype("int32")
    limits = jnp.iinfo(dtype)
    if ignore_index is None or not limits.min <= ignore_index <= limits.max:
        return targets, None
    return targets, np.asarray(ignore_index, dtype)


def _read_sparse_targets(targets: SparseTargets, ignore_index: Any) -> tuple[SparseTargets, Any]:
    indices: Any = targets.indices
    if whole_numbers(indices) is None:
        indices = read_array("targets.indices", indices)
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise TypeError(f"targets.indices must be integers, got {describe(indices)}")
    indices, ignored = read_targets(indices, ignore_index)
    if indices.ndim == 0 or indices.shape[-1] == 0:
        raise ValueError(
            f"targets.indices is {list(indices.shape)}: it must be (..., K), K > 0 classes an "
            "example; a place may be empty, by ignore_index"
        )
    probabilities = read_array("targets.probabilities", targets.probabilities)
    both = describe_pair("targets.indices", indices, "targets.probabilities", probabilities)
    if not is_float(probabilities):
        raise TypeError(f"{both}: targets.probabilities must be floats")
    if probabilities.shape != indices.shape:
        raise ValueError(f"{both}: they must have one shape, (..., K)")
    return SparseTargets(indices, probabilities), ignored


def is_of_all_classes(targets: Any) -> bool:
    """Return whether targets that were read are class probabilities, with a class axis."""
    return not isinstance(targets, SparseTargets) and is_float(targets)


def whole_numbers(targets: Any) -> Any:
    """Return NumPy and Python integers as an array, of objects where no dtype has them all."""
    if not _is_hosts(targets):
        return None
    try:
        array = np.asarray(targets)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        listed = isinstance(targets, (list, tuple))
        if listed and not array.size:
            array = array.astype(np.int64)  # no targets, of no dtype
        elif listed and array.dtype.kind in "fO":
            # 2**63 and -1 have no common integer dtype.
            array = np.asarray(targets, object)
            kinds = {type(x) for x in array.flat}
            whole = kinds and all(issubclass(k, (int, np.integer)) for k in kinds - {bool})
            return array if whole and bool not in kinds else None
    except (TypeError, ValueError):  # ragged lists; another library's array that is on a device
        return None
    return array if array.dtype.kind in "iu" else None


def _check_holds(targets: Any, ignore_index: int | None) -> None:
    """Refuse targets of a dtype that lacks the ignored index: most likely, they were cut to it."""
    if ignore_index is None or ignore_index < 0 or targets.dtype == object:
        return
    if ignore_index > jnp.iinfo(targets.dtype).max:
        raise ValueError(
            f"ignore_index={ignore_index}: targets are {describe(targets)}, and no "
            f"{targets.dtype} is {ignore_index}; pass targets of a wider dtype, from before they "
            "were cut, or ignore_index=None"
        )


def _cut(targets: np.ndarray, ignore_index: int | None) -> tuple[np.ndarray, Any]:
    """Return NumPy's integers as JAX's, whose two largest stand for what those lack."""
    kind = np.dtype("int64") if targets.dtype == object else targets.dtype
    dtype = jax.dtypes.canonicalize_dtype(kind)
    limits = np.iinfo(dtype)
    ignored, outside = limits.max - 1, limits.max
    if dtype != targets.dtype:
        inside = (targets >= limits.min) & (targets <= limits.max)
        cut = np.where(inside, targets, outside)
        if ignore_index is not None and not limits.min <= ignore_index <= limits.max:
            cut = np.where(cut == ignored, outside, cut)
            cut = np.where(targets == ignore_index, ignored, cut)
            ignore_index = ignored
        elif ignore_index == outside:
            cut = np.where(inside, cut, ignored)
        targets = cut.astype(dtype)
    if ignore_index is None or not limits.min <= ignore_index <= limits.max:
        return targets, None
    return targets, np.asarray(ignore_index, dtype)


def read_index_targets(targets: Any, ignore_index: Any, wanted: str) -> tuple[Any, Any]:
    targets, ignored = read_targets(targets, ignore_index)
    if isinstance(targets, SparseTargets) or is_float(targets):
        raise TypeError(f"targets are {describe(targets)}: {wanted}")
    return targets, ignored


def _read_integer(name: str, value: Any, wanted: str, hint: str = "") -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except (TypeError, jax.errors.JAXTypeError):
        raise TypeError(
            f"{name} must be {wanted}, got {describe_static(name, value)}{hint}"
        ) from None


def describe_static(name: str, value: Any) -> str:
    """Describe a value that has to be known while tracing, for an error message."""
    if not isinstance(value, Tracer):
        return describe(value)
    return f"{describe(value)}, traced; name {name!r} in static_argnames of jax.jit"


def read_axis(axis: Any, ndim: int, name: str) -> int:
    number = _read_integer("axis", axis, "an integer")
    if ndim == 1 and number == 1:  # PyTorch's class axis, of one example
        return 0
    if not -ndim <= number < ndim:
        raise ValueError(f"axis={number} is out of range for {name} of {ndim} dimensions")
    return number % ndim


def read_positive(name: str, value: Any, wanted: str = "a positive integer") -> int:
    number = _read_integer(name, value, wanted)
    if number < 1:
        raise ValueError(f"{name} must be {wanted}, got {number}")
    return number


def check_axis(axis: Any) -> None:
    if axis is not None:
        _read_integer("axis", axis, "an integer")


def _axis_hint(
    shape: tuple[int, ...], of_examples: tuple[int, ...], wanted: list[tuple[int, ...]]
) -> str:
    """Return what to do where the examples' shape is none of those wanted."""
    fitting = [a for a in range(len(shape)) if shape[:a] + shape[a + 1 :] == of_examples]
    if fitting:
        return f"pass {' or '.join(f'axis={a}' for a in fitting)}, which fits"
    for a, size in enumerate(of_examples):
        if size == 1 and of_examples[:a] + of_examples[a + 1 :] in wanted:
            return f"axis {a} of the targets is one too many: pass jnp.squeeze(targets, {a})"
    return "if that is another axis, pass axis"


def read_class_axis(axis: Any, logits: Any, targets: Any, name: str) -> int:
    """Return the class axis, given or read off the shapes; it is never guessed."""
    shape, ndim = logits.shape, logits.ndim
    sparse = isinstance(targets, SparseTargets)
    given: Any = targets.indices if sparse else targets
    of_examples = given.shape[:-1] if sparse else given.shape
    shapes = f"{name} are {list(shape)}, targets{'.indices' if sparse else ''} {describe(given)}"
    what = "targets.indices must be (..., K), (...) being" if sparse else "class indices must be"
    # Read off the shapes, it is PyTorch's 1 or JAX's -1; of 1-D logits it is 0.
    likely = sorted({min(1, ndim - 1), ndim - 1})
    axes = likely if axis is None else [read_axis(axis, ndim, name)]
    if is_of_all_classes(targets):
        if targets.shape != shape:
            raise ValueError(
                f"{shapes}: float targets are class probabilities and need the shape of the "
                f"{name}; class indices need an integer dtype"
            )
    elif not sparse and targets.shape == shape:
        raise ValueError(
            f"{shapes}: class indices have no class axis; if these are one-hot or "
            f"probabilities, pass floats: targets.astype({name}.dtype)"
        )
    else:
        lacking = {a: shape[:a] + shape[a + 1 :] for a in axes}
        axes = [a for a in axes if lacking[a] == of_examples]
        if not axes:
            wanted = " or ".join(f"{list(s)} (axis={a})" for a, s in lacking.items())
            raise ValueError(
                f"{shapes}: {what} {wanted}, the shape of the {name} without "
                f"the class axis; {_axis_hint(shape, of_examples, [*lacking.values()])}"
            )
    if len(axes) == 2:
        raise ValueError(
            f"{shapes}: the class axis could be 1 or -1; pass axis=1 (PyTorch's "
            "(N, C, d1..dK)) or axis=-1 ((..., C))"
        )
    if shape[axes[0]] == 0:
        raise ValueError(f"{shapes}: there are no classes along axis {axes[0]}")
    return axes[0]


def read_bool_mask(class_mask: Any) -> Any:
    class_mask = read_array("class_mask", class_mask)
    if class_mask.dtype != bool:
        raise TypeError(
            f"class_mask is {describe(class_mask)}: it must be bool, True for the classes that "
            "exist"
        )
    return class_mask


def read_class_mask(class_mask: Any, shape: tuple[int, ...], axis: int, name: str) -> Any:
    """Return which classes exist: (C,), or something that broadcasts to the logits' shape."""
    if class_mask is None:
        return None
    class_mask = read_bool_mask(class_mask)
    if class_mask.shape == (shape[axis],):
        return class_mask
    if class_mask.ndim != len(shape) or not _broadcasts(class_mask.shape, shape):
        raise ValueError(
            f"class_mask is {describe(class_mask)}, {name} {list(shape)}: it must be "
            f"[{shape[axis]}], one value a class, or have {len(shape)} dimensions and broadcast "
            f"to the {name}"
        )
    return class_mask


def read_weight(
    weight: Any, num_classes: int | None, per_example: tuple[int, ...] | None = None
) -> Any:
    """Return class weights, (C,); `num_classes` None leaves their number open."""
    if weight is None:
        return None
    weight = read_real("weight", weight)
    fits = weight.size > 0 if num_classes is None else weight.shape == (num_classes,)
    if weight.ndim != 1 or not fits:
        length = "C" if num_classes is None else num_classes
        hint = ""
        if per_example is not None and weight.ndim and weight.shape == per_example:
            hint = "; for one number an example, pass sample_weight"
        raise ValueError(
            f"weight is {list(weight.shape)}: it must be [{length}], one number a class{hint}"
        )
    return weight


def read_sample_weight(sample_weight: Any, shape: tuple[int, ...]) -> Any:
    """Return a scalar, or an array that broadcasts to the examples, of as many dimensions."""
    if sample_weight is None:
        return None
    sample_weight = read_real("sample_weight", sample_weight)
    got = sample_weight.shape
    if got == () or (len(got) == len(shape) and _broadcasts(got, shape)):
        return sample_weight
    hint = ""
    if len(got) < len(shape) and got == shape[: len(got)]:
        index = ", ".join([":"] * len(got) + ["None"] * (len(shape) - len(got)))
        hint = f"; to weigh the first axis of each, pass sample_weight[{index}]"
    raise ValueError(
        f"sample_weight is {list(got)}: it must broadcast to {list(shape)}, one number an "
        f"example, with {len(shape)} dimensions or none{hint}"
    )


def read_ignore_index(ignore_index: Any) -> int | None:
    if ignore_index is None:
        return None
    hint = "; for a mask that is computed, pass sample_weight"
    return _read_integer("ignore_index", ignore_index, "a Python integer or None", hint)


def read_label_smoothing(label_smoothing: Any) -> Any:
    """Return a scalar, or None for a Python 0."""
    return _read_coefficient("label_smoothing", label_smoothing, 0, 1)


def read_z_loss(z_loss: Any) -> Any:
    return _read_coefficient("z_loss", z_loss, -math.inf, math.inf)


def read_logit_scale(logit_scale: Any) -> Any:
    """Return a scalar, or None for a Python 1."""
    return _read_coefficient("logit_scale", logit_scale, -math.inf, math.inf, neutral=1)


def _read_coefficient(name: str, value: Any, low: float, high: float, neutral: float = 0) -> Any:
    """Return a scalar, or None for the Python number that changes nothing.

    The range of Python's numbers is checked.
    """
    array = read_real(name, value)
    if array.ndim != 0:
        raise ValueError(f"{name} must be a scalar, got {describe(array)}")
    if not isinstance(array, jax.Array):
        array = array.astype(jax.dtypes.canonicalize_dtype(np.float64))
        if not (np.isfinite(array) and low <= array <= high):
            wanted = "finite" if high == math.inf else f"in [{low}, {high}]"
            raise ValueError(f"{name} must be {wanted}, got {value}")
        if array == neutral:
            return None
    return array


def read_temperature(temperature: Any) -> Any:
    """Return a scalar, or None for a Python 1."""
    array = _read_coefficient("temperature", temperature, -math.inf, math.inf, neutral=1)
    if array is not None and not isinstance(array, jax.Array) and array <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return array


def read_beta(beta: Any) -> tuple[Literal["forward", "reverse", "between"], Any]:
    """Return the kind of a divergence; and beta, a scalar, where it is between the others."""
    array = _read_coefficient("beta", beta, 0, 1)
    if array is None:
        return "forward", None
    if not isinstance(array, jax.Array) and array == 1:
        return "reverse", None
    return "between", array


def read_distilled_targets(
    targets: Any, ignore_index: Any, shape: tuple[int, ...]
) -> tuple[Any, Any]:
    """Return targets that only say what is ignored, and the ignored one; None for none."""
    if targets is None:
        read_ignore_index(ignore_index)
        return None, None
    targets, ignored = read_index_targets(
        targets,
        ignore_index,
        "here they only say which examples are ignored, as integers; a teacher's probabilities are "
        "targets of cross_entropy",
    )
    if targets.shape != shape:
        raise ValueError(
            f"targets are {describe(targets)}: they must be {list(shape)}, one for each example"
        )
    return (targets, ignored) if ignored is not None else (None, None)


def of_teacher(read: Callable[P, R]) -> Callable[P, R]:
    """Return a check of a student's argument as one of the teacher's, whose errors name that."""

    @functools.wraps(read)
    def check(*args: P.args, **keywords: P.kwargs) -> R:
        try:
            return read(*args, **keywords)
        except (TypeError, ValueError) as error:
            names = r"(?<!\.)\b(hidden|kernel|bias|class_axis|dot_general|logit_scale|softcap)\b"
            kind, message = type(error), re.sub(names, r"teacher_\1", str(error))
        raise kind(message)

    return check


def read_softcap(softcap: Any) -> float | None:
    if softcap is None:
        return None
    try:
        value = float(softcap) if getattr(softcap, "ndim", 0) == 0 else math.nan
    except (TypeError, ValueError, jax.errors.JAXTypeError):
        value = math.nan
    if isinstance(softcap, (str, bytes)) or not 0 < value < math.inf:
        error = TypeError if isinstance(softcap, Tracer) else ValueError
        got = describe_static("softcap", softcap)
        raise error(f"softcap must be a positive Python number or None, got {got}")
    return value


def read_real(name: str, value: Any) -> Any:
    array = read_array(name, value)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be real, got {describe(array)}")
    if isinstance(array, np.ndarray) and array.dtype.kind in "iub":  # one program for 1 and 1.0
        array = array.astype(jax.dtypes.canonicalize_dtype(np.float64))
    return array


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return jnp.broadcast_shapes(shape, to) == to
    except ValueError:
        return False
