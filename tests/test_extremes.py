"""Logits at the ends of their range, bad targets, empty batches: the stated outcomes."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from calls import assert_close, eps
from jax.experimental import checkify

import jaxent
from jaxent import reference
from jaxent._forms import forced

INF, NAN = np.inf, np.nan

pytestmark = pytest.mark.usefixtures("sums")


def loss_and_gradient(logits, targets, **keywords):
    def total(logits):
        losses = jaxent.cross_entropy(logits, targets, reduction="none", **keywords)
        return losses.sum(), losses

    logits = jnp.asarray(logits)
    (_, losses), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
    return np.asarray(losses), np.asarray(gradient)


@pytest.mark.parametrize("size", [1e4, 3e38, -1e4, -3e38])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_equal_logits_of_any_size_give_log_c(size, smoothing):
    logits = np.full((2, 4), size, "float32")
    losses, gradient = loss_and_gradient(logits, np.array([0, 3]), label_smoothing=smoothing)
    assert_close(losses, np.full(2, np.log(4), "float32"), 2)
    one_hot = np.eye(4)[[0, 3]]
    target = (1 - smoothing) * one_hot + smoothing / 4
    assert_close(gradient, (0.25 - target).astype("float32"), 2)


def test_opposite_logits_of_1e4():
    logits = np.array([[1e4, -1e4], [1e4, -1e4]], "float32")
    losses, gradient = loss_and_gradient(logits, np.array([0, 1]))
    np.testing.assert_array_equal(losses, [0, 2e4])
    np.testing.assert_array_equal(gradient, [[0, 0], [1, -1]])


def test_opposite_logits_of_3e38_overflow_to_infinity_only_at_the_target():
    logits = np.array([[3e38, -3e38], [3e38, -3e38]], "float32")
    losses, gradient = loss_and_gradient(logits, np.array([0, 1]))
    np.testing.assert_array_equal(losses, [0, INF])  # 6e38 is no float32
    np.testing.assert_array_equal(gradient, [[0, 0], [1, -1]])


def test_large_offset_loses_nothing():
    random = np.random.default_rng(0)
    logits = (random.normal(size=(256, 100)) + 1e4).astype("float32")
    targets = random.integers(0, 100, 256)
    losses, _ = loss_and_gradient(logits, targets)
    with jax.enable_x64(True):
        exact = reference.cross_entropy(logits.astype("float64"), targets, reduction="none")
    np.testing.assert_allclose(losses, exact, rtol=1e-6)


def test_minus_infinity_elsewhere_is_a_class_of_probability_zero():
    logits = np.array([[-INF, 0, 1, 2]], "float32")
    losses, gradient = loss_and_gradient(logits, np.array([1]))
    short, short_gradient = loss_and_gradient(logits[:, 1:], np.array([0]))
    np.testing.assert_array_equal(losses, short)
    np.testing.assert_array_equal(gradient, np.concatenate([[[0]], short_gradient], 1))


def test_all_but_one_minus_infinity_is_certain():
    losses, gradient = loss_and_gradient(np.array([[-INF, 5, -INF]], "float32"), np.array([1]))
    np.testing.assert_array_equal(losses, [0])
    np.testing.assert_array_equal(gradient, [[0, 0, 0]])


def test_minus_infinity_at_the_target_is_an_infinite_loss_with_a_finite_gradient():
    losses, gradient = loss_and_gradient(np.array([[-INF, 0, 0]], "float32"), np.array([0]))
    np.testing.assert_array_equal(losses, [INF])
    np.testing.assert_array_equal(gradient, [[-1, 0.5, 0.5]])


def test_smoothing_gives_minus_infinity_target_mass():
    losses, gradient = loss_and_gradient(
        np.array([[-INF, 0]], "float32"), np.array([1]), label_smoothing=0.5
    )
    np.testing.assert_array_equal(losses, [INF])
    np.testing.assert_array_equal(gradient, [[-0.25, 0.25]])


def test_zero_target_mass_on_minus_infinity_is_zero():
    logits = np.array([[-INF, 0, 0]], "float32")
    targets = np.array([[0, 1, 0]], "float32")
    losses, gradient = loss_and_gradient(logits, targets)
    assert_close(losses, np.array([np.log(2)], "float32"), 1)
    np.testing.assert_array_equal(gradient, [[0, -0.5, 0.5]])
    by_target = jax.grad(lambda t: jaxent.cross_entropy(logits, t))(targets)
    assert_close(by_target, np.array([[0, np.log(2), np.log(2)]], "float32"), 1)


def test_zero_class_weight_on_minus_infinity_is_zero():
    logits = np.array([[-INF, 0, 0]], "float32")
    weight = np.array([0, 1, 1], "float32")
    for smoothing in (0.5, jnp.asarray(0.5)):
        losses, gradient = loss_and_gradient(
            logits, np.array([1]), weight=weight, label_smoothing=smoothing
        )
        expected = (0.5 + 2 * 0.5 / 3) * np.log(2)
        assert_close(losses, np.array([expected], "float32"), 2)
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("num_classes", [1009, 32000])
@pytest.mark.parametrize("bad", [NAN, -INF])
def test_a_row_that_is_not_finite_costs_the_others_no_digit(num_classes, bad):
    random = np.random.default_rng(0)
    logits = random.normal(size=(4, num_classes)).astype("float32")
    targets = random.dirichlet(np.ones(num_classes), 4).astype("float32")
    logits[3, 0], targets[3, 0] = bad, 0
    weight = jnp.array([1, 1, 1, 0 if np.isnan(bad) else 1])
    with forced(one_loop=False):  # which nobody takes for so many classes
        losses, _ = loss_and_gradient(logits, targets, sample_weight=weight)
    x, p = logits.astype("float64"), targets.astype("float64")
    x -= x.max(-1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    log_p[3, 0] = 0
    assert_close(losses[:3], -(p * log_p).sum(-1)[:3].astype("float32"), 4)
    if np.isinf(bad):
        assert_close(losses[3], np.float32(-(p * log_p).sum(-1)[3]), 4)


@pytest.mark.parametrize("num_classes", [3, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smoothing_over_the_lowest_numbers_is_finite(num_classes, dtype):
    lowest = jnp.finfo(dtype).min
    logits = jnp.zeros((2, num_classes), dtype).at[0, 1:].set(lowest)
    for smoothing in (0.1, jnp.asarray(0.1)):
        losses, gradient = loss_and_gradient(logits, np.array([0, 1]), label_smoothing=smoothing)
        mean = -float(lowest) * (num_classes - 1) / num_classes
        assert_close(losses, np.array([0.1 * mean, np.log(num_classes)], "float32"), 4)
        assert np.all(np.isfinite(gradient))


def test_traced_smoothing_of_zero_ignores_minus_infinity():
    logits = np.array([[-INF, 0, 0]], "float32")
    losses, gradient = loss_and_gradient(logits, np.array([1]), label_smoothing=jnp.asarray(0.0))
    assert_close(losses, np.array([np.log(2)], "float32"), 1)
    np.testing.assert_array_equal(gradient, [[0, -0.5, 0.5]])


def test_infinite_class_weight_hurts_only_its_class():
    weight = np.array([1, INF], "float32")  # 1 / count of a class that never occurs
    losses, gradient = loss_and_gradient(np.zeros((1, 2), "float32"), np.array([0]), weight=weight)
    assert_close(losses, np.array([np.log(2)], "float32"), 1)
    np.testing.assert_array_equal(gradient, [[-0.5, 0.5]])
    assert np.isfinite(jaxent.cross_entropy(np.zeros((1, 2)), np.array([0]), weight=weight))


@pytest.mark.parametrize("module", [jaxent, reference])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_class_weights_that_nobody_asks_for_reach_no_derivative_of_smoothing(module, bad):
    logits, targets = jnp.ones((2, 3)), jnp.array([-100, -100])
    weight = jnp.array([1.0, bad, 2.0])

    def dense(logits, weight, smoothing):
        return module.cross_entropy(logits, targets, weight=weight, label_smoothing=smoothing)

    def head(logits, weight, smoothing):
        return module.linear_cross_entropy(
            logits, jnp.eye(3), targets, weight=weight, label_smoothing=smoothing
        )

    for loss in (dense, head):
        value, gradients = jax.value_and_grad(loss, (0, 1, 2))(logits, weight, 0.1)
        assert value == 0
        assert all(jnp.all(gradient == 0) for gradient in gradients)


def test_infinite_class_weight_of_the_target_is_infinite_with_the_gradients_signs():
    """Not NaN: each class's share of it is infinite."""
    weight = np.array([INF, 1, 1], "float32")
    losses, gradient = loss_and_gradient(np.zeros((1, 3), "float32"), np.array([0]), weight=weight)
    np.testing.assert_array_equal(losses, [INF])
    np.testing.assert_array_equal(gradient, [[-INF, INF, INF]])


