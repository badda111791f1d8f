"""What sums over tokens say: loss, perplexity, accuracy; long for a docstring of each."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from ._arguments import (
    ArrayOrList,
    TargetsLike,
    is_of_all_classes,
    read_class_axis,
    read_class_mask,
    read_logit_scale,
    read_logits,
    read_positive,
    read_sample_weight,
    read_softcap,
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
from ._numerics import compute_dtype
from ._reduction import TokenStats
from ._rows import Transform
from ._sparse import SparseTargets
from ._stats import token_stats
from ._targets import class_table
from ._xla import class_numbers, is_inside, take_class


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSums(Sums):
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

    KEYWORDS: ClassVar[tuple[str, ...]] = (
        *OUTPUTS,
        "stats",
        "num_bytes",
        "top_k",
        "top_k_correct",
        *OF_STATS,
    )

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
          num_bytes: how many bytes of text each target stands for, as `sample_weight` is given:
            `token_bytes[targets]`, where `token_bytes` (C,) has the length of each token's text.
          top_k_correct: bool, (...), whether the target is among the k most probable classes.

        Raises:
          TypeError, ValueError: an argument is of another dtype or shape.
        """
        if not isinstance(stats, TokenStats):
            raise TypeError(f"stats must be a jaxent.TokenStats, got {type(stats).__name__}")
        shape = stats.counted.shape
        check_size(shape)
        weight = read_sample_weight(sample_weight, shape)
        sizes = None if num_bytes is None else read_like("num_bytes", num_bytes, shape)
        top_k = None
        if top_k_correct is not None:
            top_k = read_like("top_k_correct", top_k_correct, shape)
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
        check_names(outputs, cls.KEYWORDS)
        given = with_mask(outputs)
        if outputs.get("stats") is not None:
            if late := [name for name in ("top_k", *OF_STATS) if name in outputs]:
                raise TypeError(
                    f"{', '.join(late)} is for logits: statistics are made with it, or without"
                )
            return cls.from_stats(outputs["stats"], **taken(given, (*_BESIDES, "top_k_correct")))
        return cls.from_logits(
            *logits_and_targets(given, ", or stats"),
            **taken(given, (*_BESIDES, "top_k", *OF_STATS)),
        )

    def compute(self) -> dict[str, Any]:
        """Return what every batch gives: loss, perplexity, bits_per_token, accuracy, entropy."""
        names = ("loss", "perplexity", "bits_per_token", "accuracy", "entropy")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        """Say what the sums are, and not their digits."""
        if isinstance(self.words, Tracer) or self.words.ndim != 2:
            return f"TokenSums(words={self.words.dtype}{list(self.words.shape)})"
        return (
            f"TokenSums(loss={self.loss:.6g}, accuracy={self.accuracy:.6g}, count={self.count:g})"
        )

    @property
    def loss(self) -> Any:
        """The mean of -log p, in nats."""
        return self._ratio("loss", "weight")

    @property
    def perplexity(self) -> Any:
        """The exponential of the loss."""
        return numpy_of(self.words).exp(self.loss)

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
        return ratio(self._sum(above), self._sum(below))


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
_BESIDES = ("sample_weight", "num_bytes")


@compiled
def _words_of(
    options: None, stats: TokenStats, weight: Any, num_bytes: Any, top_k_correct: Any
) -> Array:
    counted, dtype = stats.counted, stats.log_prob.dtype
    weight = jnp.ones((), dtype) if weight is None else weight.astype(dtype)
    counted &= weight != 0
    # Where the target is out of range, nothing is right or wrong.
    poison = jnp.where(jnp.isnan(stats.log_prob), stats.log_prob, 0)
    rows = [
        weight * -stats.log_prob,
        weight,
        1,
        stats.correct + poison,
        0 if top_k_correct is None else top_k_correct + poison,
        stats.entropy,
        stats.log_normalizer**2,
        0 if num_bytes is None else weight * num_bytes,
    ]
    # One after another, so that they are compiled once.
    words: Array = jax.lax.map(
        total_of, jnp.stack([jnp.where(counted, row, 0).astype(dtype) for row in rows])
    )
    # NaN by its flags: a literal one is what `jax_debug_nans` reports with jit off.
    is_absent = {"top_k_correct": top_k_correct is None, "num_bytes": num_bytes is None}
    absent = np.array([is_absent.get(name, False) for name in _ROWS])[:, None]
    is_flag = np.arange(WORDS) >= DIGITS
    return jnp.where(absent & is_flag & jnp.any(counted), 1, words)


def _top_k_correct(
    top_k: Any, logits: Any, targets: Any, stats: TokenStats, keywords: StatsKeywords
) -> Array:
    top_k = read_positive("top_k", top_k)
    if keywords.get("class_axis_name") is not None:
        raise ValueError("top_k needs all classes in one place, and class_axis_name splits them")
    x = read_logits(logits, "logits", targets)
    y, _ = read_targets(targets, keywords.get("ignore_index", -100))
    if isinstance(y, SparseTargets) or is_of_all_classes(y):
        raise ValueError("top_k is for class indices: of class probabilities none is the target")
    axis = read_class_axis(keywords.get("axis"), x, y, "logits")
    mask = read_class_mask(keywords.get("class_mask"), x.shape, axis, "logits")
    mask = class_table(mask, x.shape, axis)
    scale = read_logit_scale(keywords.get("logit_scale", 1.0))
    options = axis, min(top_k, x.shape[axis]), read_softcap(keywords.get("softcap"))
    return _is_in_top_k(options, x, y, mask, scale, stats.log_prob)


@compiled
def _is_in_top_k(
    options: tuple[int, int, float | None],
    x: Array,
    y: Array,
    mask: Any,
    scale: Any,
    log_prob: Array,
) -> Array:
    """Return whether fewer than k classes are before the target, and it has a probability."""
    axis, k, cap = options
    x = Transform.of(scale, cap, compute_dtype(x))(x)
    if mask is not None:
        x = jnp.where(mask, x, -jnp.inf)
    index = jnp.expand_dims(y, axis)
    index = jnp.where(is_inside(index, axis, x), index, -1)
    of_target = take_class((x,), index, axis)
    is_before = (x > of_target) | ((x == of_target) & (class_numbers(x, axis) < index))
    return (jnp.sum(is_before, axis, dtype=jnp.int32) < k) & jnp.isfinite(log_prob)
