"""What `return_stats` returns beside a loss: the statistics of the same pass, differentiable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import (
    EVERY_OPTION,
    FLOAT_STATS,
    HeadCall,
    assert_close,
    assert_same_with_stats,
    calls,
    eps,
    examples,
    head_calls,
    precision,
)
from flax import nnx
from hypothesis import given
from jax.sharding import PartitionSpec as P
from sharded import make_mesh
from test_laws import over_halves_of_the_classes

import jaxent
from jaxent import reference
from jaxent._forms import forced

ULPS = 64
FORMS = {"streamed": False, "made forward": True}


def form(made_forward):
    return forced(made_forward=made_forward, skip=True, block=3)


def with_stats(function, call):
    """Loss and statistics, and the gradients of a sum of both, each number by one of its own."""
    random = np.random.default_rng(0)
    by = random.normal(size=(len(FLOAT_STATS), *call.cotangent.shape)).astype(call.cotangent.dtype)

    def total(floats):
        arguments = {**call.others, **floats}
        first = ("hidden", "kernel") if isinstance(call, HeadCall) else ("logits",)
        positional = [arguments.pop(name) for name in (*first, "targets")]
        loss, stats = function(*positional, **arguments, return_stats=True)
        floats = [getattr(stats, name) for name in FLOAT_STATS]
        weighed = sum(jnp.sum(w * x) for w, x in zip(by, floats))
        return jnp.sum(loss * (call.cotangent if loss.ndim else 1)) + weighed, (loss, stats)

    with precision(call):
        (_, found), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(call.floats)
        for name, gradient in gradients.items():
            assert gradient.dtype == call.floats[name].dtype, name
        return jax.tree.map(np.asarray, (*found, gradients))


@examples(8)
@given(calls(EVERY_OPTION))
def test_law_2_loss_and_statistics_equal_their_reference(call):
    actual = with_stats(jaxent.cross_entropy, call)
    assert_same_with_stats(actual, with_stats(reference.cross_entropy, call), ULPS)


@pytest.mark.parametrize("made_forward", FORMS.values(), ids=FORMS)
@examples(8)
@given(head_calls(EVERY_OPTION))
def test_law_2_loss_and_statistics_of_a_head_equal_their_reference(made_forward, call):
    with form(made_forward):
        actual = with_stats(jaxent.linear_cross_entropy, call)
    assert_same_with_stats(actual, with_stats(reference.linear_cross_entropy, call), ULPS)


@examples(3)
@given(calls(EVERY_OPTION, [((4, 6), 1), ((3, 4, 2), 1)]))
def test_law_11_statistics_of_split_classes_equal_the_whole(call):
    actual = with_stats(over_halves_of_the_classes(jaxent.cross_entropy), call)
    assert_same_with_stats(actual, with_stats(jaxent.cross_entropy, call), ULPS)


def head(seed=0, tokens=8, width=16, classes=40):
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(tokens, width)).astype("float32")
    kernel = random.normal(size=(width, classes)).astype("float32")
    return (
        hidden,
        kernel,
        np.where(np.arange(tokens) % 3, random.integers(0, classes, tokens), -100),
    )


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("made_forward", FORMS.values(), ids=FORMS)
def test_second_order_of_loss_and_statistics_equals_the_reference(made_forward, soft):
    hidden, kernel, targets = head()
    targets = (
        np.random.default_rng(1).dirichlet(np.ones(40), 8).astype("float32") if soft else targets
    )

    def gradient(module, direction):
        def total(hidden, kernel):
            loss, stats = module.linear_cross_entropy(
                hidden, kernel, targets, label_smoothing=0.1, return_stats=True
            )
            return loss + jnp.sum(stats.entropy * stats.log_prob)

        by_both = jax.grad(total, (0, 1))
        along = jax.jit(lambda *x: jax.jvp(by_both, x, direction)[1])(hidden, kernel)

        def slope(*x):
            return sum(map(jnp.vdot, by_both(*x), direction))

        return along, jax.jit(jax.grad(slope, (0, 1)))(hidden, kernel)

    random = np.random.default_rng(2)
    direction = tuple(random.normal(size=x.shape).astype("float32") for x in (hidden, kernel))
    with form(made_forward):
        actual = gradient(jaxent, direction)
    expected = gradient(reference, direction)
    jax.tree.map(lambda a, b: assert_close(a, b, 4 * ULPS), actual, expected)


@pytest.mark.parametrize("made_forward", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_of_no_counted_token_is_0_whatever_the_class_weights(made_forward, num_tokens):
    hidden, kernel, _ = head(tokens=num_tokens)
    arguments = hidden, kernel, np.full(num_tokens, -100)

    @jax.jit
    def gradients(weight):
        def loss(weight):
            return jaxent.linear_cross_entropy(*arguments, weight=weight, return_stats=True)

        return jax.value_and_grad(loss, has_aux=True)(weight)

    with form(made_forward):
        (loss, stats), gradient = gradients(np.linspace(0, 1e3, 40, dtype="float32"))
    np.testing.assert_array_equal(loss, 0)
    np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_array_equal(stats.log_prob, 0)


def products(function, *arguments):
    """How many matrix products a compiled program has."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return text.count(" dot(") + text.count("__onednn$matmul")


def on_one_device(function):
    return function


def in_shard_map(function):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec)


