"""Whether probabilities are right: calibration error, and the temperature that mends it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self, Unpack

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from ._arguments import (
    ArrayOrList,
    TargetsLike,
    read_array,
    read_class_axis,
    read_logits,
    read_positive,
    read_sample_weight,
    read_targets,
)
from ._calls import compiled
from ._exact_sums import DIGITS, WORDS, Sums, numpy_of, ratio, read, total_of
from ._metric_inputs import (
    OF_STATS,
    OUTPUTS,
    StatsKeywords,
    check_names,
    check_size,
    logits_and_targets,
    read_like,
    taken,
    with_mask,
)
from ._stats import token_stats


class Reliability(NamedTuple):
    """The data of a reliability diagram, arrays of one number a bin."""

    count: Any
    confidence: Any
    accuracy: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Calibration(Sums):
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

    NDIM: ClassVar[int] = 3
    KEYWORDS: ClassVar[tuple[str, ...]] = (*OUTPUTS, "num_bins", *OF_STATS)

    @classmethod
    def empty(cls, num_bins: int = 15) -> Self:
        """Return the sums of no tokens."""
        num_bins = read_positive("num_bins", num_bins)
        return cls(jnp.zeros((num_bins, 3, WORDS), jnp.int32))

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
        check_size(values.shape)
        right = read_like("correct", correct, values.shape)
        which = read_like("counted", counted, values.shape)
        return cls(_bins_of(read_positive("num_bins", num_bins), values, right, which))

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
        # A target out of range is neither right nor wrong.
        confidence = jnp.where(jnp.isnan(stats.log_prob), stats.log_prob, confidence)
        counted, weight = stats.counted, read_sample_weight(sample_weight, stats.counted.shape)
        if weight is not None:
            counted &= weight != 0
        return cls.from_confidence(confidence, stats.correct, counted=counted, num_bins=num_bins)

    @classmethod
    def from_model_output(cls, **outputs: Any) -> Self:
        """Return `from_logits` of what is called so among the outputs, as `TokenSums` does."""
        check_names(outputs, cls.KEYWORDS)
        given = with_mask(outputs)
        return cls.from_logits(
            *logits_and_targets(given, " (statistics have no confidence)"),
            **taken(given, ("num_bins", "sample_weight", *OF_STATS)),
        )

    def __repr__(self) -> str:
        """Say what the sums are, and not their digits."""
        if isinstance(self.words, Tracer) or self.words.ndim != 3:
            return f"Calibration(words={self.words.dtype}{list(self.words.shape)})"
        error, bins = self.expected_calibration_error, self.words.shape[0]
        return f"Calibration(expected_calibration_error={error:.6g}, num_bins={bins})"

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
        gap = read(numpy_of(digits).concatenate([digits, flags], -1))
        return ratio(numpy_of(gap).abs(gap).sum(-1), read(count).sum(-1))

    @property
    def reliability(self) -> Reliability:
        """The bins' counts, mean confidences and accuracies: NaN where a bin is empty."""
        count, confidence, correct = map(read, self._rows())
        return Reliability(count, ratio(confidence, count), ratio(correct, count))

    def _rows(self) -> tuple[Any, Any, Any]:
        return self.words[..., 0, :], self.words[..., 1, :], self.words[..., 2, :]


@compiled
def _bins_of(num_bins: int, confidence: Array, correct: Array, counted: Array) -> Array:
    confidence = confidence.astype(jnp.promote_types(confidence.dtype, jnp.float32))
    inside = (confidence >= 0) & (confidence <= 1)
    number = jnp.where(inside, jnp.ceil(confidence * num_bins), 1).astype(jnp.int32) - 1
    confidence = jnp.where(inside, confidence, jnp.nan)
    number = jnp.where(counted, jnp.maximum(number, 0), -1)
    ones = jnp.ones_like(confidence)
    rows = jnp.stack([ones, confidence, jnp.where(correct, ones, 0)])

    def words_of(b: Array) -> Array:
        words: Array = jax.lax.map(lambda row: total_of(jnp.where(number == b, row, 0)), rows)
        return words

    words: Array = jax.lax.map(words_of, jnp.arange(num_bins))  # (num_bins, 3, WORDS)
    return words


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
      max_steps: at most so many steps; fewer where the derivative by :math:`\log T` is a few
        roundings of the loss.

    Returns:
      The temperature, a scalar: float32, float64 with x64 enabled; NaN where the loss is not
      finite. Where targets are always predicted the best is 0, and the result small.

    Raises:
      ImportError: there is no Optax, and no `solver` is given.
      TypeError: `loss` returns no scalar.

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
        number, _, value, slope, _ = state
        least = 32 * jnp.finfo(slope.dtype).eps * jnp.abs(value)
        more: Array = (number < max_steps) & (jnp.abs(slope) > least)
        return more

    start = jnp.zeros((), jnp.result_type(float))
    shapes = [list(x.shape) for x in jax.tree.leaves(jax.eval_shape(of_log, start))]
    if shapes != [[]]:
        got = f"arrays of {' and '.join(map(str, shapes))}" if shapes else "nothing"
        raise TypeError(f"loss must return a scalar, got {got}: give it a reduction")
    first = jnp.asarray(0), start, *jax.value_and_grad(of_log)(start), solver.init(start)
    _, log_scale, value, _, _ = jax.lax.while_loop(goes_on, step, first)
    temperature: Array = jnp.where(jnp.isfinite(value), jnp.exp(-log_scale), value - value)
    return temperature
