"""The head and the loss in one: beyond the head law, what streaming must not change."""

import functools
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from calls import EVERY_OPTION, assert_close, eps, evaluate, examples, full_mask, head_calls
from hypothesis import assume, given
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_laws import gradients_in_the_forward_pass

import jaxent
from jaxent import reference

few = examples(6)
FLOATS = ["bfloat16", "float32", "float64"]
forms = pytest.mark.parametrize("made_forward", [False, True])

ROWS = [((4, 5), 1), ((7, 13), 1)]


def problem(tokens, width, classes, dtype="float32", seed=0):
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(tokens, width)).astype(dtype)
    kernel = (random.normal(size=(width, classes)) / np.sqrt(width)).astype(dtype)
    return jnp.array(hidden), jnp.array(kernel), jnp.array(random.integers(0, classes, tokens))


@forms
@few
@given(head_calls(EVERY_OPTION, ROWS, ["float32", "bfloat16"]), st.integers(0, 2**32 - 1))
def test_law_8_nan_of_uncounted_tokens_reaches_nothing(made_forward, call, seed):
    rows = call.cotangent.shape
    gone = np.random.default_rng(seed).uniform(size=rows) < 0.5
    weight = np.broadcast_to(call.get("sample_weight", np.ones(rows, "float32")), rows)
    call = call.replace(sample_weight=np.where(gone, 0, weight).astype(weight.dtype))
    hidden = np.where(gone[:, None], 0, call.floats["hidden"]).astype(call.dtype)
    finite = call.replace(hidden=hidden)
    nan = call.replace(hidden=np.where(gone[:, None], np.nan, hidden).astype(call.dtype))
    with gradients_in_the_forward_pass(made_forward):
        loss, grads = evaluate(jaxent.linear_cross_entropy, nan)
        expected, expected_grads = evaluate(jaxent.linear_cross_entropy, finite)
    np.testing.assert_array_equal(loss, expected)
    np.testing.assert_array_equal(grads["hidden"][gone].astype("float32"), 0)
    for name in expected_grads.keys() - {"hidden", "sample_weight"}:
        assert_close(grads[name], expected_grads[name], 32)


@forms
@few
@given(head_calls(("weight", "label_smoothing", "reduction"), ROWS, ["float32", "bfloat16"]))
def test_law_8_nan_of_an_excluded_class_reaches_nothing(made_forward, call):
    exists = np.ones(call.shape[-1], bool)
    exists[[0, -1]] = False
    if "targets" in call.floats:
        call = call.replace(targets=call.targets * exists.astype(call.dtype))
    else:
        call = call.replace(targets=np.clip(call.targets, 1, exists.size - 2))
    call = call.replace(class_mask=exists)
    shape = (-1, 1) if call.others["class_axis"] == 0 else (1, -1)
    gone = ~np.broadcast_to(exists.reshape(shape), call.floats["kernel"].shape)
    nan = call.replace(kernel=np.where(gone, np.nan, call.floats["kernel"]).astype(call.dtype))
    if "bias" in call.floats:
        nan = nan.replace(bias=np.where(exists, call.floats["bias"], np.nan).astype("float32"))
    with gradients_in_the_forward_pass(made_forward):
        loss, grads = evaluate(jaxent.linear_cross_entropy, nan)
        expected, expected_grads = evaluate(jaxent.linear_cross_entropy, call)
    np.testing.assert_array_equal(loss, expected)
    np.testing.assert_array_equal(grads["kernel"][gone].astype("float32"), 0)
    for name in expected_grads:
        assert_close(grads[name], expected_grads[name], 32)


