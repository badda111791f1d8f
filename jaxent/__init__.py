"""Softmax cross-entropy for JAX, done completely.

```python
loss = jaxent.cross_entropy(logits, labels)  # indices or probabilities
loss = jaxent.CrossEntropyLoss(weight=class_weights, label_smoothing=0.1)(logits, labels)
```

`cross_entropy`, `nll`, `log_softmax` and `total_weight` are the functions, and
`linear_cross_entropy` the classifier head and the loss in one, without the logits;
`token_stats` and `linear_token_stats` are what logits say of each token; `SparseTargets` are
probabilities of few classes, `next_token_targets` a causal model's; `check_targets` names a target
that is out of range. `CrossEntropyLoss`,
`NLLLoss` and `LinearCrossEntropyLoss` are the objects, `LinearHead` is an `nnx.Linear` with its
loss. `metrics` are sums over an evaluation set that merge exactly; `reference` has the formulas
that the functions equal, `porting` the way from PyTorch.
"""

import importlib
from typing import TYPE_CHECKING

from . import reference
from ._check import check_targets
from ._distillation import distillation, linear_distillation
from ._linear import linear_cross_entropy
from ._losses import cross_entropy, log_softmax, nll, total_weight
from ._next_token import next_token_targets
from ._reduction import TokenStats
from ._sparse import SparseTargets
from ._stats import linear_token_stats, token_stats

if TYPE_CHECKING:
    from . import metrics, porting
    from ._flax import CrossEntropyLoss, LinearCrossEntropyLoss, NLLLoss
    from ._linear_head import LinearHead

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LinearHead",
    "NLLLoss",
    "SparseTargets",
    "TokenStats",
    "check_targets",
    "cross_entropy",
    "distillation",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_token_stats",
    "log_softmax",
    "metrics",
    "next_token_targets",
    "nll",
    "porting",
    "reference",
    "token_stats",
    "total_weight",
]

__version__ = "0.1.0"

# What needs flax.nnx, which takes as long to import as flax: on first use.
_MODULES = {
    "CrossEntropyLoss": "_flax",
    "LinearCrossEntropyLoss": "_flax",
    "LinearHead": "_linear_head",
    "NLLLoss": "_flax",
    "metrics": "metrics",
    "porting": "porting",
}

if not TYPE_CHECKING:  # a type checker that sees it finds every name

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f".{_MODULES[name]}", __name__)
        return getattr(module, name, module)


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__file__", "__name__", "__path__", "__version__"]
