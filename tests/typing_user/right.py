"""An outside project that uses every public name. Type checkers read it; it is not run.

Its arrays are arguments, since functions of JAX that make some are not fully typed.
"""

from typing import Any

import jax
from flax import nnx
from jax import Array

import jaxent
from jaxent.metrics import Calibration, Metric, TokenSums, fit_temperature
from jaxent.porting import from_torch, legacy_reduction


def product(lhs: Array, rhs: Array, dimensions: Any, **keywords: Any) -> Array:
    return lhs @ rhs


def functions(logits: Array, labels: Array, kernel: Array) -> list[Array]:
    jaxent.check_targets(labels, 10)
    stats: jaxent.TokenStats = jaxent.token_stats(logits, labels)
    log_probs: Array = jaxent.log_softmax(logits, class_axis_name=("x", "y"))
    return [
        jaxent.cross_entropy(logits, [1, 2, 3, 4], reduction="none", weight=[1.0] * 10),
        jaxent.nll(log_probs, labels, reduction="sum", ignore_index=None),
        jaxent.linear_cross_entropy(logits, kernel, labels, precision="highest"),
        jaxent.next_token_targets(labels, segment_ids=[1, 1, 2, 2], ignore_index=0),
        jaxent.linear_cross_entropy(logits, kernel, labels, dot_general=product),
        jaxent.cross_entropy(logits, jaxent.SparseTargets(labels[:, None], [[0.5]] * 4)),
        jaxent.total_weight(labels, sample_weight=labels != 0),
        jaxent.linear_token_stats(logits, kernel, labels, dtype="bfloat16").entropy,
        jaxent.distillation(logits, logits, beta=0.5, temperature=2, axis=0),
        jaxent.linear_distillation(logits, kernel, logits, kernel, teacher_class_axis=0),
        jaxent.linear_distillation(logits, kernel, logits, kernel, teacher_dot_general=product),
        # Until it is rewritten:
        jaxent.reference.cross_entropy(logits, labels),  # pyright: ignore[reportUnknownMemberType]
        stats.log_prob,
        *both(logits, labels, kernel),
    ]


def both(logits: Array, labels: Array, kernel: Array) -> list[Array]:
    loss, stats = jaxent.cross_entropy(logits, labels, z_loss=1e-4, return_stats=True)
    streamed, of_head = jaxent.linear_cross_entropy(logits, kernel, labels, return_stats=True)
    divergence, of_student = jaxent.distillation(logits, logits, return_stats=True)
    heads = logits, kernel, logits, kernel
    of_heads, of_student_head = jaxent.linear_distillation(*heads, beta=0.5, return_stats=True)
    alone: Array = jaxent.cross_entropy(logits, labels, return_stats=False)
    found = [loss, stats.counted, streamed, of_head.entropy, alone]
    return [*found, divergence, of_student.log_prob, of_heads, of_student_head.correct]


def either(logits: Array, labels: Array, kernel: Array, stats: bool) -> list[Array]:
    heads = logits, kernel, logits, kernel
    found = [
        jaxent.cross_entropy(logits, labels, return_stats=stats),
        jaxent.linear_cross_entropy(logits, kernel, labels, return_stats=stats),
        jaxent.distillation(logits, logits, return_stats=stats),
        jaxent.linear_distillation(*heads, return_stats=stats),
        jaxent.CrossEntropyLoss()(logits, labels, return_stats=stats),
        jaxent.LinearCrossEntropyLoss()(logits, kernel, labels, return_stats=stats),
    ]
    return [loss[0] if isinstance(loss, tuple) else loss for loss in found]


def objects(logits: Array, labels: Array, kernel: Array, rngs: nnx.Rngs) -> list[Array]:
    reduction = legacy_reduction(size_average=False)
    loss = jaxent.CrossEntropyLoss(label_smoothing=0.1, reduction=reduction)
    nll = jaxent.NLLLoss(ignore_index=0, axis_name="data")
    streamed = jaxent.LinearCrossEntropyLoss(dtype="bfloat16", precision=jax.lax.Precision.HIGH)
    head = jaxent.LinearHead(10, 7, use_bias=False, criterion=streamed, rngs=rngs)
    return [
        loss(logits, labels, sample_weight=labels > 0, reduction="none"),
        nll(logits, labels, weight=None),
        streamed(logits, kernel, labels, bias=kernel[0], z_loss=1e-4),
        head.loss(logits, labels, chunk_size=1024) + head(logits).sum(),
        loss(logits, labels, return_stats=True)[1].log_prob,
        head.loss(logits, labels, return_stats=True)[0],
    ]


def ported(module: object) -> jaxent.CrossEntropyLoss | jaxent.NLLLoss | jaxent.LinearHead:
    return from_torch(module) if module else jaxent.porting.from_torch(module)


def measured(logits: Array, labels: Array) -> list[Any]:
    sums = TokenSums.from_logits(logits, labels, top_k=5, ignore_index=0) + TokenSums.empty()
    sums += TokenSums.from_stats(jaxent.token_stats(logits, labels), sample_weight=labels > 0)
    calibration = Calibration.from_logits(logits, labels, num_bins=10).psum("data")
    metric = Metric(Calibration, num_bins=10)
    metric.update(logits=logits, targets=labels)
    temperature = fit_temperature(
        lambda scale: jaxent.cross_entropy(logits, labels, logit_scale=scale)
    )
    return [
        jaxent.metrics.TokenSums.merge(sums, sums).perplexity,
        calibration.reliability.count,
        metric.compute(),
        temperature,
    ]
