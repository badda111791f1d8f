"""The losses as objects; long, since each spells its configuration and its docstring.

Each is a configuration and one call, and nothing is computed here.

```python
class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(64, 10, rngs=rngs)
        self.loss = jaxent.CrossEntropyLoss(label_smoothing=0.1)
```

They are `nnx.Pytree`s, so they live wherever Flax users put things: an attribute of an
`nnx.Module`, a field of a linen module, an argument of a jitted function, a leaf-bearing
part of a checkpoint. Arrays (`weight`, `class_mask`, a traced `label_smoothing` or
`z_loss`) are data: changing their values does not retrace. They are constants, too: no gradient
reaches them, so no optimizer trains them; to differentiate a weight, give it to the call. Numbers
and strings are static.

Setting an attribute checks it as construction does: `loss.weight = new_weight`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from ._arguments import (
    ArrayOrList,
    DotGeneral,
    Reduction,
    TargetsLike,
    check_axis,
    check_reduction,
    read_bool_mask,
    read_ignore_index,
    read_label_smoothing,
    read_logit_scale,
    read_softcap,
    read_weight,
    read_z_loss,
)
from ._axes import AxisName, check_axis_name
from ._calls import public
from ._head_arguments import (
    read_chunk_size,
    read_dot_general,
    read_dtype,
    read_kernel_axis,
    read_precision,
)
from ._keywords import (
    CrossEntropyKeywords,
    LinearCrossEntropyKeywords,
    NLLKeywords,
    TotalWeightKeywords,
)
from ._linear import linear_cross_entropy
from ._losses import cross_entropy, nll, total_weight
from ._reduction import TokenStats


def _array(value: Any) -> Any:
    if value is None:
        return None
    value = jnp.asarray(value)
    return value.astype(jnp.float32) if jnp.issubdtype(value.dtype, jnp.integer) else value


def _checked(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a reader of a value that is kept as it came."""

    def read(value: Any) -> Any:
        check(value)
        return value

    return read


