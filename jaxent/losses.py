"""The losses as objects: a configuration and one call, nothing computed here.

```python
class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(64, 10, rngs=rngs)
        self.loss = jaxent.CrossEntropyLoss(label_smoothing=0.1)
```

They are `nnx.Pytree`s, so they live wherever Flax users put things: an attribute of an
`nnx.Module`, a field of a linen module, an argument of a jitted function, a leaf-bearing
part of a checkpoint. Arrays (`weight`, `class_mask`, a traced `label_smoothing` or
`z_loss`) are data: changing their values does not retrace. Numbers and strings are static.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from ._arguments import (
    ArrayOrList,
    check_axis,
    check_class_mask,
    check_reduction,
    read_chunk_size,
    read_dtype,
    read_ignore_index,
    read_kernel_axis,
    read_label_smoothing,
    read_softcap,
    read_weight,
    read_z_loss,
)
from ._axes import AxisName, check_axis_name
from .functional import cross_entropy, nll
from .linear import linear_cross_entropy


class _Loss(nnx.Pytree):
    """A function's keywords, given early; those given late take their place."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # nnx's metaclass hides it from help() and editors.
        _, *parameters = inspect.signature(cls.__init__).parameters.values()
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    def _set_shared(self, weight, ignore_index, reduction) -> None:
        check_reduction(reduction)
        read_weight(weight, None)
        self.weight = _array(weight)
        self.ignore_index = read_ignore_index(ignore_index)
        self.reduction = reduction

    def _set_axis(self, axis) -> None:
        if axis is not None:
            check_axis(axis)
        self.axis = axis

    def _set_names(self, **names) -> None:
        for argument, axis_name in names.items():
            check_axis_name(argument, axis_name)
            setattr(self, argument, tuple(axis_name) if isinstance(axis_name, list) else axis_name)

    def _set_softmax(self, label_smoothing, class_mask, z_loss, softcap) -> None:
        read_label_smoothing(label_smoothing)
        read_z_loss(z_loss)
        if class_mask is not None:
            check_class_mask(class_mask)
        self.label_smoothing = _number_or_array(label_smoothing)
        self.class_mask = _array(class_mask)
        self.z_loss = _number_or_array(z_loss)
        self.softcap = read_softcap(softcap)

    def _keywords(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self)).parameters
        given = {k: v for k, v in self._keywords().items() if _differs(v, parameters[k].default)}
        described = (f"{k}={_describe(v)}" for k, v in given.items())
        return f"{type(self).__name__}({', '.join(described)})"

    __str__ = __repr__


class NLLLoss(_Loss):
    """`jaxent.nll` as an object.

    Args:
      weight, ignore_index, reduction, axis, axis_name, class_axis_name: as in `jaxent.nll`.

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
        reduction: str = "mean",
        axis: int | None = None,
        axis_name: AxisName = None,
        class_axis_name: AxisName = None,
    ):
        self._set_shared(weight, ignore_index, reduction)
        self._set_axis(axis)
        self._set_names(axis_name=axis_name, class_axis_name=class_axis_name)

    def __call__(self, log_probs: ArrayOrList, targets: ArrayOrList, **keywords: Any) -> Array:
        """The loss; any keyword of `jaxent.nll` given here (`sample_weight`, say) goes
        before the object's."""
        return nll(log_probs, targets, **(self._keywords() | keywords))


class CrossEntropyLoss(_Loss):
    """`jaxent.cross_entropy` as an object.

    Args:
      weight, ignore_index, reduction, label_smoothing, axis, class_mask, z_loss, softcap,
        axis_name, class_axis_name: as in `jaxent.cross_entropy`.

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
        reduction: str = "mean",
        label_smoothing: ArrayLike = 0.0,
        axis: int | None = None,
        class_mask: ArrayOrList | None = None,
        z_loss: ArrayLike = 0.0,
        softcap: float | None = None,
        axis_name: AxisName = None,
        class_axis_name: AxisName = None,
    ):
        self._set_shared(weight, ignore_index, reduction)
        self._set_axis(axis)
        self._set_names(axis_name=axis_name, class_axis_name=class_axis_name)
        self._set_softmax(label_smoothing, class_mask, z_loss, softcap)

    def __call__(self, logits: ArrayOrList, targets: ArrayOrList, **keywords: Any) -> Array:
        """The loss; any keyword of `jaxent.cross_entropy` given here (`sample_weight`,
        `reduction="none"`) goes before the object's."""
        return cross_entropy(logits, targets, **(self._keywords() | keywords))


class LinearCrossEntropyLoss(_Loss):
    """`jaxent.linear_cross_entropy` as an object: it is given the kernel, and owns none.

    Args:
      class_axis, dtype, precision, chunk_size, weight, ignore_index, reduction,
        label_smoothing, class_mask, z_loss, softcap, axis_name, class_axis_name,
        width_axis_name: as in `jaxent.linear_cross_entropy`.

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
        precision: Any = None,
        chunk_size: int | None = None,
        weight: ArrayOrList | None = None,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        label_smoothing: ArrayLike = 0.0,
        class_mask: ArrayOrList | None = None,
        z_loss: ArrayLike = 0.0,
        softcap: float | None = None,
        axis_name: AxisName = None,
        class_axis_name: AxisName = None,
        width_axis_name: AxisName = None,
    ):
        self.class_axis = read_kernel_axis(class_axis)
        self.dtype = read_dtype(dtype)
        self.precision = precision
        self.chunk_size = read_chunk_size(chunk_size)
        self._set_shared(weight, ignore_index, reduction)
        self._set_softmax(label_smoothing, class_mask, z_loss, softcap)
        self._set_names(
            axis_name=axis_name, class_axis_name=class_axis_name, width_axis_name=width_axis_name
        )

    def __call__(
        self, hidden: ArrayOrList, kernel: ArrayOrList, targets: ArrayOrList, **keywords: Any
    ) -> Array:
        """The loss; any keyword of `jaxent.linear_cross_entropy` given here (`bias`,
        `sample_weight`) goes before the object's."""
        return linear_cross_entropy(hidden, kernel, targets, **(self._keywords() | keywords))


def _array(value):
    if value is None:
        return None
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.integer):  # or it had no gradient
        value = value.astype(jnp.float32)
    return nnx.data(value)


def _number_or_array(value):
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, (int, float)) else _array(value)


def _differs(value, default):
    return isinstance(value, (jax.Array, np.ndarray)) or value != default


def _describe(value):
    if isinstance(value, (jax.Array, np.ndarray)):
        return f"{value.dtype}{list(value.shape)}"
    return str(value) if isinstance(value, np.dtype) else repr(value)