@forms
@few
@given(head_calls(EVERY_OPTION, [*ROWS, ((2, 3, 6), 2)], ["float64"]), st.integers(0, 2**32 - 1))
def test_second_order_equals_the_reference(made_forward, call, seed):
    random = np.random.default_rng(seed)
    direction = jax.tree.map(lambda x: random.normal(size=x.shape), call.floats)

    def second_order(function):
        def scalar(floats):
            arguments = {**call.others, **floats}
            positional = [arguments.pop(name) for name in ("hidden", "kernel", "targets")]
            loss = function(*positional, **arguments)
            return jnp.sum(loss * call.cotangent) if loss.ndim else loss

        gradient = jax.grad(scalar)
        forward = jax.jvp(gradient, (call.floats,), (direction,))[1]
        return forward, jax.grad(lambda floats: optax.tree.vdot(gradient(floats), direction))(
            call.floats
        )

    with jax.enable_x64(True), gradients_in_the_forward_pass(made_forward):
        actual = jax.jit(lambda: second_order(jaxent.linear_cross_entropy))()
        expected = jax.jit(lambda: second_order(reference.linear_cross_entropy))()
        jax.tree.map(lambda a, b: assert_close(a, b, 1e4), actual, expected)


@forms
@pytest.mark.parametrize(("dtype", "option_dtype"), [*itertools.permutations(FLOATS, 2)])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_second_order_of_arrays_of_two_dtypes(made_forward, dtype, option_dtype, kind):
    """What lowers, and to gradients of the arguments' dtypes; the laws compare values."""

    def zeros(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    floats = {
        "hidden": zeros(dtype, 6, 4),
        "kernel": zeros(dtype, 4, 10),
        "bias": zeros(option_dtype, 10),
        "weight": zeros(option_dtype, 10),
        "sample_weight": zeros(option_dtype, 6),
        **{name: zeros(option_dtype) for name in ("label_smoothing", "z_loss", "logit_scale")},
    }
    if kind == "probabilities":
        floats["targets"] = zeros(option_dtype, 6, 10)

    def head(floats):
        given = {"targets": jnp.arange(6)} | floats
        return jaxent.linear_cross_entropy(**given, softcap=5.0, chunk_size=4)

    def dense(floats):
        given = {"targets": jnp.arange(6)} | floats
        logits = given.pop("hidden") @ given.pop("kernel") + given.pop("bias").astype(dtype)
        return jaxent.cross_entropy(logits, **given, softcap=5.0)

    with jax.enable_x64(True), gradients_in_the_forward_pass(made_forward):
        for gradient in map(jax.grad, [head] if made_forward else [head, dense]):
            product = jax.jit(lambda f, *x: jax.jvp(f, x[:1], x[1:]), static_argnums=0)
            for out in product.lower(gradient, floats, floats).out_info:
                assert jax.tree.map(lambda x: x.dtype, out) == jax.tree.map(
                    lambda x: x.dtype, floats
                )


@forms
@pytest.mark.parametrize("class_axis", [-1, 0])
def test_dtype_is_that_of_the_matmuls_and_gradients_are_the_parameters(made_forward, class_axis):
    hidden, kernel, targets = problem(9, 16, 50)
    low = [x.astype(jnp.bfloat16) for x in (hidden, kernel)]
    if class_axis == 0:
        kernel, low[1] = kernel.T, low[1].T

    def loss(hidden, kernel, **keywords):
        return jaxent.linear_cross_entropy(
            hidden, kernel, targets, class_axis=class_axis, chunk_size=16, **keywords
        )

    with gradients_in_the_forward_pass(made_forward):
        value, grads = jax.value_and_grad(loss, (0, 1))(hidden, kernel, dtype=jnp.bfloat16)
        expected, low_grads = jax.value_and_grad(loss, (0, 1))(*low)
    np.testing.assert_allclose(value, expected, rtol=4 * eps("float32"))
    for grad, low_grad in zip(grads, low_grads):
        assert grad.dtype == jnp.float32
        # Of the parameters' dtype, not rounded to that of the matmuls.
        assert np.any(grad != grad.astype(jnp.bfloat16).astype(jnp.float32))
        assert_close(grad, low_grad.astype("float32"), 2, "bfloat16", np.abs(grad).max())


@pytest.mark.parametrize("classes", [2, 1031, 2503])
@pytest.mark.parametrize("tokens", [1, 521, 2053])
def test_default_chunks_of_primes(tokens, classes):
    hidden, kernel, targets = problem(tokens, 3, classes)
    actual = jax.jit(jax.value_and_grad(jaxent.linear_cross_entropy, (0, 1)))(
        hidden, kernel, targets
    )
    expected = jax.value_and_grad(reference.linear_cross_entropy, (0, 1))(hidden, kernel, targets)
    # Sums over thousands of terms of either sign.
    jax.tree.map(lambda a, b: assert_close(a, b, 64, scale=np.abs(b).max()), actual, expected)


def test_transformations_of_the_streamed_form():
    hidden, kernel, targets = problem(6, 4, 11)
    kernels = jnp.stack([kernel, 2 * kernel, -kernel])

    def losses(hidden, kernel, targets):
        return jaxent.linear_cross_entropy(hidden, kernel, targets, reduction="none", chunk_size=4)

    def plain(hidden, kernel, targets):
        return reference.linear_cross_entropy(hidden, kernel, targets, reduction="none")

    over_tokens = jax.vmap(losses, (0, None, 0))
    over_kernels = jax.vmap(losses, (None, 0, None))
    checkpointed = jax.checkpoint(losses)

    def scanned(hidden, kernel, targets):
        return jax.lax.scan(
            lambda _, x: (None, losses(x[0], kernel, x[1])), None, (hidden, targets)
        )[1]

    def gradients(function, kernel):
        def total(hidden, kernel):
            return jnp.sum(function(hidden, kernel, targets) ** 2)

        return jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, kernel)

    expected = gradients(plain, kernel)
    for function in (losses, over_tokens, checkpointed, scanned):
        jax.tree.map(lambda a, b: assert_close(a, b, 32), gradients(function, kernel), expected)
    expected = gradients(jax.vmap(plain, (None, 0, None)), kernels)
    jax.tree.map(lambda a, b: assert_close(a, b, 32), gradients(over_kernels, kernels), expected)

    def curvature(function, direction):
        def total(kernel):
            return jnp.sum(function(hidden, kernel, targets))

        return jax.jvp(jax.grad(total), (kernel,), (direction,))[1]

    products = jax.vmap(lambda direction: curvature(losses, direction))(kernels)
    expected = jax.vmap(lambda direction: curvature(plain, direction))(kernels)
    assert_close(products, expected, 32)


