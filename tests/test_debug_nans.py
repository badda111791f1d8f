"""Under jax_debug_nans, healthy input raises nothing and a bad target raises.

With jit off (`jax_disable_jit`) that flag judges each operation by itself, so no function may make
a NaN on the way that it then throws away. With jit on it judges what comes out of compiled
programs, those of an eager gradient included: there uncounted rows may hold NaN.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_laws import gradients_in_the_forward_pass

import jaxent
from jaxent import reference

INF, NAN = np.inf, np.nan
X = np.array([[1, 2, -1, 0], [0, -INF, 3, 1], [2, 1, 0, -1]], "float32")
PADDING = np.array([[1, 2, -1, 0], [-INF] * 4, [2, 1, 0, -1]], "float32")
Y, Y_PADDED = np.array([0, 2, 1]), np.array([0, -100, 1])
MASK = np.array([True, True, True, False])
ROW_MASK = np.array([[True] * 4, [False] * 4, [True, True, False, False]])
ONE_HOT = np.eye(4, dtype="float32")[Y]
EVERYTHING = {
    "weight": np.array([0, 1, 2, 0.5], "float32"),
    "label_smoothing": 0.1,
    "z_loss": 0.1,
    "logit_scale": 0.5,
    "softcap": 5.0,
}

CASES = {  # logits, targets, keywords of cross_entropy
    "minus infinity": (X, Y, {}),
    "padding of minus infinity": (PADDING, Y_PADDED, {}),
    "padding by weight": (PADDING, Y, {"sample_weight": np.array([1, 0, 1], "float32")}),
    "excluded classes": (X, Y, {"class_mask": MASK}),
    "a row without classes": (X, Y, {"class_mask": ROW_MASK}),
    "smoothing": (np.maximum(X, -9), Y, {"label_smoothing": 0.1}),
    "every option": (np.maximum(X, -9), Y, EVERYTHING),
    "every option, a row without classes": (
        np.maximum(X, -9),
        Y,
        EVERYTHING | {"class_mask": ROW_MASK},
    ),
    "padding and every option but smoothing": (
        PADDING,
        Y_PADDED,
        EVERYTHING | {"label_smoothing": 0.0, "softcap": None},
    ),
    "one-hot": (X, ONE_HOT, {}),
    "one-hot padding": (PADDING, ONE_HOT, {"sample_weight": np.array([1, 0, 1], "float32")}),
    "one-hot with weights": (X, ONE_HOT, {"weight": EVERYTHING["weight"]}),
    "the mean of nothing": (PADDING, np.full(3, -100), EVERYTHING | {"softcap": None}),
    "a class weight of 0 on minus infinity": (
        X,
        np.array([0, 1, 1]),
        {"weight": np.array([1, 0, 1, 1], "float32")},
    ),
}
HEAD_KEYWORDS = {"bias": np.array([0, -INF, 1, 0], "float32")}


def head(x):
    """Hidden states and a kernel of the same finite logits, and infinite ones as 0."""
    return np.where(np.isfinite(x), x, 0), np.eye(4, dtype="float32")


def functions():
    """Name, scalar function of its floats, and those."""
    for name, (x, y, keywords) in CASES.items():
        for module, reduction in ((jaxent, "mean"), (jaxent, "none"), (reference, "mean")):

            def loss(x, y=y, keywords=keywords, module=module, reduction=reduction):
                return jnp.sum(module.cross_entropy(x, y, reduction=reduction, **keywords))

            yield f"{module.__name__}.cross_entropy, {reduction}, {name}", loss, (x,)
        hidden, kernel = head(x)
        for forward in (False, True):

            def head_loss(h, k, y=y, keywords=keywords, forward=forward):
                with gradients_in_the_forward_pass(forward):
                    return jaxent.linear_cross_entropy(h, k, y, **keywords)

            form = "made forward" if forward else "streamed"
            yield f"linear_cross_entropy, {form}, {name}", head_loss, (hidden, kernel)
        if y.dtype != np.float32 and "sample_weight" not in keywords:
            some = {k: v for k, v in keywords.items() if k in ("class_mask", "softcap")}

            def stats(x, y=y, some=some, module=jaxent):
                found = module.token_stats(x, y, **some)
                log_prob = jnp.where(found.log_prob > -INF, found.log_prob, 0)
                return jnp.sum(log_prob + found.entropy + found.log_normalizer)

            yield f"token_stats, {name}", stats, (x,)

            def head_stats(h, k, y=y, some=some):
                found = jaxent.linear_token_stats(h, k, y, **some)
                return jnp.sum(found.log_prob + found.entropy + found.log_normalizer)

            yield f"linear_token_stats, {name}", head_stats, (hidden, kernel)
    yield from divergences()
    yield "nll", lambda x: jaxent.nll(jaxent.log_softmax(x), Y), (X,)
    yield "nll, padding", lambda x: jaxent.nll(x, Y_PADDED), (PADDING,)
    yield "nll, one-hot", lambda x: jaxent.nll(x, ONE_HOT), (X,)
    yield "log_softmax", lambda x: jaxent.log_softmax(x)[0].sum(), (X,)
    yield "log_softmax, mask", lambda x: jaxent.log_softmax(x, class_mask=MASK)[0, 0], (X,)
    yield "log_softmax, rows", lambda x: jaxent.log_softmax(x, class_mask=ROW_MASK)[0, 0], (X,)
    for forward in (False, True):

        def with_bias(h, k, forward=forward):
            with gradients_in_the_forward_pass(forward):
                return jaxent.linear_cross_entropy(h, k, np.array([0, 2, 3]), **HEAD_KEYWORDS)

        yield f"a bias of minus infinity, {forward}", with_bias, head(X)
    weights = {"sample_weight": np.array([1, 0, 1], "float32"), "weight": EVERYTHING["weight"]}
    yield (
        "total_weight",
        lambda s: jaxent.total_weight(Y, **weights | {"sample_weight": s}),
        (weights["sample_weight"],),
    )
    loss = jaxent.CrossEntropyLoss(weight=EVERYTHING["weight"], label_smoothing=0.1)
    yield "CrossEntropyLoss", lambda x: loss(x, Y), (np.maximum(X, -9),)


def divergences():
    """Those of a teacher and a student, as `functions` yields them, and their statistics."""
    temperature, gone = np.float32(1.3), HEAD_KEYWORDS["bias"]
    caps = {"softcap": 5.0, "teacher_softcap": 5.0}
    for beta in (0.0, 1.0, 0.3):
        for name, x, keywords in (
            ("minus infinity", X, {}),
            ("padding", PADDING, {"targets": Y_PADDED}),
            ("a row without classes", X, {"class_mask": ROW_MASK, **caps}),
        ):

            def total(found):
                loss, stats = found
                return loss + jnp.sum(stats.log_prob + stats.entropy + stats.log_normalizer)

            def dense(x, t, w=1.5 * x, beta=beta, keywords=keywords):
                keywords = {"beta": beta, "temperature": t, **keywords}
                return total(jaxent.distillation(x, w, return_stats=True, **keywords))

            def heads(h, k, t, beta=beta, keywords=keywords):
                keywords = {"beta": beta, "temperature": t, "bias": gone, **keywords}
                teacher = 1.5 * h, 2 * np.eye(4, dtype="float32")
                return total(
                    jaxent.linear_distillation(
                        h, k, *teacher, teacher_bias=gone, return_stats=True, **keywords
                    )
                )

            yield f"distillation, {beta}, {name}", dense, (x, temperature)
            if beta == 0.3:  # which has all terms; its loop is slow without jit
                yield f"linear_distillation, {beta}, {name}", heads, (*head(x), temperature)


FUNCTIONS = {name: (function, floats) for name, function, floats in functions()}


@contextlib.contextmanager
def flags(disable_jit=False, infs=False):
    with jax.debug_nans(True), jax.debug_infs(infs), jax.disable_jit(disable_jit):
        yield


@pytest.mark.parametrize("disable_jit", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_healthy_input_raises_nothing(name, disable_jit):
    function, floats = FUNCTIONS[name]
    with flags(disable_jit):
        value = function(*floats)
        gradients = jax.grad(function, tuple(range(len(floats))))(*floats)
    assert np.all(np.isfinite(value))
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


NANS = np.array([[1, 2, -1, 0], [NAN] * 4, [2, 1, 0, -1]], "float32")
INFS = np.where(np.isnan(NANS), INF, NANS)
UNCOUNTED = {
    "ignored": (Y_PADDED, {}),
    "ignored, every option": (Y_PADDED, EVERYTHING),
    "of weight 0": (Y, {"sample_weight": np.array([1, 0, 1], "float32")}),
    "of weight 0, one-hot": (ONE_HOT, {"sample_weight": np.array([1, 0, 1], "float32")}),
    "without classes": (Y, {"class_mask": ROW_MASK}),
}


@pytest.mark.parametrize(
    ("bad", "infs"),
    [(NANS, False), (NANS, True), (INFS, False)],
    ids=["nan", "nan, infs too", "inf"],
)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kind", UNCOUNTED)
def test_uncounted_rows_may_hold_anything(kind, jit, bad, infs):
    targets, keywords = UNCOUNTED[kind]
    hidden, kernel = bad, np.eye(4, dtype="float32")[:, ::-1].copy()
    calls = [
        (lambda x: jaxent.cross_entropy(x, targets, **keywords), (bad,)),
        (lambda h, k: jaxent.linear_cross_entropy(h, k, targets, **keywords), (hidden, kernel)),
    ]
    if targets.ndim == 1 and kind in ("ignored", "without classes"):
        stats = lambda x: sum(map(jnp.sum, jaxent.token_stats(x, targets, **keywords)[:3]))  # noqa
        calls.append((stats, (bad,)))
    with flags(infs=infs):
        for function, floats in calls:
            run = jax.value_and_grad(function, tuple(range(len(floats))))
            value, gradients = (jax.jit(run) if jit else run)(*floats)
            assert np.isfinite(value)
            assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


@pytest.mark.parametrize("disable_jit", [False, True])
def test_a_bad_target_is_found(disable_jit):
    hidden, kernel = head(X)
    targets = np.array([0, 4, 1])
    calls = [
        lambda: jaxent.cross_entropy(X, targets),
        lambda: jaxent.nll(X, targets),
        lambda: jaxent.token_stats(X, targets).log_prob,
        lambda: jaxent.linear_cross_entropy(hidden, kernel, targets),
        lambda: jaxent.linear_token_stats(hidden, kernel, targets).log_prob,
        lambda: reference.cross_entropy(X, targets),
    ]
    for call in calls:
        with flags(disable_jit), pytest.raises(FloatingPointError):
            jax.block_until_ready(call())