@pytest.mark.parametrize("module", [jaxent, reference])
@pytest.mark.parametrize("bad", [INF, NAN])
def test_bad_weight_of_an_uncounted_class_reaches_nothing(module, bad):
    logits, targets = np.array([[1, 2, 3], [0.5, -1, 2]], "float32"), np.array([0, 2])
    expected = -jaxent.log_softmax(logits)[1, 2]
    weight = np.array([bad, 1, 1], "float32")
    for keywords in ({"ignore_index": 0}, {"sample_weight": np.array([0.0, 1.0])}):
        loss = module.cross_entropy(logits, targets, weight=weight, **keywords)
        assert_close(loss, expected, 2)


@pytest.mark.parametrize("module", [jaxent, reference])
def test_squared_normalizer_that_overflows_stays_with_its_example(module):
    logits, targets = np.array([[1, 2, 3], [1e25, 0, 0]], "float32"), np.array([1, -100])
    loss = module.cross_entropy(logits, targets, z_loss=0.1)
    assert_close(loss, module.cross_entropy(logits[:1], targets[:1], z_loss=0.1), 2)
    counted = module.cross_entropy(logits, np.array([1, 0]), z_loss=jnp.float32(0))
    assert_close(counted, module.cross_entropy(logits, np.array([1, 0])), 2)


