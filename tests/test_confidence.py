"""Law 13: a nearly certain row's loss and gradients are right to a few roundings of their own size.

The logits are eighths, so that their differences are exact, and all that is rounded is what jaxent
rounds. What is compared with is made in float64, without a subtraction of what is nearly equal.
"""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import eps, examples
from hypothesis import example, given
from test_laws import gradients_in_the_forward_pass, over_halves_of_the_classes

import jaxent
from jaxent import reference
from jaxent._forms import forced

law = examples(5)


def exact(logits, targets):
    """Loss and entropy of each row in float64, and their gradients."""
    z = np.asarray(logits, "float64")
    top = z.argmax(-1)[:, None]
    centred = z - np.take_along_axis(z, top, -1)
    exps = np.exp(centred)
    np.put_along_axis(exps, top, 0, -1)
    rest = exps.sum(-1, keepdims=True)  # of all but the largest
    total = 1 + rest
    log_total = np.log1p(rest)
    index = np.asarray(targets)[:, None]
    loss = log_total - np.take_along_axis(centred, index, -1)
    probability = exps / total
    np.put_along_axis(probability, top, 1 / total, -1)
    gradient = probability.copy()
    others = probability.copy()
    np.put_along_axis(others, index, 0, -1)
    np.put_along_axis(gradient, index, -others.sum(-1, keepdims=True), -1)
    relative = (exps * centred).sum(-1, keepdims=True) / total
    entropy = log_total - relative
    d_entropy = -probability * (centred - relative)
    return loss[:, 0], gradient, entropy[:, 0], d_entropy


def of_log_softmax(logits, targets):
    return jaxent.nll(jaxent.log_softmax(logits), targets, axis=-1, reduction="none")


def of_one_hot(logits, targets):
    q = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    return jaxent.cross_entropy(logits, q, axis=-1, reduction="none")


def of_indices(logits, targets):
    return jaxent.cross_entropy(logits, targets, axis=-1, reduction="none")


def weighted(logits, targets):
    weight = jnp.full(logits.shape[-1], 0.5, jnp.float32)
    return 2 * jaxent.cross_entropy(logits, targets, axis=-1, weight=weight, reduction="none")


def scaled(logits, targets):
    return jaxent.cross_entropy(2 * logits, targets, logit_scale=0.5, axis=-1, reduction="none")


def masked(logits, targets):
    wider = jnp.pad(logits, ((0, 0), (0, 3)), constant_values=100)
    mask = jnp.arange(wider.shape[-1]) < logits.shape[-1]
    return jaxent.cross_entropy(wider, targets, class_mask=mask, axis=-1, reduction="none")


def on_another_axis(logits, targets):
    return jaxent.cross_entropy(logits.T, targets, axis=0, reduction="none")


def of_statistics(logits, targets):
    return -jaxent.token_stats(logits, targets, axis=-1).log_prob


def identity(logits):
    return jnp.eye(logits.shape[-1], dtype=logits.dtype)


def of_head(logits, targets, chunk_size=3, **keywords):
    return jaxent.linear_cross_entropy(
        logits, identity(logits), targets, chunk_size=chunk_size, reduction="none", **keywords
    )


def of_head_with_probabilities(logits, targets):
    return of_head(logits, jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype))


def of_head_made_forward(logits, targets):
    def row(logits, target):
        return jaxent.linear_cross_entropy(
            logits[None], identity(logits), target[None], chunk_size=3, reduction="sum"
        )

    with gradients_in_the_forward_pass(True):
        return jnp.stack([row(x, y) for x, y in zip(logits, targets)])


def of_head_statistics(logits, targets):
    return -jaxent.linear_token_stats(logits, identity(logits), targets, chunk_size=3).log_prob


def of_halves(logits, targets):
    if logits.shape[-1] % 2:
        logits = jnp.pad(logits, ((0, 0), (0, 1)), constant_values=-jnp.inf)
    split = over_halves_of_the_classes(jaxent.cross_entropy)
    return split(logits, targets, axis=-1, reduction="none")


def of_halves_with_probabilities(logits, targets):
    if logits.shape[-1] % 2:
        logits = jnp.pad(logits, ((0, 0), (0, 1)), constant_values=-jnp.inf)
    q = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    split = over_halves_of_the_classes(jaxent.cross_entropy)
    return split(logits, q, axis=-1, reduction="none")


DENSE = [
    of_indices,
    of_one_hot,
    of_log_softmax,
    weighted,
    scaled,
    masked,
    on_another_axis,
    of_statistics,
    of_halves,
    of_halves_with_probabilities,
]
HEADS = [of_head, of_head_with_probabilities, of_head_made_forward, of_head_statistics]


