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

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.training.metrics import MetricState
from jax import Array
from jax.typing import ArrayLike

from ._arguments import (
    ArrayOrList,
    TargetsLike,
    is_of_all_classes,
    read_array,
    read_class_axis,
    read_class_mask,
    read_logits,
    read_sample_weight,
    read_targets,
)
from ._axes import AxisName, psum, read_axis_names
from ._calls import compiled
from ._exact_sums import (
    DIGITS,
    MOST_TERMS,
    WORDS,
    added,
    normalized,
    read,
    reduced,
    total_of,
    words_of,
)
from ._reduction import TokenStats
from ._sparse import SparseTargets
from ._stats import token_stats
from ._xla import class_numbers, take_class

__all__ = ["Calibration", "Metric", "Reliability", "TokenSums", "fit_temperature"]


class StatsKeywords(TypedDict, total=False):
    """The keywords of `jaxent.token_stats`."""

    ignore_index: int | None
    axis: int | None
    class_mask: ArrayOrList | None
    logit_scale: ArrayLike
    softcap: float | None


@dataclasses.dataclass(frozen=True)
class _Sums:
    """What sums have in common: `words`, int32 (..., WORDS), that are added."""

    words: Any

    def __add__(self, other: Self) -> Self:
        """Return the sums over the tokens of both."""
        if type(other) is not type(self):
            return NotImplemented
        return dataclasses.replace(self, words=added(self.words, other.words))

    def merge(self, other: Self) -> Self:
        """Return `self + other`, by CLU's and metrax's name."""
        return self + other

    def reduce(self) -> Self:
        """Return the sums of stacked ones, over their first axis: CLU's name again.

        Such are what `jax.lax.scan`, `jax.vmap`, `jax.pmap` and
        `jax.experimental.multihost_utils.process_allgather` return.
        """
        return dataclasses.replace(self, words=reduced(jnp.asarray(self.words)))

    def psum(self, axis_name: AxisName) -> Self:
        """Return the sums over all shards of mapped axes, in `jax.shard_map`, `pmap` or `vmap`.

        Over an automatic or explicit mesh there is nothing to do.
        """
        words = jnp.asarray(self.words)
        (names,) = read_axis_names(words, axis_name=axis_name)
        return dataclasses.replace(self, words=normalized(psum(words, names)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSums(_Sums):
    r"""Sums over the counted tokens, and what is read from them.

    With :math:`\ell = -\log p_y` of a token, and its weight w,

    * `loss`, :math:`\sum w \ell / \sum w`, `perplexity`, :math:`e^\mathrm{loss}`,
      `bits_per_token`, :math:`\mathrm{loss} / \log 2`, and
      `bits_per_byte`, :math:`\sum w \ell / (\log 2 \sum w b)` with b bytes a token;
    * `accuracy` and `top_k_accuracy`, shares of the counted tokens;
    * `entropy` and `squared_log_normalizer`, means over the counted tokens;
    * `weight` and `count`, the sum of weights and the number of counted tokens.

    All are scalars: float32, float64 with x64 enabled, and NumPy's float64 of
    `jax.device_get(sums)`. The mean of nothing is NaN, as are `bits_per_byte` and
    `top_k_accuracy` where a batch came without what they need. A token that is ignored, or whose
    weight is 0, is in no sum; a NaN of a counted one shows.

    A pytree of one int32 array, `words`: it passes through `jit`, `scan`, `shard_map` and
    checkpoints. No gradient passes through it.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxent.metrics import TokenSums
      >>> sums = TokenSums.empty()
      >>> for targets in jnp.array([[0, 1], [3, -100]]):
      ...     sums += TokenSums.from_logits(jnp.zeros((2, 4)), targets)
      >>> sums.bits_per_token, sums.accuracy.round(3), sums.count
      (Array(2., dtype=float32), Array(0.333, dtype=float32), Array(3., dtype=float32))
    """

    @classmethod
    def empty(cls) -> Self:
        """Return the sums of no tokens."""
        return cls(jnp.zeros((len(_ROWS), WORDS), jnp.int32))

    @classmethod
    def from_stats(
        cls,
        stats: TokenStats,
        *,
        sample_weight: ArrayOrList | None = None,
        num_bytes: ArrayOrList | None = None,
        top_k_correct: ArrayOrList | None = None,
    ) -> Self:
        """Return the sums over the tokens of `jaxent.token_stats` or `jaxent.linear_token_stats`.

        Args:
          stats: arrays of one shape, (...).
          sample_weight: weights of the tokens in the loss; a scalar, or of as many dimensions as
            the tokens, to which it broadcasts. A token of weight 0 is not counted.
          num_bytes: how many bytes of text each token stands for, as `sample_weight` is given.
          top_k_correct: bool, (...), whether the target is among the k most probable classes.

        Raises:
          TypeError, ValueError: an argument is of another dtype or shape.
        """
        shape = stats.counted.shape
        _check_size(shape)
        weight = read_sample_weight(sample_weight, shape)
        sizes = None if num_bytes is None else _read_like("num_bytes", num_bytes, shape)
        top_k = None
        if top_k_correct is not None:
            top_k = _read_like("top_k_correct", top_k_correct, shape)
        return cls(_words_of(None, stats, weight, sizes, top_k))

    @classmethod
    def from_logits(
        cls,
        logits: ArrayOrList,
        targets: TargetsLike,
        *,
        top_k: int | None = None,
        sample_weight: ArrayOrList | None = None,
        num_bytes: ArrayOrList | None = None,
        **keywords: Unpack[StatsKeywords],
    ) -> Self:
        """Return the sums over the tokens of these logits.

        Args:
          logits, targets: as in `jaxent.token_stats`.
          top_k: the k of `top_k_accuracy`, for class indices; of equal logits, the first counts
            as larger. It costs a pass over the logits, and sorts nothing.
          sample_weight, num_bytes: as in `from_stats`.
          **keywords: those of `jaxent.token_stats`.

        Raises:
          TypeError, ValueError: as `jaxent.token_stats`, and where `top_k` is no positive integer
            or the targets are no class indices.
        """
        stats = token_stats(logits, targets, **keywords)
        found = None if top_k is None else _top_k_correct(top_k, logits, targets, stats, keywords)
        return cls.from_stats(
            stats, sample_weight=sample_weight, num_bytes=num_bytes, top_k_correct=found
        )

    @classmethod
    def from_model_output(cls, **outputs: Any) -> Self:
        """Return `from_stats` or `from_logits` of what is called so among the outputs.

        It is what CLU, metrax and `Metric` call, with the outputs that all metrics get: `stats`, or
        `logits` and `targets` (or `labels`), and the keywords of both. `mask` is a
        `sample_weight`. Others are left to other metrics.
        """
        given = _with_mask(outputs)
        if "stats" in outputs:
            return cls.from_stats(outputs["stats"], **_taken(given, (*_BESIDES, "top_k_correct")))
        return cls.from_logits(
            *_logits_and_targets(given), **_taken(given, (*_BESIDES, "top_k", *_OF_STATS))
        )

    def compute(self) -> dict[str, Any]:
        """Return what every batch gives: loss, perplexity, bits_per_token, accuracy, entropy."""
        names = ("loss", "perplexity", "bits_per_token", "accuracy", "entropy")
        return {name: getattr(self, name) for name in names}

    @property
    def loss(self) -> Any:
        """The mean of -log p, in nats."""
        return self._ratio("loss", "weight")

    @property
    def perplexity(self) -> Any:
        """The exponential of the loss."""
        return _numpy_of(self.words).exp(self.loss)

    @property
    def bits_per_token(self) -> Any:
        """The loss in bits."""
        return self.loss / np.log(2).item()

    @property
    def bits_per_byte(self) -> Any:
        """The bits of all tokens, divided by their bytes."""
        return self._ratio("loss", "num_bytes") / np.log(2).item()

    @property
    def accuracy(self) -> Any:
        """The share of tokens of which the most probable class is the target."""
        return self._ratio("correct", "count")

    @property
    def top_k_accuracy(self) -> Any:
        """The share of tokens of which one of the k most probable classes is the target."""
        return self._ratio("top_k_correct", "count")

    @property
    def entropy(self) -> Any:
        """The mean entropy of the predictions, in nats."""
        return self._ratio("entropy", "count")

    @property
    def squared_log_normalizer(self) -> Any:
        """The mean of the squared log-normalizer, of which the z-loss is a multiple."""
        return self._ratio("squared_log_normalizer", "count")

    @property
    def weight(self) -> Any:
        """The sum of the weights."""
        return self._sum("weight")

    @property
    def count(self) -> Any:
        """The number of counted tokens."""
        return self._sum("count")

    def _sum(self, name: str) -> Any:
        return read(self.words[..., _ROWS.index(name), :])

    def _ratio(self, above: str, below: str) -> Any:
        return _ratio(self._sum(above), self._sum(below))


_ROWS = (
    "loss",
    "weight",
    "count",
    "correct",
    "top_k_correct",
    "entropy",
    "squared_log_normalizer",
    "num_bytes",
)
_OF_STATS = tuple(StatsKeywords.__annotations__)
_BESIDES = ("sample_weight", "num_bytes")


@compiled
def _words_of(
    options: None, stats: TokenStats, weight: Any, num_bytes: Any, top_k_correct: Any
) -> Array:
    counted = stats.counted
    if weight is None:
        weight = jnp.ones((), stats.log_prob.dtype)
    else:
        counted &= weight != 0
        weight = weight.astype(stats.log_prob.dtype)

    def total(values: Any) -> Array:
        if values is None:  # NaN, where a token would have needed it
            missing = jnp.any(counted)
            return words_of(jnp.zeros(DIGITS, jnp.int32), missing, missing)
        return total_of(jnp.where(counted, values, 0))

    if num_bytes is not None:
        num_bytes = weight * num_bytes
    if top_k_correct is not None:
        top_k_correct = top_k_correct.astype(jnp.float32)
    rows = [
        total(weight * -stats.log_prob),
        total(weight),
        total(jnp.ones((), jnp.float32)),
        total(stats.correct.astype(jnp.float32)),
        total(top_k_correct),
        total(stats.entropy),
        total(stats.log_normalizer**2),
        total(num_bytes),
    ]
    return jnp.stack(rows)


def _top_k_correct(
    top_k: Any, logits: Any, targets: Any, stats: TokenStats, keywords: StatsKeywords
) -> Array:
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ValueError(f"top_k must be a positive integer, got {top_k!r}")
    x = read_logits(logits, "logits", targets)
    y, _ = read_targets(targets, keywords.get("ignore_index", -100))
    if isinstance(y, SparseTargets) or is_of_all_classes(y):
        raise ValueError("top_k is for class indices: of class probabilities none is the target")
    axis = read_class_axis(keywords.get("axis"), x, y, "logits")
    mask = read_class_mask(keywords.get("class_mask"), x.shape, axis, "logits")
    if mask is not None and mask.shape == (x.shape[axis],):
        mask = mask.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    return _is_in_top_k(
        (axis, top_k), x, y, mask, jnp.asarray(keywords.get("logit_scale", 1.0)), stats.log_prob
    )


@compiled
def _is_in_top_k(
    options: tuple[int, int], x: Array, y: Array, mask: Any, scale: Array, log_prob: Array
) -> Array:
    """Return whether fewer than k classes are before the target; `softcap` changes no order."""
    axis, k = options
    x = jnp.sign(scale).astype(x.dtype) * x
    if mask is not None:
        x = jnp.where(mask, x, -jnp.inf)
    index = jnp.expand_dims(y, axis)
    index = jnp.where((index >= 0) & (index < x.shape[axis]), index, -1)
    of_target = take_class((x,), index, axis)
    is_before = (x > of_target) | ((x == of_target) & (class_numbers(x, axis) < index))
    return (jnp.sum(is_before, axis, dtype=jnp.int32) < k) & ~jnp.isnan(log_prob)


class Reliability(NamedTuple):
    """The data of a reliability diagram, arrays of one number a bin."""

    count: Any
    confidence: Any
    accuracy: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Calibration(_Sums):
    r"""Sums over the counted tokens in bins of equal width of the confidence, max p.

    Bin b of M has the confidences of (b / M, (b + 1) / M], and 0 is in the first. With the sums of
    its confidences and of its right predictions,

    .. math:: \mathrm{ECE} = \sum_b |\mathrm{confidence}_b - \mathrm{correct}_b| / n

    A pytree of one int32 array, as `TokenSums`, and exact
    as those.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxent.metrics import Calibration
      >>> sums = Calibration.from_logits(jnp.zeros((4, 2)), jnp.array([0, 0, 0, 1]), num_bins=2)
      >>> sums.expected_calibration_error
      Array(0.25, dtype=float32)
      >>> sums.reliability.accuracy
      Array([0.75,  nan], dtype=float32)

    References:
      Guo et al., On calibration of modern neural networks, ICML 2017.
    """

    @classmethod
    def empty(cls, num_bins: int = 15) -> Self:
        """Return the sums of no tokens."""
        if not isinstance(num_bins, int) or num_bins < 1:
            raise ValueError(f"num_bins must be a positive integer, got {num_bins!r}")
        return cls(jnp.zeros((3, num_bins, WORDS), jnp.int32))

    @classmethod
    def from_confidence(
        cls,
        confidence: ArrayOrList,
        correct: ArrayOrList,
        *,
        counted: ArrayOrList = True,
        num_bins: int = 15,
    ) -> Self:
        """Return the sums over tokens of these confidences, of any source.

        Args:
          confidence: probabilities of the predicted classes, (...); what is outside [0, 1] is NaN.
          correct: bool, (...), whether the prediction is right.
          counted: bool, (...), or a scalar, whether the token counts.
          num_bins: how many bins.
        """
        values = read_array("confidence", confidence)
        _check_size(values.shape)
        right = _read_like("correct", correct, values.shape)
        which = _read_like("counted", counted, values.shape)
        cls.empty(num_bins)
        return cls(_bins_of(num_bins, values, right, which))

    @classmethod
    def from_logits(
        cls,
        logits: ArrayOrList,
        targets: TargetsLike,
        *,
        num_bins: int = 15,
        sample_weight: ArrayOrList | None = None,
        **keywords: Unpack[StatsKeywords],
    ) -> Self:
        """Return the sums over the tokens of these logits.

        Args:
          logits, targets, **keywords: as in `jaxent.token_stats`.
          num_bins: how many bins.
          sample_weight: a token of weight 0 is not counted; the others count alike.
        """
        stats = token_stats(logits, targets, **keywords)
        axis = read_class_axis(
            keywords.get("axis"),
            read_logits(logits, "logits"),
            read_targets(targets, keywords.get("ignore_index", -100))[0],
            "logits",
        )
        predicted: Any = {**keywords, "axis": axis, "ignore_index": -1}
        confidence = jnp.exp(token_stats(logits, stats.prediction, **predicted).log_prob)
        counted, weight = stats.counted, read_sample_weight(sample_weight, stats.counted.shape)
        if weight is not None:
            counted &= weight != 0
        return cls.from_confidence(confidence, stats.correct, counted=counted, num_bins=num_bins)

    @classmethod
    def from_model_output(cls, **outputs: Any) -> Self:
        """Return `from_logits` of what is called so among the outputs, as `TokenSums` does."""
        given = _with_mask(outputs)
        return cls.from_logits(
            *_logits_and_targets(given), **_taken(given, ("num_bins", "sample_weight", *_OF_STATS))
        )

    def compute(self) -> Any:
        """Return the expected calibration error."""
        return self.expected_calibration_error

    @property
    def expected_calibration_error(self) -> Any:
        """The mean of the bins' |confidence - accuracy|, by their counts: a scalar."""
        count, confidence, correct = self._rows()
        # Their difference is taken before it is rounded.
        flags = confidence[..., DIGITS:]
        digits = confidence[..., :DIGITS] - correct[..., :DIGITS]
        gap = read(_numpy_of(digits).concatenate([digits, flags], -1))
        return _ratio(_numpy_of(gap).abs(gap).sum(), read(count).sum())

    @property
    def reliability(self) -> Reliability:
        """The bins' counts, mean confidences and accuracies: NaN where a bin is empty."""
        count, confidence, correct = map(read, self._rows())
        return Reliability(count, _ratio(confidence, count), _ratio(correct, count))

    def _rows(self) -> tuple[Any, Any, Any]:
        return self.words[..., 0, :, :], self.words[..., 1, :, :], self.words[..., 2, :, :]


@compiled
def _bins_of(num_bins: int, confidence: Array, correct: Array, counted: Array) -> Array:
    inside = (confidence >= 0) & (confidence <= 1)
    number = jnp.where(inside, jnp.ceil(confidence * num_bins), 1).astype(jnp.int32) - 1
    confidence = jnp.where(inside, confidence, jnp.nan)
    bins = jnp.arange(num_bins).reshape(-1, *[1] * confidence.ndim)
    here = counted & (jnp.maximum(number, 0) == bins)  # (num_bins, ...)

    def totals(values: Any) -> Array:
        return jax.vmap(total_of)(jnp.where(here, values, 0))

    ones = jnp.ones((), jnp.float32)
    return jnp.stack(
        [
            totals(ones),
            totals(confidence),
            totals(correct.astype(jnp.float32)),
        ]
    )


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
        self._kind = nnx.static(kind)
        self._keywords = nnx.static(tuple(keywords.items()))
        self._words = MetricState(self._empty().words)

    def _empty(self) -> Any:
        return self._kind.empty(**_taken(dict(self._keywords), ("num_bins",)))

    @property
    def sums(self) -> Any:
        """The sums so far: all that is read from them, `psum` and `+`."""
        return self._kind(self._words[...])

    def update(self, **outputs: Any) -> None:
        """Add the tokens of a batch, by `from_model_output` of `kind`.

        Args:
          **outputs: `logits` and `targets` (or `labels`), or `stats`; `sample_weight` or `mask`,
            and keywords. What it does not know is another metric's.
        """
        added = self._kind.from_model_output(**{**dict(self._keywords), **outputs})
        self._words[...] = (self.sums + added).words

    def reset(self) -> None:
        """Forget all tokens."""
        self._words[...] = self._empty().words

    def compute(self) -> Any:
        """Return what `kind.compute` does."""
        return self.sums.compute()


def fit_temperature(
    loss: Callable[[Array], Array], *, solver: Any = None, max_steps: int = 50
) -> Array:
    r"""Return the temperature T for which `loss(1 / T)` is smallest.

    One positive number, which makes confidences right and changes no prediction. It is found by
    L-BFGS in :math:`\log T`, from T = 1.

    Args:
      loss: the loss of a held-out set as a function of `logit_scale`, of any that has it:
        `lambda scale: jaxent.cross_entropy(logits, targets, logit_scale=scale)`.
      solver: an Optax solver that is called as `optax.lbfgs()`, the default, is.
      max_steps: at most so many steps; fewer where the derivative is below 1e-6.

    Returns:
      The temperature, a scalar: float32, float64 with x64 enabled; NaN where the loss is.
      Where targets are always predicted the best is 0, and the result small.

    Raises:
      ImportError: there is no Optax, and no `solver` is given.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxent
      >>> logits, labels = jnp.array([[8.0, 0.0]] * 4), jnp.array([0, 0, 0, 1])
      >>> def loss(scale):
      ...     return jaxent.cross_entropy(logits, labels, logit_scale=scale)
      >>> f"{jaxent.metrics.fit_temperature(loss):.2f}"  # 8 / log(3)
      '7.28'

    References:
      Guo et al., On calibration of modern neural networks, ICML 2017.
    """
    if solver is None:
        try:
            import optax  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError(
                "fit_temperature needs optax.lbfgs: pip install optax, or pass a solver"
            ) from error
        solver = optax.lbfgs()

    def of_log(log_scale: Array) -> Array:
        return loss(jnp.exp(log_scale))

    def step(state: Any) -> Any:
        number, log_scale, value, slope, memory = state
        change, memory = solver.update(
            slope, memory, log_scale, value=value, grad=slope, value_fn=of_log
        )
        log_scale += change
        return number + 1, log_scale, *jax.value_and_grad(of_log)(log_scale), memory

    def goes_on(state: Any) -> Array:
        number, _, _, slope, _ = state
        return (number < max_steps) & (jnp.abs(slope) > 1e-6)

    start = jnp.zeros((), jnp.result_type(float))
    first = jnp.asarray(0), start, *jax.value_and_grad(of_log)(start), solver.init(start)
    _, log_scale, value, _, _ = jax.lax.while_loop(goes_on, step, first)
    return jnp.where(jnp.isnan(value), value, jnp.exp(-log_scale))


def _numpy_of(words: Any) -> Any:
    return np if isinstance(words, (np.ndarray, np.generic)) else jnp


def _ratio(above: Any, below: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return above / below


def _check_size(shape: tuple[int, ...]) -> None:
    if (size := math.prod(shape)) > MOST_TERMS:
        raise ValueError(
            f"tokens are {list(shape)}: {size} are more than the {MOST_TERMS} that one call adds "
            "exactly; add parts of them"
        )


def _read_like(name: str, value: Any, shape: tuple[int, ...]) -> Any:
    array = read_array(name, value)
    got = array.shape
    if got and (len(got) != len(shape) or any(a not in (1, b) for a, b in zip(got, shape))):
        raise ValueError(
            f"{name} is {list(got)}: it must be a scalar, or broadcast to the tokens' "
            f"{list(shape)}, with as many dimensions"
        )
    return array


def _with_mask(outputs: dict[str, Any]) -> dict[str, Any]:
    """Return the outputs, the mask of `nnx.MultiMetric.update` being a weight."""
    mask, weight = outputs.get("mask"), outputs.get("sample_weight")
    if mask is None:
        return outputs
    return {**outputs, "sample_weight": mask if weight is None else jnp.asarray(weight) * mask}


def _logits_and_targets(outputs: dict[str, Any]) -> tuple[Any, Any]:
    targets = outputs.get("targets", outputs.get("labels"))
    if outputs.get("logits") is None or targets is None:
        raise TypeError(
            f"logits and targets (or labels) are needed, or stats, got {', '.join(outputs)}"
        )
    return outputs["logits"], targets


def _taken(outputs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: outputs[name] for name in names if name in outputs}