@pytest.mark.parametrize("module", [jaxent, reference])
def test_sample_weight_of_zero_has_a_derivative_at_any_finite_loss(module):
    logits, targets = np.array([[1e25, 1e20]], "float32"), np.array([1])
    gradient = jax.grad(
        lambda s: module.cross_entropy(logits, targets, sample_weight=s, reduction="sum")
    )(jnp.zeros(1))
    assert_close(gradient, np.array([1e25 - 1e20], "float32"), 1)


@pytest.mark.parametrize("module", [jaxent, reference])
def test_smoothing_of_zero_beside_minus_infinity_has_the_other_classes_derivative(module):
    logits = np.array([[-INF, 1.0, 2.0]], "float32")
    gradient = jax.grad(lambda e: module.cross_entropy(logits, [1], label_smoothing=e))(0.0)
    log_probs = jaxent.log_softmax(logits)[0]
    assert_close(gradient, log_probs[1] - (log_probs[1] + log_probs[2]) / 3, 4)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_in_a_counted_row_shows_in_its_row_alone(bad):
    logits = np.array([[bad, 0, 0], [0, 1, 2]], "float32")
    losses, gradient = loss_and_gradient(logits, np.array([1, 1]))
    assert np.isnan(losses[0])
    assert np.isfinite(losses[1])
    assert np.all(np.isnan(gradient[0]))
    assert np.all(np.isfinite(gradient[1]))