def _number(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a reader of a number, which is static, or an array, which is not."""

    def read(value: Any) -> Any:
        check(value)
        if isinstance(value, np.generic):
            value = value.item()
        return value if isinstance(value, (int, float)) else _array(value)

    return read


def _axis_name(argument: str) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        check_axis_name(argument, value)
        return tuple(value) if isinstance(value, list) else value

    return read


READERS: dict[str, Callable[[Any], Any]] = {
    "class_axis": read_kernel_axis,
    "dtype": read_dtype,
    "precision": read_precision,
    "dot_general": read_dot_general,
    "chunk_size": read_chunk_size,
    "weight": lambda value: _array(read_weight(value, None)),
    "ignore_index": read_ignore_index,
    "reduction": _checked(check_reduction),
    "label_smoothing": _number(read_label_smoothing),
    "axis": _checked(check_axis),
    "class_mask": lambda value: None if value is None else _array(read_bool_mask(value)),
    "z_loss": _number(read_z_loss),
    "logit_scale": _number(read_logit_scale),
    "softcap": read_softcap,
    "axis_name": _axis_name("axis_name"),
    "class_axis_name": _axis_name("class_axis_name"),
    "width_axis_name": _axis_name("width_axis_name"),
}


class _Loss(nnx.Pytree):
    """A function's keywords, given early; those given late take their place."""

    _names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # nnx's metaclass hides it from help() and editors.
        _, *parameters = inspect.signature(cls.__init__).parameters.values()
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        cls._names = tuple(parameter.name for parameter in parameters)
        for method in ("__init__", "__call__"):
            setattr(cls, method, public(getattr(cls, method)))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._names:
            value = READERS[name](value)
            value = nnx.data(value) if _is_array(value) else nnx.static(value)
        elif not name.startswith("_"):
            raise AttributeError(
                f"{type(self).__name__} has no {name}; it has {', '.join(self._names)}"
            )
        super().__setattr__(name, value)

    def _keywords(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the function's keywords: the call's, and the object's, as constants."""
        keywords = {**{name: getattr(self, name) for name in self._names}, **given}
        for name, value in keywords.items():
            if name not in given and _is_array(value) and value.dtype != bool:
                keywords[name] = jax.lax.stop_gradient(value)
        return keywords

    def total_weight(self, targets: ArrayOrList, **keywords: Unpack[TotalWeightKeywords]) -> Array:
        """Return what the mean of these targets divides by, as `jaxent.total_weight` does.

        Args:
          targets: class indices.
          **keywords: those of `jaxent.total_weight`; they override the object's. Examples that its
            `class_mask` leaves without a class count here: give them a sample weight of 0.

        Example:
          >>> import jax.numpy as jnp
          >>> import jaxent
          >>> loss = jaxent.CrossEntropyLoss(weight=[1.0, 2.0, 1.0], ignore_index=0)
          >>> loss.total_weight(jnp.array([0, 1, 2]))
          Array(3., dtype=float32)
        """
        names = TotalWeightKeywords.__annotations__
        mine: Any = {name: value for name, value in self._keywords({}).items() if name in names}
        return total_weight(targets, **{**mine, **keywords})

    def _configuration(self) -> tuple[Any, ...] | None:
        """Return what it is, if it holds no arrays."""
        values = tuple(getattr(self, name) for name in self._names)
        return None if any(map(_is_array, values)) else (type(self), *values)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        mine = self._configuration()
        return isinstance(other, _Loss) and mine is not None and mine == other._configuration()

    def __hash__(self) -> int:
        mine = self._configuration()
        return id(self) if mine is None else hash(mine)

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self)).parameters
        given = {name: getattr(self, name) for name in self._names}
        given = {k: v for k, v in given.items() if _differs(v, parameters[k].default)}
        described = (f"{k}={_describe(v)}" for k, v in given.items())
        return f"{type(self).__name__}({', '.join(described)})"

    __str__ = __repr__


class NLLLoss(_Loss):
    """`jaxent.nll` as an object.

    `jaxent.nll` says more of each argument.

    Args:
      weight: a weight of each class, (C,).
      ignore_index: the target that does not count; None for none.
      reduction: "mean", "sum" or "none".
      axis: the class axis; None reads it off the shapes.
      axis_name: the mapped axes over which examples are split.
      class_axis_name: the mapped axes over which classes are split.

    Raises:
      TypeError, ValueError: an argument is none of what `jaxent.nll` takes.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxent
      >>> loss = jaxent.NLLLoss(reduction="sum", ignore_index=-1)
      >>> loss
      NLLLoss(ignore_index=-1, reduction='sum')
      >>> loss(jnp.log(jnp.array([[0.5, 0.5], [0.1, 0.9]])), jnp.array([0, -1]))
      Array(0.6931472, dtype=float32)
    """

    def __init__(
        self,
        *,
        weight: ArrayOrList | None = None,
        ignore_index: int | None = -100,
        reduction: Reduction = "mean",
        axis: int | None = None,
        axis_name: AxisName = None,
        class_axis_name: AxisName = None,
    ) -> None:
        self.weight = weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.axis = axis
        self.axis_name = axis_name
        self.class_axis_name = class_axis_name

    def __call__(
        self, log_probs: ArrayOrList, targets: TargetsLike, **keywords: Unpack[NLLKeywords]
    ) -> Array:
        """Return the loss.

        Any keyword of `jaxent.nll` given here (`sample_weight`, say) overrides the object's, and
        is differentiated.
        """
        return nll(log_probs, targets, **self._keywords(keywords))