@st.composite
def confident_rows(draw, sizes=(2, 16, 41)):
    """Logits of which a class is above the others by up to 80, and targets, mostly that class."""
    num_classes = draw(st.sampled_from(sizes))
    gaps = draw(st.lists(st.integers(0, 640), min_size=3, max_size=3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = random.integers(-8, 1, (len(gaps), num_classes)) / 8
    best = random.integers(0, num_classes, len(gaps))
    logits[np.arange(len(gaps)), best] = np.array(gaps) / 8
    other = random.integers(0, num_classes, len(gaps))
    targets = np.where(random.uniform(size=len(gaps)) < 0.8, best, other)
    return logits.astype("float32"), targets.astype("int32")


def assert_right(actual, expected, dtype, ulps=6, beside=0):
    """Each number to some roundings of its own size; and of the dtype's smallest.

    `beside` is the size of what else may be rounded.
    """
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    least = float(jnp.finfo(dtype).smallest_subnormal)
    tiny = float(jnp.finfo("float32").smallest_normal)  # XLA on the CPU flushes what is smaller
    bound = ulps * (eps("float32") * (np.abs(expected) + beside) + tiny)
    if jnp.finfo(dtype).bits == 16:
        bound = bound + eps(dtype) * np.abs(expected) + least
    assert np.all(np.abs(actual - expected) <= bound), (actual, expected)


def values_and_gradients(function, logits, targets):
    def total(logits):
        values = function(logits, targets)
        return values.astype(jnp.float32).sum(), values

    (_, values), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
    return values, gradient


def check(function, logits, targets, dtype, beside=0):
    logits = jnp.asarray(logits, dtype)  # eighths up to 16 are exact in bfloat16, and rounded above
    loss, gradient, *_ = exact(logits.astype("float32"), targets)
    values, gradients = values_and_gradients(function, logits, targets)
    assert_right(values, loss, dtype if function is of_log_softmax else "float32")
    assert_right(gradients, gradient, dtype, beside=beside)


@pytest.mark.parametrize("function", DENSE, ids=lambda f: f.__name__)
@law
@given(confident_rows(), st.sampled_from(["float32", "bfloat16", "float16"]))
@example((np.array([[20, 0]], "float32"), np.array([0], "int32")), "float32")
def test_law_13_a_nearly_certain_row_is_exact(function, rows, dtype):
    check(function, *rows, dtype)


@pytest.mark.parametrize("function", HEADS, ids=lambda f: f.__name__)
@law
@given(confident_rows((2, 5, 7)), st.sampled_from(["float32", "bfloat16"]))
def test_law_13_a_nearly_certain_token_of_a_head_is_exact(function, rows, dtype):
    check(function, *rows, dtype)


def of_narrow_head(logits, targets, **keywords):
    """Of products of width 1, which a compiler makes one operation of with what follows."""
    return jnp.stack(
        [
            jaxent.linear_cross_entropy(jnp.ones((1, 1)), x[None], y[None], **keywords)
            for x, y in zip(logits, targets)
        ]
    )


SCALED = {
    "indices": lambda x, y, **k: jaxent.cross_entropy(x, y, axis=-1, reduction="none", **k),
    "probabilities": lambda x, y, **k: jaxent.cross_entropy(
        x, jax.nn.one_hot(y, x.shape[-1]), axis=-1, reduction="none", **k
    ),
    "statistics": lambda x, y, **k: -jaxent.token_stats(x, y, axis=-1, **k).log_prob,
    "head": of_head,
    "narrow head": of_narrow_head,
    "narrow head, probabilities": lambda x, y, **k: of_narrow_head(
        x, jax.nn.one_hot(y, x.shape[-1]), chunk_size=1, **k
    ),
}


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("function", SCALED.values(), ids=SCALED)
@law
@given(confident_rows((2, 5)), st.sampled_from([0.7, 0.1, 1.3]), st.sampled_from([None, 37.0]))
def test_law_13_a_nearly_certain_row_is_exact_whatever_its_scale(function, jit, rows, scale, cap):
    logits, targets = rows
    z = np.float64(np.float32(scale)) * logits
    z = z if cap is None else cap * np.tanh(z / cap)
    loss, *_ = exact(z, targets)

    def values(logits, targets):
        return function(logits, targets, logit_scale=scale, softcap=cap)

    found = (jax.jit(values) if jit else values)(logits, targets)
    # A logit is rounded, twice with a cap: the loss is off by as much as its own size times that.
    bound = 4 * eps("float32") * loss * (1 + np.abs(z).max(-1)) + 1e-37
    assert np.all(np.abs(found - loss) <= bound), (found, loss)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_law_13_a_nearly_certain_row_of_many_classes_is_exact(with_gradient, dtype):
    """Where a CPU sums up blocks of classes, and where it holds no exponentials."""
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.integers(-80, 1, (3, 4100)) / 8, dtype)
    targets = jnp.array([0, 2050, 4099])
    logits = logits.at[jnp.arange(3), targets].set(jnp.array([12, 22, 40], dtype))
    loss, gradient, *_ = exact(logits.astype("float32"), targets)
    with forced(kept_bytes=0):
        if not with_gradient:
            assert_right(jax.jit(of_indices)(logits, targets), loss, "float32", 12)
            return
        values, gradients = values_and_gradients(of_indices, logits, targets)
    assert_right(values, loss, "float32", 12)
    assert_right(gradients, gradient, dtype, 12)


@pytest.mark.parametrize("head", [False, True])
@law
@given(confident_rows((2, 5, 7)))
def test_law_13_entropy_of_a_nearly_certain_row_is_exact(head, rows):
    logits, targets = map(jnp.asarray, rows)
    *_, entropy, d_entropy = exact(logits, targets)

    def of_logits(logits, targets):
        if head:
            stats = jaxent.linear_token_stats(logits, identity(logits), targets, chunk_size=3)
        else:
            stats = jaxent.token_stats(logits, targets, axis=-1)
        return stats.entropy

    values, gradients = values_and_gradients(of_logits, logits, targets)
    assert_right(values, entropy, "float32", 12)
    scale = np.abs(d_entropy).max(-1, keepdims=True)
    assert np.all(np.abs(gradients - d_entropy) <= 32 * eps("float32") * scale + 1e-37)


@pytest.mark.parametrize("with_probabilities", [False, True])
@law
@given(confident_rows())
def test_law_13_the_reference_is_exact_in_any_mode(with_probabilities, rows):
    def of_reference(logits, targets):
        if with_probabilities:
            targets = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
        return reference.cross_entropy(logits, targets, axis=-1, reduction="none")

    logits, targets = rows
    # Where the most probable class is not the target its derivative is 1 less the others' shares,
    # which is no small number.
    rows, best = np.arange(len(logits)), logits.argmax(-1)
    beside = np.zeros(logits.shape)
    beside[rows, best] = best != targets
    check(of_reference, logits, targets, "float32", beside)
    _, gradient, *_ = exact(logits, targets)
    jacobian = jax.jit(jax.jacfwd(of_reference))(logits, targets)
    assert_right(jacobian[rows, rows], gradient, "float32", beside=beside)


def test_it_is_what_a_sum_of_all_exponentials_loses():
    logits, targets = jnp.array([[20.0, 0]]), jnp.array([0])

    def formula(logits, targets):
        return jax.nn.logsumexp(logits, -1) - logits[:, targets[0]]

    values, gradients = values_and_gradients(formula, logits, targets)
    assert values[0] == 0
    assert gradients[0, 0] == 0


def of_capped(x):
    stats = jaxent.token_stats(x, jnp.full(len(x), 7), softcap=30.0)
    return stats.entropy, 30 * np.tanh(np.asarray(x, "float64") / 30)


def of_width_one(x):
    kernel = jnp.array([[0.1, 0.3, 1.1, 0.2]])
    stats = jaxent.linear_token_stats(x[:, 7:8], kernel, jnp.full(len(x), 2))
    return stats.entropy, np.asarray(x[:, 7:8], "float64") @ np.asarray(kernel, "float64")


@pytest.mark.parametrize("of", [of_capped, of_width_one])
def test_law_13_an_entropy_has_nothing_of_its_largest_class(of):
    x = jnp.zeros((33, 5000)).at[:, 7].set(jnp.linspace(15, 48, 33))
    found, z = of(x)
    z -= z.max(-1, keepdims=True)
    p = np.exp(z)
    rest = np.where(p == 1, 0, p).sum(-1)
    entropy = np.log1p(rest) - (p * z).sum(-1) / (1 + rest)
    # A logit up to 53 is rounded as a product, and with its cap.
    np.testing.assert_allclose(found, entropy, rtol=120 * eps("float32"))


@pytest.mark.parametrize("num_classes", [3, 5000])
def test_law_13_second_derivatives_of_an_entropy_keep_their_digits(num_classes):
    x = np.zeros(num_classes)
    x[:3] = 20, 0.3, -1.2

    def plain(x):
        log_p = jax.nn.log_softmax(x)
        return -jnp.sum(jnp.exp(log_p) * log_p)

    with jax.enable_x64(True):
        expected = jax.jacfwd(jax.grad(plain))(jnp.asarray(x))[:3, :3]
    hessian = jax.jacrev(jax.grad(lambda x: jaxent.token_stats(x, jnp.array(0)).entropy))
    found = hessian(jnp.asarray(x, jnp.float32))[:3, :3]
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_law_13_a_capped_class_that_is_apart_in_a_chunk_has_its_mass_alone():
    hidden, kernel = jnp.linspace(4, 9, 16)[:, None], jnp.array([[6.3, 0.0]])
    z = 30 * np.tanh(np.asarray(hidden, "float64") @ np.asarray(kernel, "float64") / 30)
    one_hot = jnp.tile(jnp.array([1.0, 0.0]), (16, 1))
    found = jaxent.linear_cross_entropy(
        hidden, kernel, one_hot, softcap=30.0, chunk_size=1, reduction="none"
    )
    # A logit up to 26 is rounded as a product and with its cap: so is the logarithm of the loss.
    assert_right(found, exact(z, np.zeros(16, int))[0], "float32", 60)