@pytest.mark.parametrize("module", [jaxent, reference])
@pytest.mark.parametrize("how", ["ignored", "weightless", "classless"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 9.0}])
def test_nan_in_an_uncounted_row_reaches_nothing(module, how, bad, options):
    logits = np.array([[bad, bad, bad], [0, 1, 2]], "float32")
    arguments = {"targets": np.array([0, 1]), "weight": np.array([1, 2, 3], "float32")}
    if how == "ignored":
        arguments["targets"] = np.array([-100, 1])
    elif how == "weightless":
        arguments["sample_weight"] = np.array([0, 1], "float32")
    else:
        arguments["class_mask"] = np.array([[False], [True]]) & np.ones((2, 3), bool)

    def mean(logits, weight):
        return module.cross_entropy(logits, **(arguments | {"weight": weight}), **options)

    value, (gradient, by_weight) = jax.jit(jax.value_and_grad(mean, (0, 1)))(
        logits, arguments["weight"]
    )
    alone = jaxent.cross_entropy(logits[1:], np.array([1]), weight=arguments["weight"], **options)
    assert_close(value, alone, 2)
    np.testing.assert_array_equal(gradient[0], 0)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient[1] != 0)
    assert np.all(np.isfinite(by_weight))


QUIET = {
    "a class weight of 0": (np.array([0, 1]), {"weight": np.array([0, 1], "float32")}),
    "no target mass": (np.array([[0, 0], [0, 1]], "float32"), {}),
    "probabilities of a class of weight 0": (
        np.array([[1, 0], [0, 1]], "float32"),
        {"weight": np.array([0, 1], "float32")},
    ),
    "smoothing of weights 0": (
        np.array([0, 1]),
        {"weight": np.array([0, 0], "float32"), "label_smoothing": 0.1},
    ),
    "traced smoothing": (
        np.array([0, 1]),
        {"weight": np.array([0, 1], "float32"), "label_smoothing": jnp.float32(0.0)},
    ),
}


@pytest.mark.parametrize("kind", QUIET)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_nan_in_a_counted_row_shows_where_its_loss_has_no_weight(kind, reduction):
    targets, keywords = QUIET[kind]
    keywords = keywords | {"reduction": reduction}
    for bad in ([NAN, 0], [NAN, NAN]):
        logits = np.array([bad, [0.0, 1.0]], "float32")
        if reduction == "mean" and kind == "smoothing of weights 0":
            continue
        for module in (jaxent, reference):
            losses = np.asarray(module.cross_entropy(logits, targets, **keywords))
            assert np.isnan(losses.ravel()[0]), module
            assert reduction != "none" or np.isfinite(losses[1]), module
            eye = np.eye(2, dtype="float32")
            losses = np.asarray(module.linear_cross_entropy(logits, eye, targets, **keywords))
            assert np.isnan(losses.ravel()[0]), module
        uncounted = jaxent.cross_entropy(
            logits, targets, sample_weight=np.array([0, 1], "float32"), **keywords
        )
        assert np.all(np.isfinite(uncounted))


@pytest.mark.parametrize("module", [jaxent, reference])
def test_nan_weight_of_a_class_of_uncounted_mass_reaches_no_gradient(module):
    logits, targets = np.array([[1, 2, 0.5], [0, -1, 3]], "float32"), np.eye(3, dtype="float32")[:2]
    keywords = {"weight": np.array([1, NAN, 1], "float32"), "sample_weight": [1.0, 0.0]}
    loss = lambda x, t: module.cross_entropy(x, t, **keywords)  # noqa: E731
    gradient, by_target = jax.grad(loss, (0, 1))(logits, targets)
    expected = jax.grad(lambda x: module.cross_entropy(x, np.array([0, -100])))(logits)
    assert_close(gradient, expected, 2)
    np.testing.assert_array_equal(by_target[1], 0)
    by_kernel = jax.grad(lambda k: module.linear_cross_entropy(logits, k, targets, **keywords))
    assert np.all(np.isfinite(by_kernel(np.eye(3, dtype="float32"))))


@pytest.mark.parametrize("module", [jaxent, reference])
def test_a_lost_row_of_weight_0_has_no_derivative_by_its_weight(module):
    logits = np.array([[1, 2, 0.5], [NAN, -1, 3]], "float32")

    def loss(weight):
        return module.cross_entropy(logits, [0, 1], sample_weight=weight, reduction="sum")

    gradient = jax.grad(loss)(jnp.array([1.0, 0.0]))
    assert gradient[0] > 1
    assert gradient[1] == 0


