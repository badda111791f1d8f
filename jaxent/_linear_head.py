"""A classifier head for Flax nnx: a linear layer with its loss.

```python
self.head = jaxent.LinearHead(features, vocabulary, use_bias=False, rngs=rngs)
...
loss = self.head.loss(hidden, tokens)   # in training: no logits
logits = self.head(hidden[:, -1])       # in generation
```
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, Unpack, overload

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array

from ._arguments import TargetsLike, describe, read_class_mask, read_logit_scale
from ._flax import LinearCrossEntropyLoss
from ._head_arguments import read_dot_general
from ._keywords import LinearCrossEntropyKeywords
from ._numerics import compute_dtype
from ._reduction import TokenStats
from ._rows import Transform
from ._targets import class_table


class LinearHead(nnx.Linear):
    """An `nnx.Linear` whose loss does not go through its logits.

    It has the parameters of an `nnx.Linear`, and takes that one's place in a model or a
    checkpoint.

    Args:
      in_features, out_features: width of the hidden states, number of classes.
      criterion: the configuration of the loss, a `jaxent.LinearCrossEntropyLoss`. Its dtype,
        precision and dot_general, where given, override those of the layer in the loss; the logits
        are the layer's.
      rngs, and any other keyword: as in `nnx.Linear`. The loss is computed with its dot_general
        (see `jaxent.linear_cross_entropy`) and its promote_dtype, and summed in float32 whatever
        the preferred_element_type. A dot_general that has parameters is refused; for the logits,
        Flax calls it with `out_sharding` as well.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxent
      >>> from flax import nnx
      >>> criterion = jaxent.LinearCrossEntropyLoss(ignore_index=0)
      >>> head = jaxent.LinearHead(8, 1000, criterion=criterion, rngs=nnx.Rngs(0))
      >>> hidden, tokens = jnp.ones((4, 8)), jnp.array([5, 7, 0, 0])
      >>> loss = head.loss(hidden, tokens)
      >>> bool(jnp.isclose(loss, jaxent.cross_entropy(head(hidden), tokens, ignore_index=0)))
      True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        criterion: LinearCrossEntropyLoss | None = None,
        rngs: nnx.Rngs,
        **keywords: Any,
    ) -> None:
        of_layer, of_loss = (
            inspect.signature(kind.__init__).parameters
            for kind in (nnx.Linear, LinearCrossEntropyLoss)
        )
        for name in keywords:
            if name in of_loss and name not in (*of_layer, "class_axis"):
                raise TypeError(
                    f"{name} is the loss's: pass "
                    f"criterion=jaxent.LinearCrossEntropyLoss({name}=...)"
                )
        super().__init__(in_features, out_features, rngs=rngs, **keywords)
        read_dot_general(self.dot_general)
        criterion = LinearCrossEntropyLoss() if criterion is None else criterion
        if not isinstance(criterion, LinearCrossEntropyLoss) or criterion.class_axis not in (-1, 1):
            ours = isinstance(criterion, LinearCrossEntropyLoss)
            raise ValueError(
                "criterion must be a jaxent.LinearCrossEntropyLoss with class_axis=-1, the axis "
                f"of classes in an nnx.Linear, got {criterion if ours else describe(criterion)}"
            )
        self.criterion = criterion

    def __call__(self, hidden: Array, out_sharding: Any = None) -> Array:
        """Return the layer's logits, (..., C), scaled, capped and -inf where excluded."""
        logits = super().__call__(hidden, out_sharding)
        scale = read_logit_scale(self.criterion.logit_scale)
        transform = Transform.of(scale, self.criterion.softcap, compute_dtype(logits))
        if not transform.is_identity:
            logits = transform(logits)
        shape, axis = logits.shape, logits.ndim - 1
        mask = read_class_mask(self.criterion.class_mask, shape, axis, "logits")
        exists = class_table(mask, shape, axis)
        return logits if exists is None else jnp.where(exists, logits, -jnp.inf)

    @overload
    def loss(
        self,
        hidden: Array,
        targets: TargetsLike,
        *,
        return_stats: Literal[True],
        **keywords: Unpack[LinearCrossEntropyKeywords],
    ) -> tuple[Array, TokenStats]: ...
    @overload
    def loss(
        self,
        hidden: Array,
        targets: TargetsLike,
        *,
        return_stats: Literal[False] = ...,
        **keywords: Unpack[LinearCrossEntropyKeywords],
    ) -> Array: ...
    @overload
    def loss(
        self,
        hidden: Array,
        targets: TargetsLike,
        *,
        return_stats: bool,
        **keywords: Unpack[LinearCrossEntropyKeywords],
    ) -> Array | tuple[Array, TokenStats]: ...
    def loss(
        self,
        hidden: Array,
        targets: TargetsLike,
        *,
        return_stats: bool = False,
        **keywords: Unpack[LinearCrossEntropyKeywords],
    ) -> Array | tuple[Array, TokenStats]:
        """Return the loss of hidden states, (..., D), whose logits are not held.

        Any keyword of `jaxent.linear_cross_entropy` given here overrides the criterion's, and is
        differentiated; with `return_stats` the statistics are returned as well.
        """
        kernel = self.kernel[...]
        given: LinearCrossEntropyKeywords = {
            "bias": None if self.bias is None else self.bias[...],
            "dtype": self.criterion.dtype or self.dtype,
            "precision": self.criterion.precision or self.precision,
            "dot_general": self.criterion.dot_general or self.dot_general,
        }
        given |= keywords
        if self.promote_dtype is not promote_dtype:  # which the loss does chunk by chunk
            hidden, kernel, bias = self.promote_dtype(
                (hidden, kernel, given["bias"]), dtype=given["dtype"]
            )
            given |= {"bias": bias, "dtype": None}
        if return_stats:
            return self.criterion(hidden, kernel, targets, return_stats=True, **given)
        return self.criterion(hidden, kernel, targets, **given)
