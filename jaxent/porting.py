"""From PyTorch: its loss modules and its deprecated flags, read as ours.

```python
loss = jaxent.porting.from_torch(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
loss(logits, labels)
```

torch is never imported: a module is known by the names of its classes.
"""

import warnings
from typing import Any

import numpy as np

from .losses import CrossEntropyLoss, NLLLoss


def legacy_reduction(
    size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean"
) -> str:
    """The reduction that PyTorch's deprecated `size_average` and `reduce` stand for.

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


def from_torch(module: Any) -> CrossEntropyLoss | NLLLoss:
    """The loss object that computes what a PyTorch loss module computes.

    The weight is copied: what happens to the module later does not reach it. The class axis
    is 1, so 1-D logits and (N, C, d1..dK) are read as PyTorch reads them. A non-negative
    `ignore_index` is refused with probability targets at the call, by PyTorch and here.

    Args:
      module: a `torch.nn.CrossEntropyLoss` or `torch.nn.NLLLoss`, on any device, or an
        instance of a subclass that computes the same (it has no `forward` of its own).

    Returns:
      `jaxent.CrossEntropyLoss` or `jaxent.NLLLoss`.

    Raises:
      TypeError: `module` is anything else.
      ValueError: its configuration is one that PyTorch, too, refuses when called.

    Example:
      >>> import torch  # doctest: +SKIP
      >>> module = torch.nn.CrossEntropyLoss(torch.ones(3), ignore_index=0)  # doctest: +SKIP
      >>> jaxent.porting.from_torch(module)  # doctest: +SKIP
      CrossEntropyLoss(weight=float32[3], ignore_index=0, axis=1)
    """
    taken = {"CrossEntropyLoss": CrossEntropyLoss, "NLLLoss": NLLLoss}
    # By package too: other libraries' losses of the same name mean other things.
    bases = [c for c in type(module).__mro__ if c.__module__.partition(".")[0] == "torch"]
    base = next((c for c in bases if c.__name__ in taken), None)
    if base is None or type(module).forward is not base.forward:  # type: ignore[attr-defined]
        raise TypeError(
            "from_torch takes a torch.nn.CrossEntropyLoss, a torch.nn.NLLLoss or a subclass "
            f"that leaves forward alone, got {type(module).__module__}.{type(module).__qualname__}"
        )
    keywords = {"ignore_index": module.ignore_index, "reduction": module.reduction, "axis": 1}
    if module.weight is not None:
        keywords["weight"] = np.asarray(module.weight.tolist())  # of any device and dtype
    if base.__name__ == "CrossEntropyLoss":
        keywords["label_smoothing"] = module.label_smoothing
    return taken[base.__name__](**keywords)