@pytest.mark.parametrize("module", [jaxent, reference])
def test_uncounted_mass_on_an_excluded_class_reaches_no_gradient(module):
    logits, targets = np.array([[1, 2, 0.5], [0, -1, 3]], "float32"), np.ones((2, 3), "float32")
    targets[0, 2] = 0
    keywords = {"class_mask": np.array([True, True, False]), "sample_weight": [1.0, 0.0]}
    loss = lambda x, t: module.cross_entropy(x, t, **keywords)  # noqa: E731
    for gradient in jax.grad(loss, (0, 1))(logits, targets):
        assert np.all(np.isfinite(gradient[0, :2]))
        np.testing.assert_array_equal(gradient[1], 0)


@pytest.mark.parametrize("module", [jaxent, reference])
def test_a_denominator_of_0_is_the_constant_1(module):
    logits, weight = np.array([[1, 2, 0.5], [0, -1, 3]], "float32"), jnp.array([0.0, 1, 1])

    def loss(weight, reduction):
        return module.cross_entropy(
            logits, [0, 0], weight=weight, label_smoothing=0.1, reduction=reduction
        )

    mean, total = (jax.value_and_grad(loss)(weight, reduction) for reduction in ("mean", "sum"))
    jax.tree.map(lambda a, b: assert_close(a, b, 4), mean, total)


@pytest.mark.parametrize("module", [jaxent, reference])
def test_prediction_of_nan_is_argmax_and_of_no_class_none(module):
    logits = np.array([[1, NAN, 2, NAN], [1, 2, 3, 0]], "float32")
    eye = np.eye(4, dtype="float32")
    mask = np.array([[True] * 4, [False] * 4])
    for chunk_size in (None, 1, 2):
        stats = module.linear_token_stats(
            np.ones((1, 1), "float32"), logits[:1], [1], chunk_size=chunk_size
        )
        assert stats.prediction == 1
        assert stats.correct
        stats = module.linear_token_stats(
            np.nan_to_num(logits), eye, [1, 1], class_mask=mask, chunk_size=chunk_size
        )
        assert stats.prediction[1] == -1
        assert not stats.correct[1]
    assert module.token_stats(logits, [1, 1]).prediction[0] == 1


