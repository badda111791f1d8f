"""From PyTorch: its loss modules and its deprecated flags, read as ours.

```python
loss = jaxent.porting.from_torch(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
loss(logits, labels)

head = jaxent.porting.from_torch(torch.nn.LinearCrossEntropyLoss(512, 32000))
head.loss(hidden, tokens)
```

torch is never imported: a module is known by the names of its classes.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ._arguments import Reduction
from ._flax import CrossEntropyLoss, LinearCrossEntropyLoss, NLLLoss
from ._linear_head import LinearHead


def legacy_reduction(
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
) -> Reduction:
    """Return the reduction that PyTorch's deprecated `size_average` and `reduce` stand for.

    Args:
      size_average: False is "sum", True or None "mean".
      reduce: False is "none", whatever `size_average` says.
      reduction: what holds where both flags are None; else it is overruled, as in PyTorch.

    Returns:
      "mean", "sum" or "none"; `reduction` as it came where both flags are None.

    Warns:
      DeprecationWarning: a flag is not None; the warning names the reduction to pass.

    Example:
      >>> import jaxent
      >>> from jaxent.porting import legacy_reduction
      >>> jaxent.CrossEntropyLoss(reduction=legacy_reduction(size_average=False))
      CrossEntropyLoss(reduction='sum')
    """
    if size_average is None and reduce is None:
        return reduction
    if reduce is not None and not reduce:
        reduction = "none"
    else:
        reduction = "mean" if size_average is None or size_average else "sum"
    warnings.warn(
        f"size_average and reduce are deprecated: pass reduction={reduction!r}",
        DeprecationWarning,
        stacklevel=2,
    )
    return reduction


def from_torch(module: Any) -> CrossEntropyLoss | NLLLoss | LinearHead:
    """Return what computes here what a PyTorch loss module computes.

    A loss becomes a loss object, and `torch.nn.LinearCrossEntropyLoss`, which owns a linear
    layer, a `jaxent.LinearHead` whose `loss` it is. The weights are copied: what happens to
    the module later does not reach them. A head's parameters keep their dtype (float64 where
    JAX has it); its `options`, how to chunk, are left behind.

    The class axis is 1, so 1-D logits and (N, C, d1..dK) are read as PyTorch reads them. A
    non-negative `ignore_index` is refused with probability targets at the call, by PyTorch
    and here.

    Args:
      module: a `torch.nn.CrossEntropyLoss`, `torch.nn.NLLLoss` or
        `torch.nn.LinearCrossEntropyLoss`, on any device, or an instance of a subclass that
        computes the same (it has no `forward` of its own).

    Returns:
      `jaxent.CrossEntropyLoss`, `jaxent.NLLLoss` or `jaxent.LinearHead`.

    Raises:
      TypeError: `module` is anything else.
      ValueError: its configuration is one that PyTorch, too, refuses when called; or it is a
        linear cross-entropy with `out_features`, for which docs/porting/pytorch.md has a
        `jax.vmap`.

    Example:
      >>> import torch  # doctest: +SKIP
      >>> module = torch.nn.CrossEntropyLoss(torch.ones(3), ignore_index=0)  # doctest: +SKIP
      >>> jaxent.porting.from_torch(module)  # doctest: +SKIP
      CrossEntropyLoss(weight=float32[3], ignore_index=0, axis=1)
      >>> module = torch.nn.LinearCrossEntropyLoss(8, 1000, reduction="sum")  # doctest: +SKIP
      >>> jaxent.porting.from_torch(module).criterion  # doctest: +SKIP
      LinearCrossEntropyLoss(reduction='sum')
    """
    taken = {"CrossEntropyLoss", "NLLLoss", "LinearCrossEntropyLoss"}
    # By package too: other libraries' losses of the same name mean other things.
    bases = [c for c in type(module).__mro__ if c.__module__.partition(".")[0] == "torch"]
    base = next((c for c in bases if c.__name__ in taken), None)
    if base is None or type(module).forward is not base.forward:  # type: ignore[attr-defined]
        raise TypeError(
            "from_torch takes a torch.nn.CrossEntropyLoss, a torch.nn.NLLLoss, a "
            "torch.nn.LinearCrossEntropyLoss or a subclass that leaves forward alone, got "
            f"{type(module).__module__}.{type(module).__qualname__}"
        )
    keywords = {"ignore_index": module.ignore_index, "reduction": module.reduction}
    if module.weight is not None:
        keywords["weight"] = np.asarray(module.weight.tolist())  # of any device and dtype
    if base.__name__ == "NLLLoss":
        return NLLLoss(**keywords, axis=1)
    keywords["label_smoothing"] = module.label_smoothing
    if base.__name__ == "CrossEntropyLoss":
        return CrossEntropyLoss(**keywords, axis=1)
    return _read_linear(module, keywords)


def _read_linear(module: Any, keywords: dict[str, Any]) -> LinearHead:
    if module.out_features:
        raise ValueError(
            f"module has out_features={tuple(module.out_features)}, several heads in one: call "
            "one jaxent.linear_cross_entropy under jax.vmap, as in docs/porting/pytorch.md, "
            'section "Several codebooks a token"'
        )
    if keywords["ignore_index"] is None:  # so that PyTorch can refuse one with probabilities
        keywords["ignore_index"] = -100
    kernel = _read_parameter(module.linear.weight.T)  # (D, C)
    head = LinearHead(
        *kernel.shape,
        use_bias=module.linear.bias is not None,
        param_dtype=kernel.dtype,
        kernel_init=nnx.initializers.zeros,  # nothing is drawn
        criterion=LinearCrossEntropyLoss(**keywords),
        rngs=nnx.Rngs(0),
    )
    head.kernel[...] = kernel
    if head.bias is not None:
        head.bias[...] = _read_parameter(module.linear.bias)
    return head


def _read_parameter(tensor: Any) -> jax.Array:
    dtype = jnp.dtype(str(tensor.dtype).removeprefix("torch."))
    tensor = tensor.detach().cpu()
    if dtype == jnp.bfloat16:  # which torch has no NumPy type for
        tensor = tensor.float()
    return jnp.array(tensor.numpy().astype(dtype, copy=False))