@forms
def test_target_out_of_range_is_loud(made_forward):
    hidden, kernel, targets = problem(5, 4, 11)
    targets = targets.at[2].set(11)
    keywords = {"reduction": "none"} if not made_forward else {"reduction": "sum"}
    with gradients_in_the_forward_pass(made_forward):
        loss = jaxent.linear_cross_entropy(hidden, kernel, targets, chunk_size=4, **keywords)
        d_hidden, d_kernel = jax.grad(
            lambda *x: jaxent.linear_cross_entropy(*x, targets, chunk_size=4, **keywords).sum(),
            (0, 1),
        )(hidden, kernel)
    if not made_forward:
        np.testing.assert_array_equal(np.isnan(loss), np.arange(5) == 2)
    np.testing.assert_array_equal(np.isnan(d_hidden).all(1), np.arange(5) == 2)
    assert np.isfinite(np.delete(d_hidden, 2, 0)).all()
    assert np.isnan(d_kernel).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("made_forward", [False, True])
def test_as_exact_as_dense(made_forward, dtype):
    hidden, kernel, targets = problem(256, 64, 8009, dtype)

    def dense(hidden, kernel, reduction="mean"):
        logits = hidden @ kernel
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean() if reduction == "mean" else losses

    def linear(hidden, kernel, reduction="mean"):
        return jaxent.linear_cross_entropy(
            hidden, kernel, targets, chunk_size=1024, reduction=reduction
        )

    with jax.enable_x64(True):
        wide = [x.astype("float64") for x in (hidden, kernel)]
        exact, exact_grads, exact_losses = jax.tree.map(
            np.asarray,
            (*jax.value_and_grad(dense, (0, 1))(*wide), dense(*wide, reduction="none")),
        )
    with gradients_in_the_forward_pass(made_forward):
        value, grads = jax.jit(jax.value_and_grad(linear, (0, 1)))(hidden, kernel)
    _, dense_grads = jax.jit(jax.value_and_grad(dense, (0, 1)))(hidden, kernel)

    def error(actual, expected):
        return np.abs(np.asarray(actual, "float64") - np.asarray(expected)).max()

    bound = 2e-7 if dtype == "float32" else 1e-5
    assert error(value, exact) <= bound * max(1, exact)
    losses = linear(hidden, kernel, reduction="none")
    assert error(losses, exact_losses) <= 2 * error(dense(hidden, kernel, "none"), exact_losses)
    factor = 2 if dtype == "float32" else 1
    for grad, dense_grad, exact_grad in zip(grads, dense_grads, exact_grads):
        assert error(grad, exact_grad) <= factor * error(dense_grad, exact_grad)


