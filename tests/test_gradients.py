"""Derivatives: exact, of second order, and under transformations."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import EVERY_OPTION, NLL_OPTIONS, assert_close, calls, evaluate, examples
from hypothesis import given

import jaxent
from jaxent import reference
from jaxent._forms import forced

both_sums = pytest.mark.usefixtures("sums")
law = examples(12)
SHAPES = [((4, 5), 1), ((3, 5, 2), 1), ((5,), 0)]
TRACED = ("weight", "sample_weight", "label_smoothing", "z_loss")


def in_float64(call):
    """The same call, its floats widened: what the call means, exactly."""
    return call.replace(**{k: np.asarray(v).astype("float64") for k, v in call.floats.items()})


def summed(name):
    """The size of what cancels in a gradient that examples share: lse^2 is up to 100 here."""
    return None if name in ("logits", "targets") else 100


@both_sums
@examples(25)
@given(calls(EVERY_OPTION, SHAPES, ["float32", "bfloat16", "float16"]))
def test_gradients_equal_those_of_the_formula_in_float64(call):
    loss, grads = evaluate(jaxent.cross_entropy, call)
    exact_loss, exact_grads = evaluate(reference.cross_entropy, in_float64(call))
    # float32 inside whatever the input: the loss, and gradients of float32 arguments, err by
    # a few float32 ulps; half-precision gradients by half an ulp of their own, once.
    assert_close(loss, exact_loss, 8, "float32")
    for name, grad in grads.items():
        ulps = 8 if grad.dtype == "float32" else 0.6
        assert_close(grad, exact_grads[name], ulps, grad.dtype, summed(name))


@law
@given(calls(NLL_OPTIONS, SHAPES, ["float32", "bfloat16"]))
def test_nll_gradients_equal_those_of_the_formula_in_float64(call):
    loss, grads = evaluate(jaxent.nll, call)
    exact_loss, exact_grads = evaluate(reference.nll, in_float64(call))
    assert_close(loss, exact_loss, 8, "float32")
    for name, grad in grads.items():
        ulps = 8 if grad.dtype == "float32" else 0.6
        assert_close(grad, exact_grads[name], ulps, grad.dtype, summed(name))


@law
@given(calls(EVERY_OPTION, SHAPES, ["float64"]), st.integers(0, 2**32 - 1))
def test_gradients_equal_finite_differences(call, seed):
    if call.get("sample_weight") is not None:  # whether an example counts is not continuous
        weight = np.asarray(call.get("sample_weight"), "float64")
        call = call.replace(sample_weight=np.where(weight == 0, 0.5, weight))
    _, grads = evaluate(jaxent.cross_entropy, call)
    random = np.random.default_rng(seed)
    step = 1e-5

    @jax.jit
    def loss(floats):
        arguments = call.others | floats
        values = jaxent.cross_entropy(arguments.pop("logits"), **arguments)
        return jnp.sum(values * call.cotangent) if values.ndim else values

    with jax.enable_x64(True):
        for name, value in call.floats.items():
            direction = random.normal(size=np.shape(value))
            if name == "targets":  # mass on a class that does not exist is infinite
                direction *= value != 0
            ahead, behind = (
                loss(call.floats | {name: value + sign * step * direction}) for sign in (1, -1)
            )
            # Central differences err by step^2 and by eps / step of the loss.
            np.testing.assert_allclose(
                np.sum(grads[name] * direction), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7
            )


def make(function, reduction="mean", **keywords):
    """A scalar function of (logits, weight, label_smoothing, z_loss, sample_weight)."""
    random = np.random.default_rng(0)
    targets = jnp.asarray(random.integers(0, 5, (4, 3)))
    targets = targets.at[0, 0].set(-100)
    mask = jnp.array([True, True, True, True, False]) if keywords.pop("masked", False) else None
    targets = jnp.where(targets == 4, 0, targets)
    cotangent = jnp.asarray(random.normal(size=(4, 3)))

    def loss(floats):
        values = function(
            floats["logits"],
            targets,
            axis=1,
            reduction=reduction,
            class_mask=mask,
            **{k: v for k, v in floats.items() if k != "logits"},
            **keywords,
        )
        return jnp.sum(values * cotangent) if values.ndim else values

    floats = {
        "logits": jnp.asarray(random.normal(size=(4, 5, 3))),
        "weight": jnp.asarray(random.uniform(0.5, 2, 5)),
        "label_smoothing": jnp.asarray(0.2),
        "z_loss": jnp.asarray(0.1),
        "sample_weight": jnp.asarray(random.uniform(0, 1, (4, 3))).at[1].set(0),
    }
    return loss, floats


CONFIGURATIONS = {
    "mean": {},
    "none": {"reduction": "none"},
    "softcap": {"reduction": "sum", "softcap": 2.0, "masked": True},
}


@pytest.fixture(params=CONFIGURATIONS)
def configured(request):
    with jax.enable_x64(True):
        loss, floats = make(jaxent.cross_entropy, **CONFIGURATIONS[request.param])
        plain, _ = make(reference.cross_entropy, **CONFIGURATIONS[request.param])
        yield loss, plain, floats


def assert_trees_close(actual, expected):
    # float64; the primitive and the formula add in different orders.
    scale = max(1.0, *(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13 * scale),
        actual,
        expected,
    )


def test_hessian_of_every_pair_of_arguments(configured):
    loss, plain, floats = configured
    actual = jax.jit(jax.hessian(loss))(floats)
    assert_trees_close(actual, jax.jit(jax.jacfwd(jax.jacfwd(plain)))(floats))


@both_sums
def test_jvp_of_grad_and_grad_of_grad_and_linearize(configured):
    loss, plain, floats = configured
    tangent = jax.tree.map(jnp.cos, floats)

    def along(tree):
        return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(tangent)))

    _, expected = jax.jit(lambda x: jax.jvp(jax.grad(plain), (x,), (tangent,)))(floats)
    _, forward = jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (tangent,)))(floats)
    assert_trees_close(forward, expected)
    reverse = jax.jit(jax.grad(lambda x: along(jax.grad(loss)(x))))(floats)
    assert_trees_close(reverse, expected)
    _, linear = jax.linearize(jax.grad(loss), floats)
    assert_trees_close(linear(tangent), expected)


def test_third_order(configured):
    loss, plain, floats = configured

    def third(loss):
        def squared(x):
            grads = jax.grad(loss)(x)
            return sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))

        return jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(squared)(x)["logits"] ** 2)))(floats)

    assert_trees_close(third(loss), third(plain))


def test_checkpoint_and_scan(configured):
    loss, _, floats = configured
    expected = jax.jit(jax.grad(loss))(floats)
    assert_trees_close(jax.jit(jax.grad(jax.checkpoint(loss)))(floats), expected)

    def twice(floats):
        def step(total, scale):
            return total + scale * loss(floats), None

        return jax.lax.scan(step, 0.0, jnp.array([0.25, 0.75]))[0]

    assert_trees_close(jax.jit(jax.grad(twice))(floats), expected)


@pytest.mark.parametrize("name", ["logits", "weight", "label_smoothing", "z_loss", "sample_weight"])
def test_vmap_over_any_argument(configured, name):
    loss, _, floats = configured
    stacked = jnp.stack([floats[name], 0.5 * floats[name]])
    grads = jax.jit(jax.vmap(lambda v: jax.grad(loss)(floats | {name: v})))(stacked)
    for i, value in enumerate(stacked):
        expected = jax.grad(loss)(floats | {name: value})
        assert_trees_close(jax.tree.map(lambda g, i=i: g[i], grads), expected)


def test_vmap_over_targets_and_class_mask():
    random = np.random.default_rng(0)
    logits = random.normal(size=(4, 5)).astype("float32")
    targets = random.integers(0, 4, (3, 4))
    masks = np.ones((3, 5), bool)
    masks[1, 4] = False

    def grad(targets, mask):
        loss = functools.partial(jaxent.cross_entropy, targets=targets, class_mask=mask)
        return jax.grad(lambda x: loss(x))(logits)

    together = jax.jit(jax.vmap(grad))(targets, masks)
    for i in range(3):
        assert_close(together[i], grad(targets[i], masks[i]), 4)


@pytest.mark.parametrize("targets", [np.arange(6).reshape(3, 2) % 4, np.ones((3, 2, 4), "float32")])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}])
def test_gradient_of_logits_that_a_vmap_over_targets_shares(targets, options):
    logits = np.random.default_rng(0).normal(size=(2, 4)).astype("float32")

    def total(function):
        return lambda x: jax.vmap(lambda y: function(x, y, axis=-1, **options))(targets).sum()

    actual = jax.jit(jax.grad(total(jaxent.cross_entropy)))(logits)
    assert_close(actual, jax.jit(jax.grad(total(reference.cross_entropy)))(logits), 16)


def test_numpy_constants_under_vmap_and_jit():
    logits, targets = np.zeros((3, 4), "float32"), np.zeros(3, int)

    @jax.jit
    def loss(scale):
        each = jax.vmap(lambda x, y: jaxent.cross_entropy(x, y, reduction="none"))
        return scale * each(logits, targets)

    assert_close(loss(1.0), np.full(3, np.log(4), "float32"), 2)


@pytest.mark.parametrize("name", ["log_softmax", "nll", "cross_entropy"])
def test_reference_has_forward_mode_which_the_primitive_refuses(name):
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    arguments = () if name == "log_softmax" else (jnp.array([0, 2]),)
    plain, fast = getattr(reference, name), getattr(jaxent, name)
    forward = jax.jacfwd(plain)(logits, *arguments)
    assert_close(forward, jax.jacrev(fast)(logits, *arguments), 8)
    with pytest.raises(TypeError, match=rf"take jaxent\.reference\.{name}"):
        jax.jacfwd(fast)(logits, *arguments)


# At 0 the derivatives are the formula's, not 0.


def test_sample_weight_of_zero_has_the_loss_of_its_example_as_derivative():
    logits, targets = jnp.array([[1.0, 2.0], [0.0, 3.0]]), jnp.array([0, 0])
    each = jaxent.cross_entropy(logits, targets, reduction="none")
    grad = jax.grad(
        lambda s: jaxent.cross_entropy(logits, targets, sample_weight=s, reduction="sum")
    )(jnp.array([0.0, 0.0]))
    assert_close(grad, each, 2)


@both_sums
def test_target_probability_of_zero_has_minus_log_p_as_derivative():
    logits, targets = jnp.array([[1.0, 2.0, -1.0]]), jnp.array([[0.0, 1.0, 0.0]])
    grad = jax.grad(lambda t: jaxent.cross_entropy(logits, t))(targets)
    assert_close(grad, -jaxent.log_softmax(logits), 2)


@both_sums
def test_smoothing_of_zero_and_z_loss_of_zero_have_derivatives():
    logits, targets = jnp.array([[1.0, 2.0, -1.0]]), jnp.array([1])
    smoothing, z_loss = jax.grad(
        lambda e, z: jaxent.cross_entropy(logits, targets, label_smoothing=e, z_loss=z), (0, 1)
    )(0.0, 0.0)
    log_probs = jaxent.log_softmax(logits)[0]
    assert_close(smoothing, log_probs[1] - log_probs.mean(), 4)
    assert_close(z_loss, jax.nn.logsumexp(logits) ** 2, 4)


@both_sums
def test_class_weight_of_zero_has_a_derivative():
    logits, targets = jnp.array([[1.0, 2.0, -1.0]]), jnp.array([1])
    grad = jax.grad(lambda w: jaxent.cross_entropy(logits, targets, weight=w, reduction="sum"))(
        jnp.zeros(3)
    )
    assert_close(grad, jnp.array([0, -jaxent.log_softmax(logits)[0, 1], 0]), 2)


@both_sums
def test_second_derivatives_of_uncounted_nan_rows_are_zero():
    logits = jnp.array([[1.0, 2.0, -1.0], [jnp.nan, 0.0, 1.0]])
    targets = jnp.array([1, -100])

    def loss(logits):
        return jaxent.cross_entropy(logits, targets, softcap=5.0, z_loss=0.1)

    hessian = jax.hessian(loss)(logits)
    reverse = jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))(logits)
    np.testing.assert_array_equal(hessian[1], 0)
    np.testing.assert_array_equal(reverse[1], 0)
    assert np.all(np.isfinite(hessian))
    assert np.any(hessian[0] != 0)
    assert np.all(np.isfinite(reverse))
    assert np.any(reverse[0] != 0)


@both_sums
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_grad_of_grad_of_shared_arguments_passes_by_uncounted_nan_rows(kind):
    logits = jnp.array([[1.0, 2.0, 3.0], [jnp.nan, 0.0, -jnp.inf], [0.0, 1.0, 1.0]])
    targets = jnp.array([0, 2, 1]) if kind == "indices" else jnp.eye(3)[:, ::-1]

    def hessian(function):
        def loss(weight, smoothing, z_loss):
            return function(
                logits,
                targets,
                weight=weight,
                label_smoothing=smoothing,
                z_loss=z_loss,
                sample_weight=jnp.array([1.0, 0.0, 2.0]),
            )

        grad = jax.grad(loss, argnums=(0, 1, 2))
        return jax.jit(jax.jacrev(grad, argnums=(0, 1, 2)))(jnp.ones(3), 0.1, 0.1)

    actual, expected = hessian(jaxent.cross_entropy), hessian(reference.cross_entropy)
    assert any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: assert_close(a, b, 16), actual, expected)


@pytest.mark.parametrize("classes", [5, 100])
def test_grad_of_grad_with_smoothing_passes_by_uncounted_nan_rows(classes):
    logits = jnp.linspace(-1, 1, 3 * classes).reshape(3, classes).at[1].set(jnp.nan)

    def squared(logits):
        def loss(x):
            return jaxent.cross_entropy(x, jnp.array([0, -100, 2]), label_smoothing=0.1)

        return jnp.sum(jax.grad(loss)(logits)[0] ** 2)

    gradient = jax.grad(squared)(logits)
    assert jnp.all(jnp.isfinite(gradient))
    assert jnp.any(gradient[0] != 0)
    assert jnp.all(gradient[1] == 0)


BAD_ROWS = [
    [np.nan, 1.0, 2.0, 0.0],
    [np.inf, 1.0, 2.0, 0.0],
    [np.inf] * 4,
    [-np.inf] * 4,
    [np.inf, -np.inf, np.nan, 3e38],
]


def assert_same_second_derivatives(loss, arguments, rows):
    """Of the rows, forward over reverse and reverse over reverse, as those of the first."""
    random = np.random.default_rng(0)
    draw = lambda x: random.normal(size=np.shape(x)).astype("float32")  # noqa: E731
    direction = jax.tree.map(draw, arguments(rows[0]))

    @jax.jit
    def second(arguments):
        gradient = jax.grad(loss)

        def slope(arguments):
            products = jax.tree.map(jnp.vdot, gradient(arguments), direction)
            return sum(jax.tree.leaves(products))

        return jax.jvp(gradient, (arguments,), (direction,))[1], jax.grad(slope)(arguments)

    expected, *others = (second(arguments(np.array(row, "float32"))) for row in rows)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(expected))
    for actual in others:
        jax.tree.map(lambda a, b: assert_close(a, b, 64), actual, expected)


@both_sums
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_law_8_an_uncounted_row_acts_as_deleted_in_second_order(kind):
    targets = jnp.array([0, 2, 3]) if kind == "indices" else jnp.eye(4)[jnp.array([0, 2, 3])]
    sample_weight = jnp.array([1.0, 0.0, 2.0])

    def loss(arguments):
        given = arguments | {"targets": targets, "sample_weight": sample_weight}
        return jaxent.cross_entropy(**given) + jaxent.cross_entropy(**given, softcap=5.0)

    def arguments(row):
        logits = np.stack([[1.0, 2.0, 3.0, -1.0], row, [0.0, 1.0, 1.0, 0.5]]).astype("float32")
        scalars = {"label_smoothing": 0.1, "z_loss": 0.1, "logit_scale": 0.7}
        return {"logits": logits, "weight": np.ones(4, "f4"), **scalars}

    assert_same_second_derivatives(loss, arguments, [[0.0] * 4, *BAD_ROWS])


@pytest.mark.parametrize("made_forward", [False, True], ids=["streamed", "made forward"])
def test_law_8_an_uncounted_token_acts_as_deleted_in_second_order(made_forward):
    kernel = np.random.default_rng(1).normal(size=(4, 7)).astype("float32")

    def loss(arguments):
        return jaxent.linear_cross_entropy(
            **arguments, targets=jnp.array([0, -100, 3]), label_smoothing=0.1, chunk_size=3
        )

    def arguments(row):
        hidden = np.stack([[1.0, 2.0, 3.0, -1.0], row, [0.0, 1.0, 1.0, 0.5]]).astype("float32")
        scalars = {"z_loss": 0.1, "logit_scale": 0.7}
        return {"hidden": hidden, "kernel": kernel, "bias": np.ones(7, "f4"), **scalars}

    with forced(made_forward=made_forward, skip=False):
        assert_same_second_derivatives(loss, arguments, [[0.0] * 4, *BAD_ROWS])
