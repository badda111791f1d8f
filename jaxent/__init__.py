"""Softmax cross-entropy for JAX, done completely.

```python
loss = jaxent.cross_entropy(logits, labels)  # indices or probabilities
loss = jaxent.CrossEntropyLoss(weight=class_weights, label_smoothing=0.1)(logits, labels)
```

`cross_entropy`, `nll`, `log_softmax` and `total_weight` are the functions, and
`linear_cross_entropy` the classifier head and the loss in one, without the logits;
`token_stats` and `linear_token_stats` are what logits say of each token. `CrossEntropyLoss`,
`NLLLoss` and `LinearCrossEntropyLoss` are the objects, `LinearHead` is an `nnx.Linear` with its
loss. `reference` has the formulas that they equal, `porting` the way from PyTorch.
"""

from . import porting as porting
from . import reference as reference
from .functional import cross_entropy as cross_entropy
from .functional import log_softmax as log_softmax
from .functional import nll as nll
from .functional import total_weight as total_weight
from .head import LinearHead as LinearHead
from .linear import linear_cross_entropy as linear_cross_entropy
from .losses import CrossEntropyLoss as CrossEntropyLoss
from .losses import LinearCrossEntropyLoss as LinearCrossEntropyLoss
from .losses import NLLLoss as NLLLoss
from .stats import TokenStats as TokenStats
from .stats import linear_token_stats as linear_token_stats
from .stats import token_stats as token_stats