@few
@given(
    head_calls(
        ("ignore_index", "class_mask", "softcap"),
        dtypes=["float32", "bfloat16"],
        targets=["indices"],
    )
)
def test_law_2_token_stats_equal_their_reference(call):
    random = np.random.default_rng(0)
    cotangents = random.normal(size=(3, *call.cotangent.shape)).astype("float32")

    def weighed(function):
        def value(*arguments, **keywords):
            stats = function(*arguments, **keywords)
            found.append(stats[3:])
            return sum(jnp.sum(c * x) for c, x in zip(cotangents, stats))

        return value

    found = []
    actual = evaluate(weighed(jaxent.linear_token_stats), call, jit=False)
    expected = evaluate(weighed(reference.linear_token_stats), call, jit=False)
    assert_close(actual[0], expected[0], 64)
    for name, grad in expected[1].items():
        assert_close(actual[1][name], grad, 64)
    jax.tree.map(np.testing.assert_array_equal, *(jax.lax.stop_gradient(f) for f in found))


@pytest.mark.parametrize("order", ["first", "second"])
def test_dense_token_stats_are_those_of_the_head(order):
    hidden, kernel, targets = problem(6, 4, 11)
    targets = targets.at[1].set(-100)
    hidden = hidden.at[1].set(jnp.nan)
    mask = jnp.arange(11) != 3
    targets = jnp.where(targets == 3, 4, targets)
    cotangents = np.random.default_rng(1).normal(size=(3, 6)).astype("float32")

    def dense(hidden, kernel):
        hidden = jnp.where(jnp.isnan(hidden), 0, hidden)
        logits = jnp.where(jnp.isnan(hidden[:, :1]), jnp.nan, hidden @ kernel)
        return jaxent.token_stats(logits, targets, class_mask=mask, softcap=5.0)

    def streamed(hidden, kernel):
        return jaxent.linear_token_stats(
            hidden, kernel, targets, class_mask=mask, softcap=5.0, chunk_size=4
        )

    def gradient(function):
        first = jax.grad(lambda *x: jnp.sum(cotangents * jnp.stack(function(*x)[:3])), (0, 1))
        if order == "first":
            return first(hidden, kernel)
        return jax.grad(lambda *x: sum(jnp.sum(g**2) for g in first(*x)), (0, 1))(hidden, kernel)

    actual, expected = streamed(hidden, kernel), dense(hidden, kernel)
    for a, b in zip(actual[:3], expected[:3]):
        assert_close(a, b, 16)
        assert a[1] == 0
    np.testing.assert_array_equal(actual.correct, expected.correct)
    jax.tree.map(lambda a, b: assert_close(a, b, 128), gradient(streamed), gradient(dense))