@pytest.mark.parametrize("where", [on_one_device, in_shard_map])
@pytest.mark.parametrize(("made_forward", "expected"), [(False, 4), (True, 3)], ids=FORMS)
def test_statistics_that_nobody_differentiates_add_no_product(made_forward, expected, where):
    hidden, kernel, targets = head(tokens=12, width=64, classes=512)

    def gradients(return_stats):
        def loss(hidden, kernel):
            given = {"return_stats": True} if return_stats else {}
            return jaxent.linear_cross_entropy(hidden, kernel, targets, **given)

        return where(jax.value_and_grad(loss, (0, 1), has_aux=return_stats))

    with form(made_forward):
        assert products(gradients(True), hidden, kernel) == expected
        assert products(gradients(False), hidden, kernel) == expected


@pytest.mark.parametrize("made_forward", FORMS.values(), ids=FORMS)
def test_statistics_take_no_array_of_the_logits_size(made_forward):
    hidden, kernel, targets = head(tokens=1024, width=8, classes=4096)

    def loss(hidden, kernel):
        return jaxent.linear_cross_entropy(hidden, kernel, targets, return_stats=True)

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    with forced(made_forward=made_forward, skip=True, block=64):
        scratch = run.lower(hidden, kernel).compile().memory_analysis().temp_size_in_bytes
    # A few arrays of a block's logits, or of a chunk's, of 16 and of 4 in all.
    assert scratch <= 4 * 4096 * 1024 // (4 if made_forward else 1)


@pytest.mark.parametrize("kind", ["explicit", "auto"])
@pytest.mark.parametrize("made_forward", FORMS.values(), ids=FORMS)
def test_law_11_statistics_on_a_mesh_equal_the_whole(made_forward, kind):
    hidden, kernel, targets = head(tokens=16)

    def loss(hidden, kernel, targets, **names):
        loss, stats = jaxent.linear_cross_entropy(
            hidden, kernel, targets, return_stats=True, **names
        )
        return loss, stats

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    with forced(made_forward=made_forward, block=3):
        expected = jax.jit(run)(hidden, kernel, targets)
        mesh = make_mesh(kind, data=8)
        with jax.set_mesh(mesh):
            split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
            placed = jax.device_put(hidden, split), kernel, jax.device_put(targets, split)
            names = {"axis_name": "data"} if kind == "auto" else {}
            actual = jax.jit(lambda *x: run(*x, **names))(*placed)
    (loss_, stats), gradients = jax.tree.map(np.asarray, actual)
    (expected_loss, expected_stats), expected_gradients = expected
    assert_close(loss_, expected_loss, ULPS)
    jax.tree.map(
        lambda a, b: assert_close(a, b, ULPS, "float32"), tuple(stats), tuple(expected_stats)
    )
    jax.tree.map(lambda a, b: assert_close(a, b, ULPS), gradients, expected_gradients)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("made_forward", FORMS.values(), ids=FORMS)
def test_law_11_second_order_on_a_mesh_equals_the_whole(made_forward, soft):
    hidden, kernel, targets = head()
    specs = P("data"), P(None, "model"), P("data", "model") if soft else P("data")
    if soft:
        targets = np.random.default_rng(1).dirichlet(np.ones(40), 8).astype("float32")

    def total(hidden, kernel, targets, **names):
        loss, stats = jaxent.linear_cross_entropy(
            hidden, kernel, targets, reduction="none", return_stats=True, **names
        )
        each = loss**2 + stats.entropy**2 + jnp.sin(stats.log_prob)
        return jax.lax.psum(jnp.sum(each), "data") if names else jnp.sum(each)

    def second(function):
        def slope(hidden, kernel, targets):
            gradients = jax.grad(function, (0, 1))(hidden, kernel, targets)
            return sum(jnp.sum(g**2) for g in gradients)

        return jax.jit(jax.grad(slope, (0, 1)))

    with forced(made_forward=made_forward, block=3):
        expected = second(total)(hidden, kernel, targets)
        for kind in ("auto", "explicit"):
            mesh = make_mesh(kind, data=2, model=4)
            function = total
            if kind == "auto":
                split = functools.partial(total, class_axis_name="model")
                function = jax.shard_map(split, mesh=mesh, in_specs=specs, out_specs=P())
            with jax.set_mesh(mesh):
                shardings = [jax.sharding.NamedSharding(mesh, spec) for spec in specs]
                placed = jax.device_put((hidden, kernel, targets), tuple(shardings))
                actual = jax.device_get(second(function)(*placed))
            jax.tree.map(lambda a, b: assert_close(a, b, 4 * ULPS), actual, expected)


def test_objects_return_statistics_where_the_call_asks_for_them():
    hidden, kernel, targets = head()
    logits = hidden @ kernel
    expected = jaxent.token_stats(logits, targets)
    layer = jaxent.LinearHead(16, 40, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.asarray(kernel)
    found = [
        jaxent.CrossEntropyLoss(weight=np.arange(40.0))(logits, targets, return_stats=True),
        jaxent.LinearCrossEntropyLoss(z_loss=1e-3)(hidden, kernel, targets, return_stats=True),
        layer.loss(hidden, targets, return_stats=True),
    ]
    for loss, stats in found:
        assert loss.shape == ()
        np.testing.assert_allclose(stats.log_prob, expected.log_prob, rtol=20 * eps("float32"))
        np.testing.assert_array_equal(stats.counted, targets != -100)


def test_return_stats_is_true_or_false():
    with pytest.raises(TypeError, match="return_stats must be True or False, got"):
        jaxent.cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2, int), return_stats=np.ones(2))
