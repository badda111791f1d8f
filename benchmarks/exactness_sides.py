"""What is compared in exactness: the functions, their sides, and what is right by NumPy.

A side takes floats, by which it is differentiated, and what else is given by keyword. `exact`
takes the same as NumPy arrays of a wide dtype, and returns the output and its gradients.
"""

import dataclasses
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxent
from jaxent import reference


def find(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


torch, tokamax, jax_cce = map(find, ("torch", "tokamax", "jax_cce"))

SIDES = (
    *("jaxent", "optax", "optax on float32", "plain"),
    *("torch", "tokamax", "jax-cce", "reference"),
)
INSTALLED = {"torch": torch, "tokamax": tokamax, "jax-cce": jax_cce}
IGNORE = -100
# Powers of two, which every dtype has.
SMOOTHING, Z_LOSS, SOFTCAP = 0.125, 2.0**-13, 32.0
OPTIONS = {"label_smoothing": SMOOTHING, "z_loss": Z_LOSS, "softcap": SOFTCAP}


@dataclasses.dataclass
class Function:
    """Its sides that are installed, and what is right."""

    sides: dict[str, Callable]
    exact: Callable

    def __post_init__(self):
        self.sides = {k: x for k, x in self.sides.items() if INSTALLED.get(k, True)}


def widen(x):
    return x.astype(jnp.promote_types(x.dtype, "float32"))


def pick(x, targets):
    return jnp.take_along_axis(x, targets[:, None], -1)[:, 0]


def plain(logits, targets):
    logits = widen(logits)
    return jax.nn.logsumexp(logits, -1) - pick(logits, targets)


def plain_with_options(logits, targets, weight):
    logits, weight = SOFTCAP * jnp.tanh(widen(logits) / SOFTCAP), widen(weight)
    counted = targets != IGNORE
    safe = jnp.where(counted, targets, 0)
    log_p = jax.nn.log_softmax(logits)
    loss = -(1 - SMOOTHING) * weight[safe] * pick(log_p, safe)
    loss -= SMOOTHING / logits.shape[-1] * jnp.sum(weight * log_p, -1)
    return jnp.where(counted, loss + Z_LOSS * jax.nn.logsumexp(logits, -1) ** 2, 0)


def plain_stats(logits, targets):
    log_p = jax.nn.log_softmax(widen(logits))
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
    return jnp.stack([pick(log_p, targets), jax.nn.logsumexp(widen(logits), -1), entropy])


def stats_of(function):
    def stats(logits, targets):
        found = function(logits, targets, axis=-1)
        return jnp.stack([found.log_prob, found.log_normalizer, found.entropy])

    return stats


def optax_loss(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def exact_log_softmax(x, cotangent):
    log_p = _log_probs(x)[0]
    return log_p, [cotangent - np.exp(log_p) * cotangent.sum(-1, keepdims=True)]


def exact_nll(log_probs, targets, weight):
    hot = _one_hot(log_probs, targets)
    return -weight[targets] * (hot * log_probs).sum(-1), [-weight * hot]


def exact_cross_entropy(x, targets, weight=None, label_smoothing=0, z_loss=0, softcap=None):
    counted, slope = targets != IGNORE, 1
    if softcap:
        slope = 1 - np.tanh(x / softcap) ** 2
        x = softcap * np.tanh(x / softcap)
    log_p, lse = _log_probs(x)
    q = (1 - label_smoothing) * _one_hot(x, np.where(counted, targets, 0))
    q = (q + x.dtype.type(label_smoothing) / x.shape[-1]) * (1 if weight is None else weight)
    loss = -(q * log_p).sum(-1) + z_loss * lse[:, 0] ** 2
    gradient = np.exp(log_p) * (q.sum(-1, keepdims=True) + 2 * z_loss * lse) - q
    return np.where(counted, loss, 0), [np.where(counted[:, None], gradient * slope, 0)]


def exact_stats(x, targets):
    log_p, lse = _log_probs(x)
    p, hot = np.exp(log_p), _one_hot(x, targets)
    entropy = -(p * log_p).sum(-1, keepdims=True)
    gradient = (hot - p) + p - p * (log_p + entropy)
    return np.stack([(hot * log_p).sum(-1), lse[:, 0], entropy[:, 0]]), [gradient]


def exact_head(hidden, kernel, targets):
    losses, (gradient,) = exact_cross_entropy(hidden @ kernel, targets)
    gradient /= len(hidden)
    return losses.mean(), [gradient @ kernel.T, hidden.T @ gradient]


def _log_probs(x):
    shift = x.max(-1, keepdims=True)
    log_sum = np.log(np.exp(x - shift).sum(-1, keepdims=True))
    return x - shift - log_sum, shift + log_sum


def _one_hot(x, targets):
    return (np.arange(x.shape[-1]) == targets[:, None]).astype(x.dtype)


FUNCTIONS = {
    "cross_entropy": Function(
        {
            "jaxent": lambda x, targets: jaxent.cross_entropy(x, targets, reduction="none"),
            "optax": optax_loss,
            "optax on float32": lambda x, targets: optax_loss(widen(x), targets),
            "plain": plain,
            "torch": lambda x, targets: torch.nn.functional.cross_entropy(
                x, targets, reduction="none"
            ),
            "reference": lambda x, targets: reference.cross_entropy(x, targets, reduction="none"),
        },
        exact_cross_entropy,
    ),
    "cross_entropy, all options": Function(
        {
            "jaxent": lambda x, **given: jaxent.cross_entropy(
                x, **given, **OPTIONS, reduction="none"
            ),
            "plain": plain_with_options,
            "reference": lambda x, **given: reference.cross_entropy(
                x, **given, **OPTIONS, reduction="none"
            ),
        },
        lambda x, **given: exact_cross_entropy(x, **given, **OPTIONS),
    ),
    "log_softmax": Function(
        {
            "jaxent": jaxent.log_softmax,
            "plain": jax.nn.log_softmax,
            "torch": lambda x: torch.nn.functional.log_softmax(x, -1),
            "reference": reference.log_softmax,
        },
        exact_log_softmax,
    ),
    "nll": Function(
        {
            "jaxent": lambda x, **given: jaxent.nll(x, **given, reduction="none"),
            "plain": lambda x, targets, weight: -widen(weight)[targets] * pick(widen(x), targets),
            "torch": lambda x, targets, weight: torch.nn.functional.nll_loss(
                x, targets, weight, reduction="none"
            ),
            "reference": lambda x, **given: reference.nll(x, **given, reduction="none"),
        },
        exact_nll,
    ),
    "linear_cross_entropy": Function(
        {
            "jaxent": jaxent.linear_cross_entropy,
            "optax": lambda h, k, targets: optax_loss(h @ k, targets).mean(),
            "optax on float32": lambda h, k, targets: optax_loss(widen(h @ k), targets).mean(),
            "plain": lambda h, k, targets: plain(
                jnp.matmul(h, k, preferred_element_type=widen(h).dtype), targets
            ).mean(),
            "torch": lambda h, k, targets: torch.nn.functional.linear_cross_entropy(
                h, k.T, targets, options=torch.nn.LinearCrossEntropyOptions()
            ),
            "tokamax": lambda h, k, targets: tokamax.linear_softmax_cross_entropy_loss(
                h, targets, k, reduction="mean", implementation="chunked_xla"
            ),
            "jax-cce": lambda h, k, targets: jax_cce.linear_cross_entropy(h, k.T, targets),
            "reference": reference.linear_cross_entropy,
        },
        exact_head,
    ),
    "token_stats": Function(
        {
            "jaxent": stats_of(jaxent.token_stats),
            "plain": plain_stats,
            "reference": stats_of(reference.token_stats),
        },
        exact_stats,
    ),
}
