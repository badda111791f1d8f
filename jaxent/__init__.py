"""Softmax cross-entropy for JAX, done completely.

```python
loss = jaxent.cross_entropy(logits, labels)  # indices or probabilities
loss = jaxent.CrossEntropyLoss(weight=class_weights, label_smoothing=0.1)(logits, labels)
```

`cross_entropy`, `nll`, `log_softmax` and `total_weight` are the functions, `CrossEntropyLoss` and
`NLLLoss` the objects; `reference` has the formulas that they equal, `porting` the way from
PyTorch.
"""

from . import porting as porting
from . import reference as reference
from .functional import cross_entropy as cross_entropy
from .functional import log_softmax as log_softmax
from .functional import nll as nll
from .functional import total_weight as total_weight
from .losses import CrossEntropyLoss as CrossEntropyLoss
from .losses import NLLLoss as NLLLoss