class CrossEntropyLoss(_Loss):
    """`jaxent.cross_entropy` as an object.

    `jaxent.cross_entropy` says more of each argument.

    Args:
      weight: a weight of each class, (C,).
      ignore_index: the target that does not count; None for none.
      reduction: "mean", "sum" or "none".
      label_smoothing: the part of the target's mass that is spread over all classes, from 0 to 1.
      axis: the class axis; None reads it off the shapes.
      class_mask: bool, which classes exist.
      z_loss: the coefficient of the squared log-normalizer.
      logit_scale: a factor of the logits: 1 / T for a temperature T.
      softcap: the bound of softcap * tanh(logits / softcap); None for none.
      axis_name: the mapped axes over which examples are split.
      class_axis_name: the mapped axes over which classes are split.

    Raises:
      TypeError, ValueError: an argument is none of what `jaxent.cross_entropy` takes.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxent
      >>> loss = jaxent.CrossEntropyLoss(weight=[1.0, 2.0], label_smoothing=0.1)
      >>> loss
      CrossEntropyLoss(weight=float32[2], label_smoothing=0.1)
      >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])
      >>> loss(logits, labels, sample_weight=[1.0, 0.0]).round(4)
      Array(0.3333, dtype=float32)
    """

    def __init__(
        self,
        *,
        weight: ArrayOrList | None = None,
        ignore_index: int | None = -100,
        reduction: Reduction = "mean",
        label_smoothing: ArrayLike = 0.0,
        axis: int | None = None,
        class_mask: ArrayOrList | None = None,
        z_loss: ArrayLike = 0.0,
        logit_scale: ArrayLike = 1.0,
        softcap: float | None = None,
        axis_name: AxisName = None,
        class_axis_name: AxisName = None,
    ) -> None:
        self.weight = weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.axis = axis
        self.class_mask = class_mask
        self.z_loss = z_loss
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.axis_name = axis_name
        self.class_axis_name = class_axis_name

    @overload
    def __call__(
        self,
        logits: ArrayOrList,
        targets: TargetsLike,
        *,
        return_stats: Literal[True],
        **keywords: Unpack[CrossEntropyKeywords],
    ) -> tuple[Array, TokenStats]: ...
    @overload
    def __call__(
        self,
        logits: ArrayOrList,
        targets: TargetsLike,
        *,
        return_stats: Literal[False] = ...,
        **keywords: Unpack[CrossEntropyKeywords],
    ) -> Array: ...
    @overload
    def __call__(
        self,
        logits: ArrayOrList,
        targets: TargetsLike,
        *,
        return_stats: bool,
        **keywords: Unpack[CrossEntropyKeywords],
    ) -> Array | tuple[Array, TokenStats]: ...
    def __call__(
        self,
        logits: ArrayOrList,
        targets: TargetsLike,
        *,
        return_stats: bool = False,
        **keywords: Unpack[CrossEntropyKeywords],
    ) -> Array | tuple[Array, TokenStats]:
        """Return the loss, and with `return_stats` the statistics, as `jaxent.cross_entropy` does.

        Any of its keywords given here (`sample_weight`, `reduction="none"`) overrides the
        object's, and is differentiated.
        """
        given = self._keywords({**keywords, "return_stats": return_stats})
        both: Array | tuple[Array, TokenStats] = cross_entropy(logits, targets, **given)
        return both