def test_the_first_of_equal_classes_is_predicted_and_entropy_is_theirs():
    kernel = jnp.array([[1.0, 3, 0, 3, 3, -1, -1, 3]])
    stats = jaxent.linear_token_stats(jnp.array([[40.0]]), kernel, jnp.array([1]), chunk_size=3)
    assert stats.prediction.tolist() == [1]
    assert stats.correct.tolist() == [True]
    assert_close(stats.entropy, np.log([4]).astype("float32"), 4)
    assert_close(stats.log_prob, -np.log([4]).astype("float32"), 4)
    assert_close(stats.log_normalizer, (120 + np.log([4])).astype("float32"), 2)


def test_z_loss_is_the_squared_log_normalizer():
    hidden, kernel, targets = problem(6, 4, 11)
    stats = jaxent.linear_token_stats(hidden, kernel, targets)
    loss = jaxent.linear_cross_entropy(hidden, kernel, targets, reduction="none", z_loss=0.1)
    assert_close(loss, -stats.log_prob + 0.1 * stats.log_normalizer**2, 8)


def scratch(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def naive(hidden, kernel, targets):
    logits = (hidden @ kernel).astype("float32")
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def shapes_of(tokens, width, classes, dtype="float32"):
    return (
        jax.ShapeDtypeStruct((tokens, width), dtype),
        jax.ShapeDtypeStruct((width, classes), dtype),
        jax.ShapeDtypeStruct((tokens,), "int32"),
    )


SIZES = [(2048, 512, 32768), (1024, 256, 131072)]


@pytest.mark.parametrize("size", SIZES)
def test_memory_of_first_order_is_a_twentieth_of_naive(size):
    arguments = shapes_of(*size)
    limit = 0.05 * scratch(jax.value_and_grad(naive, (0, 1)), *arguments)

    def transposed(hidden, kernel, targets):
        return jaxent.linear_cross_entropy(hidden, kernel, targets, class_axis=0)

    def squared(hidden, kernel, targets):
        return jnp.sum(jaxent.linear_cross_entropy(hidden, kernel, targets, reduction="none") ** 2)

    def everything(hidden, kernel, targets):
        stats = jaxent.linear_token_stats(hidden, kernel, targets)
        return stats.log_prob @ stats.entropy

    table = jax.ShapeDtypeStruct(arguments[1].shape[::-1], "float32")
    odd = jax.ShapeDtypeStruct((size[1], size[2] - 19), "float32")
    for function in (jaxent.linear_cross_entropy, squared, everything):
        assert scratch(jax.value_and_grad(function, (0, 1)), *arguments) <= limit
    with_table = arguments[0], table, arguments[2]
    assert scratch(jax.value_and_grad(transposed, (0, 1)), *with_table) <= limit
    with_odd = arguments[0], odd, arguments[2]
    assert scratch(jax.value_and_grad(jaxent.linear_cross_entropy, (0, 1)), *with_odd) <= limit


@pytest.mark.parametrize(
    ("size", "dtype", "devices", "products"),
    [
        ((2048, 512, 32768), "float32", 1, 3),
        ((1024, 256, 131072), "float32", 1, 3),
        ((2048, 512, 32768), "bfloat16", 1, 3),
        ((1024, 256, 131072), "bfloat16", 1, 3),
        ((2048, 4096, 32768), "float32", 1, 4),  # the kernel's gradient is 512 MB
        ((512, 1024, 32768), "float32", 1, 3),
        ((256, 1024, 32768), "float32", 1, 4),  # it is twice as large as two arrays of logits
        ((256, 1024, 32768), "bfloat16", 1, 4),
        ((2048, 1024, 32768), "float32", 8, 4),  # as it is on each of the devices
        ((4096, 1024, 32768), "float32", 8, 3),
        ((256, 32, 2**20), "float32", 1, 4),  # 128 tokens have logits of 512 MB
    ],
)
def test_gradients_are_made_forward_where_memory_allows(size, dtype, devices, products):
    tokens, width, classes = size
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Explicit,))
    split = [NamedSharding(mesh, spec) for spec in (P("data"), P(), P("data"))]
    arguments = [x.update(sharding=s) for x, s in zip(shapes_of(*size, dtype), split)]

    def lower(**keywords):
        loss = functools.partial(jaxent.linear_cross_entropy, **keywords)
        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments)

    with jax.set_mesh(mesh):
        program, streamed = lower(), lower(chunk_size=1024)
        assert program.as_text().count("stablehlo.dot_general") == products
        assert streamed.as_text().count("stablehlo.dot_general") == 4
        if products == 4 or devices > 1:
            return
        # XLA's CPU compiler has one more float32 array of the kernel's size than its result, and
        # one of a bfloat16 kernel itself.
        kernels = (1 if dtype == "float32" else 2) * 4 * width * classes
        logits, hiddens = 2 * 4 * tokens * classes, 4 * 4 * tokens * width
        limit = max(logits / 4, 120 * 2**20) + kernels + hiddens
        assert program.compile().memory_analysis().temp_size_in_bytes <= limit