@pytest.mark.parametrize("num_classes", [127, 128, 1000, 5000])
def test_predictions_of_many_classes_are_argmax(num_classes):
    random = np.random.default_rng(num_classes)
    logits = random.integers(0, num_classes, (40, num_classes)).astype("float32")  # with equals
    stats = jaxent.token_stats(logits, np.zeros(40, "int32"))
    np.testing.assert_array_equal(stats.prediction, logits.argmax(-1))
    half = jnp.asarray(logits, "bfloat16")
    stats = jaxent.token_stats(half, np.zeros(40, "int32"), class_mask=jnp.arange(num_classes) > 3)
    expected = half.at[:, :4].set(-jnp.inf).argmax(-1)
    np.testing.assert_array_equal(stats.prediction, expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_entropy_over_chunks_of_the_smallest_logits_is_finite(chunk_size):
    lowest = np.finfo("float32").min
    bias = np.array([lowest, lowest, 0], "float32")
    for order in ([0, 1, 2], [2, 0, 1]):
        stats = jaxent.linear_token_stats(
            np.ones((2, 1), "float32"),
            np.zeros((1, 3), "float32"),
            [0, 1],
            bias=bias[order],
            chunk_size=chunk_size,
        )
        np.testing.assert_array_equal(stats.entropy, 0)


@pytest.mark.parametrize("module", [jaxent, reference])
def test_nan_log_probabilities_show_where_they_are_read(module):
    log_probs, weight = np.array([[NAN, -1.0]], "float32"), np.array([0, 1], "float32")
    assert np.isnan(module.nll(log_probs, np.array([0]), weight=weight, reduction="sum"))
    assert np.isnan(module.nll(log_probs, np.array([[0, 1]], "float32")))
    assert module.nll(log_probs, np.array([1])) == 1  # an index reads its own class alone


@pytest.mark.parametrize("module", [jaxent, reference])
@pytest.mark.parametrize(("shape", "axis"), [((0,), -1), ((10, 0), 1), ((0, 10), 0), ((0, 3), 1)])
def test_log_softmax_of_no_classes_or_rows_is_empty(module, shape, axis):
    for dtype in ("float32", "bfloat16"):
        x = jnp.zeros(shape, dtype)
        found = jax.jit(lambda x: module.log_softmax(x, axis))(x)
        assert found.shape == shape
        assert found.dtype == dtype
        gradient = jax.grad(lambda x: module.log_softmax(x, axis).astype("float32").sum())(x)
        assert gradient.shape == shape
    mask = jnp.ones(shape[axis], bool)
    assert module.log_softmax(jnp.zeros(shape), axis, class_mask=mask).shape == shape


def test_nan_probability_targets_of_weight_zero_reach_nothing():
    targets = np.array([[NAN, NAN], [0.5, 0.5]], "float32")
    logits = np.array([[NAN, 1], [1, 2]], "float32")

    def mean(logits, targets, weight):
        return jaxent.cross_entropy(
            logits, targets, weight=weight, sample_weight=np.array([False, True])
        )

    value, grads = jax.value_and_grad(mean, (0, 1, 2))(logits, targets, np.ones(2, "float32"))
    assert_close(value, jaxent.cross_entropy(logits[1:], targets[1:]), 2)
    assert all(np.all(np.isfinite(grad)) for grad in grads)


def test_float16_near_its_maximum():
    logits = np.array([[65504, -65504, 0], [65504, 65504, 0]], "float16")
    losses, gradient = loss_and_gradient(logits, np.array([1, 0]))
    assert losses.dtype == "float32"
    assert gradient.dtype == "float16"
    assert_close(losses, np.array([131008, np.log(2)], "float32"), 1)
    np.testing.assert_array_equal(gradient, [[1, -1, 0], [-0.5, 0.5, 0]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_log_softmax_keeps_its_dtype_and_is_exact_to_its_rounding(dtype):
    random = np.random.default_rng(0)
    logits = jnp.asarray(10 * random.normal(size=(8, 50)), dtype)
    log_probs = jaxent.log_softmax(logits)
    assert log_probs.dtype == dtype
    with jax.enable_x64(True):
        exact = np.asarray(reference.log_softmax(logits.astype("float64")))
    error = np.abs(np.asarray(log_probs, "float64") - exact)
    assert np.all(error <= 0.51 * eps(dtype) * np.abs(exact) + 4 * eps("float32") * 50)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_loss_is_as_exact_as_float32(dtype):
    random = np.random.default_rng(0)
    logits = jnp.asarray(3 * random.normal(size=(64, 1000)), dtype)
    targets = random.integers(0, 1000, 64)
    loss = jaxent.cross_entropy(logits, targets)
    with jax.enable_x64(True):
        exact = reference.cross_entropy(logits.astype("float64"), targets)
    assert loss.dtype == "float32"
    assert_close(loss, exact, 4, "float32")


# Targets out of range


@pytest.mark.parametrize("target", [-1, 3, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("function", [jaxent.cross_entropy, jaxent.nll])
def test_target_out_of_range_is_nan_in_its_own_row(function, target):
    logits = jnp.array([[0.5, 1, 2], [1, 0, -1.0], [0, 0, 1.0]])
    targets = jnp.array([0, target, 2])
    clean = jnp.array([0, 1, 2])

    def losses(targets, reduction="none", **keywords):
        return lambda x: function(x, targets, reduction=reduction, **keywords)

    np.testing.assert_array_equal(np.isnan(losses(targets)(logits)), [False, True, False])
    np.testing.assert_array_equal(losses(targets)(logits)[::2], losses(clean)(logits)[::2])
    for reduction in ("sum", "mean"):
        assert np.isnan(losses(targets, reduction)(logits))
        gradient = jax.grad(losses(targets, reduction))(logits)
        assert np.all(np.isnan(gradient[1]))
        expected = jax.grad(losses(clean, reduction))(logits)
        np.testing.assert_array_equal(gradient[::2], expected[::2])


def test_target_out_of_range_poisons_the_gradients_that_examples_share():
    logits, targets = jnp.zeros((2, 3)), jnp.array([0, 3])

    def mean(weight, smoothing, z_loss, sample_weight):
        return jaxent.cross_entropy(
            logits,
            targets,
            weight=weight,
            label_smoothing=smoothing,
            z_loss=z_loss,
            sample_weight=sample_weight,
        )

    arguments = jnp.ones(3), 0.1, 0.1, jnp.ones(2)
    for name, gradient in zip(
        ("weight", "smoothing", "z_loss"), jax.grad(mean, (0, 1, 2))(*arguments)
    ):
        assert np.all(np.isnan(gradient)), name
    hard = jax.grad(lambda w: jaxent.cross_entropy(logits, targets, weight=w))(jnp.ones(3))
    assert np.all(np.isnan(hard))


def test_uncounted_target_out_of_range_is_no_error():
    logits, targets = jnp.array([[0.0, 1.0], [2.0, 1.0]]), jnp.array([7, 0])
    keywords = {"sample_weight": jnp.array([0.0, 1.0])}
    loss, gradient = jax.value_and_grad(lambda x: jaxent.cross_entropy(x, targets, **keywords))(
        logits
    )
    assert_close(loss, jaxent.cross_entropy(logits[1:], targets[1:]), 1)
    np.testing.assert_array_equal(gradient[0], 0)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_narrow_targets_neither_wrap_nor_alias(dtype):
    limits = jnp.iinfo(dtype)
    logits = np.random.default_rng(0).normal(size=(3, 300)).astype("float32")
    targets = np.array([limits.min, 5, min(limits.max, 2**31 - 1)], dtype)
    losses = np.asarray(jaxent.cross_entropy(logits, targets, reduction="none"))
    plain = -np.asarray(jaxent.log_softmax(logits))
    expected = [plain[i, t] if 0 <= t < 300 else NAN for i, t in enumerate(targets.tolist())]
    assert_close(losses, np.array(expected, "float32"), 4)
    # -100 is 156 in eight bits: no such target is ignored.
    if limits.min == 0:
        alias = np.array([limits.max - 99] * 3).astype(dtype)
        aliased = np.asarray(jaxent.cross_entropy(logits, alias, reduction="none"))
        assert np.all(np.isnan(aliased) if limits.max > 300 else aliased > 0)


def test_int64_targets_beyond_32_bits_are_out_of_range():
    with jax.enable_x64(True):
        targets = jnp.array([2**32, 1, -(2**32)])
        losses = jaxent.cross_entropy(jnp.zeros((3, 3)), targets, reduction="none")
        np.testing.assert_array_equal(np.isnan(losses), [True, False, True])


@pytest.mark.parametrize("module", [jaxent, reference])
def test_the_largest_uint32_may_mark_padding(module):
    targets = np.array([1, 2**32 - 1], "uint32")
    loss = module.cross_entropy(jnp.zeros((2, 3)), targets, ignore_index=2**32 - 1)
    assert_close(loss, np.log(3).astype("float32"), 2)


def test_ignore_index_none_counts_minus_100():
    loss = jaxent.cross_entropy(jnp.zeros((2, 3)), jnp.array([0, -100]), ignore_index=None)
    assert np.isnan(loss)


@pytest.mark.parametrize(
    "function",
    [
        jaxent.cross_entropy,
        jaxent.nll,
        lambda x, y: jaxent.token_stats(x, y).log_prob,
        lambda x, y: jaxent.cross_entropy(x, y, label_smoothing=0.1, z_loss=0.1),
        lambda x, y: jaxent.linear_cross_entropy(x, jnp.eye(10), y),
    ],
    ids=["cross_entropy", "nll", "token_stats", "options", "linear_cross_entropy"],
)
def test_checkifys_nan_checks_find_a_bad_target_and_nothing_else(function):
    checked = jax.jit(checkify.checkify(function, errors=checkify.nan_checks))
    logits = jnp.zeros((2, 10)).at[0, 1].set(-1e30)
    for bad in (17, -7):
        error, _ = checked(logits, jnp.array([3, bad]))
        with pytest.raises(checkify.JaxRuntimeError, match="nan"):
            error.throw()
    error, loss = checked(logits, jnp.array([3, -100]))
    error.throw()
    assert np.all(np.isfinite(loss))


# Nothing to average, one class, and traced numbers out of range


@pytest.mark.parametrize("kind", ["empty", "ignored", "weightless"])
def test_mean_over_nothing_is_zero_with_zero_gradient(kind):
    logits = jnp.zeros((0 if kind == "empty" else 2, 3))
    targets = jnp.full(len(logits), -100 if kind == "ignored" else 0)
    weights = jnp.zeros(len(logits)) if kind == "weightless" else None

    def mean(x):
        return jaxent.cross_entropy(x, targets, sample_weight=weights, z_loss=0.1)

    loss, gradient = jax.value_and_grad(mean)(logits)
    assert loss == 0
    np.testing.assert_array_equal(gradient, np.zeros(logits.shape))


@pytest.mark.parametrize("module", [jaxent, reference])
def test_strict_modes_of_jax_are_passed(module):
    logits, targets = jnp.ones((2, 4, 3)), jnp.zeros((2, 3), int)
    keywords = {
        "weight": jnp.ones(4),
        "class_mask": jnp.array([True, True, True, False]),
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "softcap": 5.0,
        "sample_weight": jnp.ones((2, 3), bool),
    }
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for t in (targets, logits / 4):
            loss = module.cross_entropy(logits, t, axis=1, **keywords)
            assert np.isfinite(loss) or t is not targets
        module.nll(logits, targets, axis=1, weight=jnp.ones(4))
        module.log_softmax(logits, 1)
        module.total_weight(targets, weight=jnp.ones(4))


def test_no_nan_is_made_on_the_way_to_a_row_without_classes():
    mask = jnp.array([[True, True, True], [False, False, False]])
    with jax.debug_nans(True):
        loss = jaxent.cross_entropy(jnp.zeros((2, 3)), jnp.array([0, 1]), class_mask=mask)
    assert_close(loss, np.log(3).astype("float32"), 2)


def test_a_symbolic_batch_is_exported():
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = [((batch, 4), "float32"), ((batch,), "int32"), ((batch,), "float32")]
    exported = jax.export.export(
        jax.jit(lambda x, y, s: jaxent.cross_entropy(x, y, sample_weight=s, label_smoothing=0.1))
    )(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    loss = exported.call(jnp.zeros((5, 4)), jnp.zeros(5, "int32"), jnp.ones(5))
    assert_close(loss, np.log(4).astype("float32"), 2)


def test_one_class_is_certain():
    losses, gradient = loss_and_gradient(np.array([[3.0], [-5.0]], "float32"), np.array([0, 0]))
    np.testing.assert_array_equal(losses, 0)
    np.testing.assert_array_equal(gradient, np.zeros((2, 1)))


def test_excluded_target_is_an_infinite_loss():
    losses, gradient = loss_and_gradient(
        np.zeros((1, 3), "float32"), np.array([2]), class_mask=np.array([True, True, False])
    )
    np.testing.assert_array_equal(losses, [INF])
    np.testing.assert_array_equal(gradient, [[0.5, 0.5, 0]])


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, NAN])
@pytest.mark.parametrize("module", [jaxent, reference])
def test_traced_smoothing_out_of_range_is_nan(module, smoothing):
    loss = jax.jit(
        lambda e: module.cross_entropy(jnp.zeros((2, 3)), jnp.array([0, 1]), label_smoothing=e)
    )
    assert np.isnan(loss(smoothing))
    assert np.isfinite(loss(0.1))


def test_softcap_bounds_what_infinity_does():
    losses, gradient = loss_and_gradient(
        np.array([[INF, -INF]], "float32"), np.array([1]), softcap=2.0
    )
    assert_close(losses, np.array([np.log1p(np.exp(4))], "float32"), 2)
    np.testing.assert_array_equal(gradient, [[0, 0]])
