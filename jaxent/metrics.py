"""Metrics that are exact: sums over tokens that any order and any split leave the same.

```python
sums = jaxent.metrics.TokenSums.empty()
for hidden, targets in batches:
    sums += jaxent.metrics.TokenSums.from_stats(jaxent.linear_token_stats(hidden, kernel, targets))
sums.perplexity, sums.accuracy
```

**How they are exact.** Every float32 is an integer times 2^-149, and below 2^277 times that. So a
sum is kept as such an integer, of 40 digits to the base 256, each an int32 of its own (320 bits, of
which 43 are for the number of terms). Adding integers has no rounding: no order of the terms, split
into batches, `psum` or compiler changes one bit, and neither x64 nor a compensated sum, which a
compiler may undo, is needed. Float64 terms are taken apart into three float32 (72 bits). Two more
int32 say whether an infinity was added, of either sign; NaN is both.

Rounding takes place where a number is read: to float32, or to float64 with x64 enabled or on the
host: `jax.device_get(sums).loss` is a NumPy float64.
"""

from __future__ import annotations

from typing import Any

from flax import nnx
from flax.nnx.training.metrics import MetricState

from ._calibration import Calibration, Reliability, fit_temperature
from ._metric_inputs import check_names, taken
from ._token_sums import TokenSums

__all__ = ["Calibration", "Metric", "Reliability", "TokenSums", "fit_temperature"]


class Metric(nnx.Metric):
    """`TokenSums` or `Calibration` as an `nnx.Metric`, alone or in an `nnx.MultiMetric`.

    Args:
      kind: `TokenSums` or `Calibration`.
      **keywords: numbers that every `update` is given besides: `top_k=5`, `num_bins=10`,
        `ignore_index=0`, `axis=1`. Arrays are given to `update`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxent.metrics import Metric
      >>> metrics = nnx.MultiMetric(tokens=Metric(top_k=2), accuracy=nnx.metrics.Accuracy())
      >>> metrics.update(logits=jnp.zeros((2, 4)), labels=jnp.array([0, 1]))
      >>> metrics.compute()["tokens"]["bits_per_token"]
      Array(2., dtype=float32)
      >>> metrics.tokens.sums.top_k_accuracy
      Array(1., dtype=float32)
    """

    def __init__(
        self, kind: type[TokenSums] | type[Calibration] = TokenSums, **keywords: Any
    ) -> None:
        if not (isinstance(kind, type) and issubclass(kind, (TokenSums, Calibration))):
            raise TypeError(f"kind must be TokenSums or Calibration, got {kind!r}")
        check_names(keywords, kind.KEYWORDS, only=True)
        self._kind = nnx.static(kind)
        self._keywords = nnx.static(tuple(keywords.items()))
        self._words = MetricState(self._empty().words)

    def _empty(self) -> Any:
        return self._kind.empty(**taken(dict(self._keywords), ("num_bins",)))

    @property
    def sums(self) -> Any:
        """The sums so far: all that is read from them, `psum` and `+`."""
        return self._kind(self._words[...])

    def update(self, **outputs: Any) -> None:
        """Add the tokens of a batch, by `from_model_output` of `kind`.

        Args:
          **outputs: `logits` and `targets` (or `labels`), or `stats`; `sample_weight` or `mask`,
            and keywords. What it does not know is another metric's, except what looks like a
            misspelt name of these.
        """
        added = self._kind.from_model_output(**{**dict(self._keywords), **outputs})
        self._words[...] = (self.sums + added).words

    def reset(self) -> None:
        """Forget all tokens."""
        self._words[...] = self._empty().words

    def compute(self) -> Any:
        """Return what `kind.compute` does, and `top_k_accuracy` where it has a `top_k`."""
        found = self.sums.compute()
        if "top_k" in dict(self._keywords):
            found = {**found, "top_k_accuracy": self.sums.top_k_accuracy}
        return found