@pytest.mark.parametrize("size", SIZES)
def test_memory_of_second_order_is_a_few_gradients(size):
    hidden, kernel, targets = shapes_of(*size)

    def jvp_of_grad(hidden, kernel, targets, *directions):
        gradient = jax.grad(lambda *x: jaxent.linear_cross_entropy(*x, targets), (0, 1))
        return jax.jvp(gradient, (hidden, kernel), directions)[1]

    def grad_of_grad(hidden, kernel, targets, *directions):
        gradient = jax.grad(lambda *x: jaxent.linear_cross_entropy(*x, targets), (0, 1))
        return jax.grad(lambda *x: optax.tree.vdot(gradient(*x), directions), (0, 1))(
            hidden, kernel
        )

    arguments = hidden, kernel, targets, hidden, kernel
    tokens, width, classes = size
    gradients = 4 * width * (tokens + classes)
    others = 4 * (4 * tokens * width) + 2**24
    assert scratch(jvp_of_grad, *arguments) <= others
    assert scratch(grad_of_grad, *arguments) <= gradients + others


def test_evaluation_does_no_gradient_work():
    arguments = shapes_of(2048, 2048, 16384)
    compiled = jax.jit(jaxent.linear_cross_entropy).lower(*arguments).compile()
    text = compiled.as_text()
    assert "f32[2048,16384]" in text  # the kernel, a parameter
    assert not any("dynamic-update-slice" in line for line in text.splitlines())


@few
@given(head_calls(("class_mask",), [((4, 5), 1)], ["float32"]))
def test_class_mask_of_one_row_is_that_of_all(call):
    mask = call.get("class_mask")
    assume(mask is not None and mask.ndim == 1)
    wide = call.replace(class_mask=mask[None])
    full = call.replace(class_mask=full_mask(mask, call.shape, 1))
    expected = evaluate(jaxent.linear_cross_entropy, call)
    for same in (wide, full):
        loss, grads = evaluate(jaxent.linear_cross_entropy, same)
        np.testing.assert_array_equal(loss, expected[0])
        for name in grads:
            assert_close(grads[name], expected[1][name], 8)


MASKS = {
    "a token without any class": ([[1, 1, 1, 0], [0, 0, 0, 0]], [0, 1], {}),
    "an ignored token": ([[1, 1, 1, 0], [1, 1, 1, 1]], [0, -100], {}),
    "a token of weight 0": ([[1, 1, 1, 0], [1, 1, 1, 1]], [0, 1], {"sample_weight": [1.0, 0.0]}),
    "no token at all": (None, [-100, -100], {}),
    "an excluded class of one row": ([[1, 1, 1, 0]], [0, 1], {}),
}


