"""The losses on logits that jaxent is measured against, as functions of the same arguments."""

import functools

import jax
import jax.numpy as jnp
import optax

import jaxent

from .exactness_sides import IGNORE, torch


def plain(logits, targets, axis, weight=None, label_smoothing=0.0):
    """The formula in `jax.numpy`, as a project writes it, in float32."""
    return _mean(
        jax.nn.log_softmax(logits.astype(jnp.float32), axis), targets, axis, weight, label_smoothing
    )


def optax_as_is(logits, targets, axis, weight=None, label_smoothing=0.0):
    if weight is None and not label_smoothing:
        safe = jnp.where(targets == IGNORE, 0, targets)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, safe, axis=axis)
        return losses.mean()
    # It has neither; its users smooth a one-hot target and weight and mask the result.
    counted = targets != IGNORE
    one_hot = jax.nn.one_hot(jnp.where(counted, targets, 0), logits.shape[axis], axis=axis)
    labels = optax.smooth_labels(jnp.moveaxis(one_hot, axis, -1), label_smoothing)
    labels = jnp.moveaxis(labels, -1, axis)
    scale = jnp.expand_dims(weight, [i for i in range(logits.ndim) if i != axis % logits.ndim])
    losses = optax.losses.softmax_cross_entropy(logits, labels * scale, axis=axis)
    weights = jnp.where(counted, weight[jnp.where(counted, targets, 0)], 0)
    return jnp.sum(jnp.where(counted, losses, 0)) / jnp.sum(weights)


def optax_on_float32(logits, *arguments, **options):
    return optax_as_is(logits.astype(jnp.float32), *arguments, **options)


def by_hand(logits, targets, axis):
    """The smallest program that means what jaxent's does of class indices, with its gradient.

    It leaves ignored targets out, makes NaN of others out of range, and gives a loss near 0 to its
    last digit: the target's exponential is not among those that it sums up, but multiplied by 0,
    or, where that is slower, selected away.
    """
    return _by_hand(axis, logits, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_hand(axis, logits, targets):
    return _by_hand_fwd(axis, logits, targets)[0]


def _by_hand_fwd(axis, logits, targets):
    targets = jnp.expand_dims(targets, axis)
    counted = targets != IGNORE
    outside = counted & ((targets < 0) | (targets >= logits.shape[axis]))
    index = jnp.where(counted & ~outside, targets, 0)
    x = logits.astype(jnp.float32)
    top = x.max(axis, keepdims=True)
    left = jnp.take_along_axis(logits, index, axis).astype(jnp.float32) - top
    numbers = jax.lax.broadcasted_iota(jnp.float32, logits.shape, axis % logits.ndim)
    if axis == -1 and logits.shape[-1] > 16:
        distance = numbers - index.astype(jnp.float32)
        terms = jnp.exp(x - top) * jnp.minimum(distance * distance, 1)
    else:
        terms = jnp.where(numbers == index.astype(jnp.float32), 0, jnp.exp(x - top))
    others = terms.sum(axis, keepdims=True)
    losses = jnp.log1p(others + (jnp.exp(left) - 1)) - left
    losses = jnp.where(outside, jnp.nan, jnp.where(counted, losses, 0))
    count = jnp.maximum(counted.sum(), 1)
    share = jnp.where(counted, 1 / (others + jnp.exp(left)) / count, 0)
    return losses.sum() / count, (logits, index, top, others, share)


def _by_hand_bwd(axis, residuals, cotangent):
    logits, index, top, others, share = residuals
    share *= cotangent
    numbers = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis % logits.ndim)
    exps = jnp.exp(logits.astype(jnp.float32) - top) * share
    others = jnp.where(share == 0, 0, -others * share)
    gradient = jnp.where(numbers == index, others, jnp.where(share == 0, 0, exps))
    return gradient.astype(logits.dtype), None


_by_hand.defvjp(_by_hand_fwd, _by_hand_bwd)


def _mean(log_probs, targets, axis, weight, label_smoothing):
    if weight is None:
        index = jnp.expand_dims(targets, axis)
        return -jnp.mean(jnp.take_along_axis(log_probs, index, axis))
    counted = targets != IGNORE
    safe = jnp.expand_dims(jnp.where(counted, targets, 0), axis)
    picked = jnp.take_along_axis(log_probs, safe, axis)
    scale = jnp.expand_dims(
        weight, [i for i in range(log_probs.ndim) if i != axis % log_probs.ndim]
    )
    weights = jnp.where(jnp.expand_dims(counted, axis), weight[safe], 0)
    smooth = jnp.sum(scale * log_probs, axis, keepdims=True) / log_probs.shape[axis]
    smooth = jnp.where(jnp.expand_dims(counted, axis), smooth, 0)
    loss = -(1 - label_smoothing) * weights * picked - label_smoothing * smooth
    return jnp.sum(loss) / jnp.sum(weights)


JAX_SIDES = {
    "jaxent": jaxent.cross_entropy,
    "optax": optax_as_is,
    "optax on float32": optax_on_float32,
    "plain": plain,
    "by hand": by_hand,
    "reference": jaxent.reference.cross_entropy,
}
SIDES = (*JAX_SIDES, "torch")


def pytorch(logits, targets, axis, weight=None, label_smoothing=0.0):
    logits = logits.movedim(axis, 1) if axis % logits.ndim != 1 else logits
    return torch.nn.functional.cross_entropy(
        logits, targets, weight=weight, label_smoothing=label_smoothing, ignore_index=IGNORE
    )


def runner(side, logits, targets, axis, options, gradients):
    """A function of nothing that computes the mean loss and, if asked, the logits' gradient.

    `logits` is a JAX array, of any float dtype; `options` hold a NumPy `weight`.
    """
    if side == "torch":
        return _torch_runner(logits, targets, axis, options, gradients)
    loss = functools.partial(JAX_SIDES[side], axis=axis, **_weight(options, jnp.asarray))
    function = jax.jit(jax.value_and_grad(loss) if gradients else loss)
    targets = jnp.asarray(targets)
    return lambda: jax.block_until_ready(function(logits, targets))


def _torch_runner(logits, targets, axis, options, gradients):
    dtype = getattr(torch, str(logits.dtype))
    leaf = torch.tensor(jax.device_get(logits.astype("float32"))).to(dtype)
    targets = torch.tensor(targets).long()
    # In half precision it wants the weights in half precision too.
    options = _weight(options, lambda w: torch.tensor(w).to(dtype))
    if not gradients:
        return lambda: pytorch(leaf, targets, axis, **options)
    leaf.requires_grad_()

    def both():
        loss = pytorch(leaf, targets, axis, **options)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    return both


def _weight(options, convert):
    return {k: convert(v) if k == "weight" else v for k, v in options.items()}
