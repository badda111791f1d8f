"""The head's objects in Flax, and what a head refuses."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxent
from jaxent import reference

HIDDEN = jax.random.normal(jax.random.key(0), (6, 4))
TARGETS = jnp.array([3, 0, 10, -100, 7, 7])
CRITERION = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}


def head(**keywords):
    criterion = jaxent.LinearCrossEntropyLoss(**CRITERION, chunk_size=4)
    return jaxent.LinearHead(4, 11, criterion=criterion, rngs=nnx.Rngs(1), **keywords)


@pytest.mark.parametrize("use_bias", [False, True])
def test_head_has_the_parameters_of_a_linear_and_the_loss_of_its_logits(use_bias):
    layer = head(use_bias=use_bias)
    linear = nnx.Linear(4, 11, use_bias=use_bias, rngs=nnx.Rngs(1))
    jax.tree.map(np.testing.assert_array_equal, *(nnx.state(x, nnx.Param) for x in (layer, linear)))
    options = {k: v for k, v in CRITERION.items() if k != "softcap"}

    def from_logits(layer):
        return jaxent.cross_entropy(layer(HIDDEN), TARGETS, **options)

    actual = nnx.value_and_grad(lambda layer: layer.loss(HIDDEN, TARGETS))(layer)
    expected = nnx.value_and_grad(from_logits)(layer)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), actual, expected)


def test_logits_of_a_head_are_those_of_its_loss():
    mask = jnp.arange(11) < 9
    criterion = jaxent.LinearCrossEntropyLoss(class_mask=mask, softcap=0.5)
    layer = jaxent.LinearHead(4, 11, criterion=criterion, rngs=nnx.Rngs(1))
    logits = layer(10 * HIDDEN)
    assert np.isneginf(logits[:, 9:]).all()
    assert np.abs(logits[:, :9]).max() <= 0.5
    losses = layer.loss(10 * HIDDEN, TARGETS % 9, reduction="none")
    expected = jaxent.nll(jax.nn.log_softmax(logits), TARGETS % 9, reduction="none")
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_head_computes_in_its_dtype_and_trains_its_parameters():
    layer = head(dtype=jnp.bfloat16)
    optimizer = nnx.Optimizer(layer, optax.sgd(0.5), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        loss, grads = nnx.value_and_grad(lambda layer: layer.loss(HIDDEN, TARGETS))(layer)
        optimizer.update(layer, grads)
        return loss, grads

    losses = [step(layer, optimizer) for _ in range(5)]
    assert losses[0][1].kernel.dtype == jnp.float32
    assert losses[-1][0] < losses[0][0]
    low = jaxent.linear_cross_entropy(
        HIDDEN, layer.kernel[...], TARGETS, bias=layer.bias[...], dtype=jnp.bfloat16, **CRITERION
    )
    np.testing.assert_allclose(layer.loss(HIDDEN, TARGETS), low, rtol=1e-6)


def test_head_takes_the_place_of_a_linear_in_a_checkpoint():
    linear = nnx.Linear(4, 11, rngs=nnx.Rngs(7))
    layer = head()
    nnx.update(layer, nnx.state(linear, nnx.Param))
    np.testing.assert_array_equal(layer.kernel[...], linear.kernel[...])


def test_embedding_is_a_tied_head():
    embed = nnx.Embed(11, 4, rngs=nnx.Rngs(2))
    loss = jaxent.LinearCrossEntropyLoss(class_axis=0, chunk_size=4)

    def tied(embed):
        return loss(embed(TARGETS % 11) + HIDDEN, embed.embedding[...], TARGETS)

    def attended(embed):
        return jaxent.cross_entropy(embed.attend(embed(TARGETS % 11) + HIDDEN), TARGETS)

    actual, expected = (nnx.value_and_grad(f)(embed) for f in (tied, attended))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), actual, expected)


def test_parameters_of_a_linen_dense_are_a_head():
    dense = linen.Dense(11)
    parameters = dense.init(jax.random.key(3), HIDDEN)

    def direct(parameters):
        return jaxent.linear_cross_entropy(HIDDEN, targets=TARGETS, **parameters["params"])

    def through_logits(parameters):
        return jaxent.cross_entropy(dense.apply(parameters, HIDDEN), TARGETS)

    actual, expected = (jax.value_and_grad(f)(parameters) for f in (direct, through_logits))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), actual, expected)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_the_loss_are_the_same_loss(how):
    loss = jaxent.LinearCrossEntropyLoss(
        weight=jnp.arange(1.0, 12), dtype=jnp.bfloat16, precision="highest", **CRITERION
    )
    kernel = jnp.ones((4, 11))
    assert repr(how(loss)) == repr(loss)
    np.testing.assert_array_equal(how(loss)(HIDDEN, kernel, TARGETS), loss(HIDDEN, kernel, TARGETS))


def test_heads_of_codebooks_are_one_vmap():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return jaxent.LinearHead(4, 11, rngs=rngs)

    heads = make(nnx.Rngs(0))
    targets = jnp.stack([TARGETS, TARGETS, jnp.full(6, -100)])
    losses = nnx.vmap(lambda head, targets: head.loss(HIDDEN, targets))(heads, targets)
    assert losses.shape == (3,)
    assert losses[2] == 0
    expected = jaxent.linear_cross_entropy(HIDDEN, heads.kernel[1], TARGETS, bias=heads.bias[1])
    np.testing.assert_allclose(losses[1], expected, rtol=1e-6)


KERNEL = jnp.zeros((4, 11))
REFUSED = {
    "swapped arguments": (
        (TARGETS, HIDDEN, KERNEL),
        {},
        TypeError,
        r"hidden is int32\[6\], kernel float32\[6, 4\]: both must be float arrays; the order of "
        "arguments is hidden, kernel, targets",
    ),
    "a kernel of other width": (
        (HIDDEN, KERNEL[1:], TARGETS),
        {},
        ValueError,
        r"hidden is float32\[6, 4\], kernel float32\[3, 11\]: the kernel must be \[4, C\](\n|$)",
    ),
    "a transposed kernel": (
        (HIDDEN, KERNEL.T, TARGETS),
        {},
        ValueError,
        r"the kernel must be \[4, C\]; if its classes are on the other axis, pass class_axis=0",
    ),
    "a kernel said to be transposed": (
        (HIDDEN, KERNEL, TARGETS),
        {"class_axis": 0},
        ValueError,
        r"the kernel must be \[C, 4\]; if its classes are on the other axis, pass class_axis=-1",
    ),
    "a kernel of three dimensions": (
        (HIDDEN, KERNEL[None], TARGETS),
        {},
        ValueError,
        r"they must be \(\.\.\., D\) and \(D, C\)",
    ),
    "no classes": ((HIDDEN, KERNEL[:, :0], TARGETS), {}, ValueError, "there are no classes"),
    "targets of another shape": (
        (HIDDEN, KERNEL, TARGETS[1:]),
        {},
        ValueError,
        r"hidden is \[6, 4\], targets int32\[5\]: class indices must be \[6\]",
    ),
    "probabilities of another shape": (
        (HIDDEN, KERNEL, HIDDEN),
        {},
        ValueError,
        r"float targets are class probabilities and must be \[6, 11\]",
    ),
    "a bias of another shape": (
        (HIDDEN, KERNEL, TARGETS),
        {"bias": jnp.zeros(4)},
        ValueError,
        r"bias is \[4\]: it must be \[11\]",
    ),
    "a class axis": ((HIDDEN, KERNEL, TARGETS), {"class_axis": 2}, ValueError, "class_axis must"),
    "an integer dtype": ((HIDDEN, KERNEL, TARGETS), {"dtype": int}, TypeError, "dtype must be a"),
}


@pytest.mark.parametrize("function", [m.linear_cross_entropy for m in (jaxent, reference)])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_while_tracing(case, function):
    arguments, keywords, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: function(*arguments, **keywords))


@pytest.mark.parametrize(
    ("chunk_size", "error"),
    [(0, ValueError), (-1, ValueError), (2.5, TypeError), ("all", TypeError), (True, TypeError)],
)
def test_chunk_size_that_is_none_is_refused(chunk_size, error):
    for make in (
        lambda: jaxent.LinearCrossEntropyLoss(chunk_size=chunk_size),
        lambda: jaxent.linear_cross_entropy(HIDDEN, KERNEL, TARGETS, chunk_size=chunk_size),
    ):
        with pytest.raises(error, match="chunk_size must be a positive integer or None, got "):
            make()


@pytest.mark.parametrize("module", [jaxent, reference])
def test_statistics_of_probabilities_are_of_their_cross_entropy(module):
    kernel = jax.random.normal(jax.random.key(1), (4, 11))
    logits = HIDDEN @ kernel
    probabilities = jax.nn.softmax(3 * jnp.sin(jnp.arange(66.0).reshape(6, 11)))
    log_prob = jnp.sum(probabilities * jax.nn.log_softmax(logits), -1)
    correct = jnp.argmax(probabilities, -1) == jnp.argmax(logits, -1)
    for stats in (
        module.token_stats(logits, probabilities, axis=-1),
        module.linear_token_stats(HIDDEN, kernel, probabilities),
    ):
        np.testing.assert_allclose(stats.log_prob, log_prob, rtol=1e-5)
        np.testing.assert_array_equal(stats.correct, correct)


def test_criterion_of_another_kind_is_refused():
    for criterion in (jaxent.CrossEntropyLoss(), jaxent.LinearCrossEntropyLoss(class_axis=0)):
        with pytest.raises(ValueError, match="criterion must be a jaxent"):
            jaxent.LinearHead(4, 11, criterion=criterion, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["label_smoothing", "ignore_index", "softcap", "chunk_size"])
def test_an_option_of_the_loss_is_the_criterions(name):
    with pytest.raises(TypeError, match=rf"criterion=jaxent.LinearCrossEntropyLoss\({name}"):
        jaxent.LinearHead(4, 11, rngs=nnx.Rngs(0), **{name: 1})