class LinearCrossEntropyLoss(_Loss):
    """`jaxent.linear_cross_entropy` as an object: it is given the kernel, and owns none.

    `jaxent.linear_cross_entropy` says more of each argument.

    Args:
      class_axis: the kernel's class axis: -1, as Flax has it, or 0, as an embedding is.
      dtype: the dtype of the matrix products; None takes the operands'.
      precision: the products' precision, as `jax.lax.dot_general` takes it.
      dot_general: the function of the products, as Flax takes it for quantized training.
      chunk_size: the number of classes in a chunk; None chooses the form and the size.
      weight: a weight of each class, (C,).
      ignore_index: the target that does not count; None for none.
      reduction: "mean", "sum" or "none".
      label_smoothing: the part of the target's mass that is spread over all classes, from 0 to 1.
      class_mask: bool, which classes exist.
      z_loss: the coefficient of the squared log-normalizer.
      logit_scale: a factor of the logits: 1 / T for a temperature T.
      softcap: the bound of softcap * tanh(logits / softcap); None for none.
      axis_name: the mapped axes over which examples are split.
      class_axis_name: the mapped axes over which classes are split.
      width_axis_name: the mapped axes over which the kernel's width is split.

    Raises:
      TypeError, ValueError: an argument is none of what `jaxent.linear_cross_entropy` takes.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxent
      >>> loss = jaxent.LinearCrossEntropyLoss(class_axis=0, dtype=jnp.bfloat16)
      >>> loss
      LinearCrossEntropyLoss(class_axis=0, dtype=bfloat16)
      >>> embedding = jnp.zeros((100, 8))
      >>> loss(jnp.ones((2, 8)), embedding, jnp.array([1, 2])).round(3)
      Array(4.605, dtype=float32)
    """

    def __init__(
        self,
        *,
        class_axis: int = -1,
        dtype: DTypeLike | None = None,
        precision: jax.lax.PrecisionLike = None,
        dot_general: DotGeneral | None = None,
        chunk_size: int | None = None,
        weight: ArrayOrList | None = None,
        ignore_index: int | None = -100,
        reduction: Reduction = "mean",
        label_smoothing: ArrayLike = 0.0,
        class_mask: ArrayOrList | None = None,
        z_loss: ArrayLike = 0.0,
        logit_scale: ArrayLike = 1.0,
        softcap: float | None = None,
        axis_name: AxisName = None,
        class_axis_name: AxisName = None,
        width_axis_name: AxisName = None,
    ) -> None:
        self.class_axis = class_axis
        self.dtype = dtype
        self.precision = precision
        self.dot_general = dot_general
        self.chunk_size = chunk_size
        self.weight = weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.class_mask = class_mask
        self.z_loss = z_loss
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.axis_name = axis_name
        self.class_axis_name = class_axis_name
        self.width_axis_name = width_axis_name

    @overload
    def __call__(
        self,
        hidden: ArrayOrList,
        kernel: ArrayOrList,
        targets: TargetsLike,
        *,
        return_stats: Literal[True],
        **keywords: Unpack[LinearCrossEntropyKeywords],
    ) -> tuple[Array, TokenStats]: ...
    @overload
    def __call__(
        self,
        hidden: ArrayOrList,
        kernel: ArrayOrList,
        targets: TargetsLike,
        *,
        return_stats: Literal[False] = ...,
        **keywords: Unpack[LinearCrossEntropyKeywords],
    ) -> Array: ...
    @overload
    def __call__(
        self,
        hidden: ArrayOrList,
        kernel: ArrayOrList,
        targets: TargetsLike,
        *,
        return_stats: bool,
        **keywords: Unpack[LinearCrossEntropyKeywords],
    ) -> Array | tuple[Array, TokenStats]: ...
    def __call__(
        self,
        hidden: ArrayOrList,
        kernel: ArrayOrList,
        targets: TargetsLike,
        *,
        return_stats: bool = False,
        **keywords: Unpack[LinearCrossEntropyKeywords],
    ) -> Array | tuple[Array, TokenStats]:
        """Return the loss, and with `return_stats` the statistics, as the function does.

        Any keyword of `jaxent.linear_cross_entropy` given here (`bias`, `sample_weight`)
        overrides the object's, and is differentiated.
        """
        given = self._keywords({**keywords, "return_stats": return_stats})
        both: Array | tuple[Array, TokenStats] = linear_cross_entropy(
            hidden, kernel, targets, **given
        )
        return both


def _is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray))


def _differs(value: Any, default: Any) -> bool:
    return _is_array(value) or value != default


def _describe(value: Any) -> str:
    if _is_array(value):
        return f"{value.dtype}{list(value.shape)}"
    if callable(value):
        return str(getattr(value, "__name__", type(value).__name__))
    return str(value) if isinstance(value, np.dtype) else repr(value)