@forms
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_class_that_no_counted_token_has_may_be_nan(made_forward, kind, dtype, chunk_size):
    mask, targets, keywords = MASKS[kind]
    mask = None if mask is None else jnp.array(mask, bool)
    hidden = jnp.array([[1.0, 2, 3], [0.5, 1, -1]], dtype)
    kernel = jnp.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4)

    def run(kernel, bias):
        def loss(hidden, kernel, bias):
            return jaxent.linear_cross_entropy(
                hidden,
                kernel,
                jnp.array(targets),
                bias=bias,
                class_mask=mask,
                chunk_size=chunk_size,
                **keywords,
            )

        with gradients_in_the_forward_pass(made_forward):
            return jax.value_and_grad(loss, (0, 1, 2))(hidden, kernel, bias)

    bias = jnp.zeros(4)
    expected = run(kernel, bias)
    for bad in (jnp.nan, jnp.inf):
        found = run(kernel.at[:, 3].set(bad), bias.at[3].set(bad))
        np.testing.assert_array_equal(found[0], expected[0])
        for gradient, wanted in zip(found[1], expected[1]):
            np.testing.assert_array_equal(
                gradient.astype("float32"), wanted.astype("float32"), err_msg=str(bad)
            )


@forms
def test_a_class_of_nan_that_a_counted_token_has_shows_beside_a_mask(made_forward):
    hidden, kernel = jnp.ones((2, 3)), jnp.ones((3, 4)).at[:, 2].set(jnp.nan)
    mask = jnp.array([[True, True, True, False], [True, True, False, False]])
    with gradients_in_the_forward_pass(made_forward):
        loss = functools.partial(jaxent.linear_cross_entropy, class_mask=mask, chunk_size=3)
        value, gradients = jax.value_and_grad(loss, (0, 1))(hidden, kernel, jnp.array([0, 1]))
    assert jnp.isnan(value)
    assert jnp.isnan(gradients[0][0]).all()
    assert jnp.isnan(gradients[1][:, 2]).all()


def test_no_number_of_a_class_goes_through_a_float():
    classes = 2**24 + 4
    kernel = jnp.zeros((1, classes), jnp.bfloat16).at[0, 2**24 + 1].set(1)
    targets = jnp.array([2**24 + 1, 2**24 + 2])
    stats = jaxent.linear_token_stats(jnp.ones((2, 1), jnp.bfloat16), kernel, targets)
    np.testing.assert_array_equal(stats.prediction, [2**24 + 1] * 2)
    np.testing.assert_array_equal(stats.correct, [True, False])
    dense = jaxent.token_stats(kernel.astype("float32"), targets[:1])
    np.testing.assert_array_equal(dense.prediction, [2**24 + 1])


@pytest.mark.parametrize("mapped", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)])
def test_predictions_under_vmap_leave_gradients_alone(mapped):
    hidden, kernel, targets = problem(5, 3, 7)
    many = [
        jnp.stack([x, x[::-1]]) if m == 0 else x for x, m in zip((hidden, kernel, targets), mapped)
    ]

    def total(function):
        def of(hidden, kernel):
            run = lambda h, k, y: sum(map(jnp.sum, function(h, k, y)[:4]))  # noqa: E731
            return jnp.sum(jax.vmap(run, mapped)(hidden, kernel, many[2]))

        return jax.grad(of, (0, 1))(*many[:2])

    actual, expected = map(total, (jaxent.linear_token_stats, reference.linear_token_stats))
    jax.tree.map(lambda a, b: assert_close(a, b, 64), actual, expected)


@pytest.mark.parametrize("module", [jaxent, reference])
def test_a_head_without_width_is_refused(module):
    with pytest.raises(ValueError, match="the hidden states have no features, D is 0"):
        module.linear_cross_entropy(jnp.zeros((3, 0)), jnp.zeros((0, 5)), jnp.zeros(3, int))
