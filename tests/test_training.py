"""Training steps as they are written with flax and optax: small, real, and they learn."""

import functools

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxent

FEATURES, HIDDEN, CLASSES, EXAMPLES, STEPS = 6, 16, 4, 32, 30
RATE = 0.05
PADDING = -1

# 32 numbers added in two orders differ by up to 32 roundings. Steps that converge do not
# pile them up: after all of them the same holds.
ROUNDINGS = 32 * float(np.finfo(np.float32).eps)


@functools.cache
def batch():
    """Four separable clouds; every eighth label is padding."""
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=EXAMPLES)
    x = rng.normal(size=(CLASSES, FEATURES))[labels] * 2 + rng.normal(size=(EXAMPLES, FEATURES))
    labels[::8] = PADDING
    return jnp.asarray(x, jnp.float32), jnp.asarray(labels, jnp.int32)


@functools.cache
def parameters():
    rng = np.random.default_rng(1)
    return {
        "first": {
            "kernel": jnp.asarray(rng.normal(size=(FEATURES, HIDDEN)) * 0.3, jnp.float32),
            "bias": jnp.zeros(HIDDEN),
        },
        "second": {
            "kernel": jnp.asarray(rng.normal(size=(HIDDEN, CLASSES)) * 0.3, jnp.float32),
            "bias": jnp.zeros(CLASSES),
        },
    }


def logits_of(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["second"]["kernel"] + params["second"]["bias"]


def by_hand(logits, labels):
    """The mean over labels that are no padding, in jax.nn's words alone."""
    counted = labels != PADDING
    log_probs = jax.nn.log_softmax(logits)
    losses = -jnp.sum(log_probs * jax.nn.one_hot(labels, CLASSES), -1)
    return jnp.sum(jnp.where(counted, losses, 0)) / jnp.sum(counted)


@functools.cache
def reference():
    """The losses of each step and the final parameters, with the loss by hand."""
    x, labels = batch()
    optimizer = optax.adam(RATE)

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: by_hand(logits_of(p, x), labels))(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), loss

    carry = (parameters(), optimizer.init(parameters()))
    (params, _), losses = jax.lax.scan(step, carry, length=STEPS)
    return losses, params


def assert_learned(losses):
    chex.assert_tree_all_finite(losses)
    assert len(losses) == STEPS
    assert losses[0] > 1.0
    assert losses[-1] < 0.1 * losses[0]


def assert_as_by_hand(losses, params):
    assert_learned(losses)
    expected, expected_params = reference()
    chex.assert_trees_all_close(jnp.stack(losses), expected, rtol=ROUNDINGS, atol=ROUNDINGS)
    chex.assert_trees_all_close(params, expected_params, rtol=ROUNDINGS, atol=ROUNDINGS)


@pytest.fixture(autouse=True)
def fresh_trace_counts():
    chex.clear_trace_counter()


# ---- flax nnx -------------------------------------------------------------------------


class Network(nnx.Module):
    def __init__(self, loss, dtype=None):
        self.first = nnx.Linear(FEATURES, HIDDEN, dtype=dtype, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(HIDDEN, CLASSES, dtype=dtype, rngs=nnx.Rngs(0))
        self.loss = loss
        for name, layer in parameters().items():
            getattr(self, name).kernel[...] = layer["kernel"]
            getattr(self, name).bias[...] = layer["bias"]

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))

    def parameters(self):
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))


def loss_of(model, x, labels):
    return model.loss(model(x), labels)


def test_nnx_with_nnx_jit_and_nnx_optimizer():
    model = Network(jaxent.CrossEntropyLoss(ignore_index=PADDING))
    optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(model, optimizer, x, labels):
        loss, grads = nnx.value_and_grad(loss_of)(model, x, labels)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer, *batch()) for _ in range(STEPS)]
    assert_as_by_hand(losses, model.parameters())


def test_nnx_with_plain_jit_over_split_and_merge():
    model = Network(jaxent.CrossEntropyLoss(ignore_index=PADDING, weight=jnp.ones(CLASSES)))
    optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, x, labels):
        model, optimizer = nnx.merge(graph, state)
        loss, grads = nnx.value_and_grad(loss_of)(model, x, labels)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    losses = []
    for _ in range(STEPS):
        state, loss = step(state, *batch())
        losses.append(loss)
    nnx.update((model, optimizer), state)
    assert_as_by_hand(losses, model.parameters())
    np.testing.assert_array_equal(model.loss.weight, np.ones(CLASSES))  # not trained


def test_class_weights_that_change_while_training_do_not_retrace():
    model = Network(jaxent.CrossEntropyLoss(ignore_index=PADDING, weight=jnp.ones(CLASSES)))
    optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)
    x, labels = batch()

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_of)(model, x, labels)
        optimizer.update(model, grads)
        return loss

    for i in range(3):
        weight = jnp.asarray([1.0, 2.0, 0.5, 1.0]) ** i
        model.loss = jaxent.CrossEntropyLoss(ignore_index=PADDING, weight=weight)
        expected = jaxent.cross_entropy(model(x), labels, ignore_index=PADDING, weight=weight)
        chex.assert_trees_all_close(step(model, optimizer), expected, rtol=ROUNDINGS)


# ---- flax linen -----------------------------------------------------------------------


class LinenNetwork(linen.Module):
    loss: jaxent.CrossEntropyLoss

    @linen.compact
    def __call__(self, x, labels):
        hidden = jnp.tanh(linen.Dense(HIDDEN, name="first")(x))
        return self.loss(linen.Dense(CLASSES, name="second")(hidden), labels)


def test_linen_with_train_state():
    module = LinenNetwork(jaxent.CrossEntropyLoss(ignore_index=PADDING))
    shapes = jax.tree.map(jnp.shape, module.init(jax.random.key(0), *batch())["params"])
    assert shapes == jax.tree.map(jnp.shape, parameters())
    state = TrainState.create(apply_fn=module.apply, params=parameters(), tx=optax.adam(RATE))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, x, labels):
        def loss_of(params):
            return state.apply_fn({"params": params}, x, labels)

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(STEPS):
        state, loss = step(state, *batch())
        losses.append(loss)
    assert state.step == STEPS
    assert_as_by_hand(losses, state.params)


# ---- Plain pytrees --------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["function", "object"])
def test_plain_pytrees_with_optax_alone(loss):
    optimizer = optax.adam(RATE)
    loss = {
        "function": functools.partial(jaxent.cross_entropy, ignore_index=PADDING),
        "object": jaxent.CrossEntropyLoss(ignore_index=PADDING),
    }[loss]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, x, labels):
        value, grads = jax.value_and_grad(lambda p: loss(logits_of(p, x), labels))(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    params, state, losses = parameters(), optimizer.init(parameters()), []
    for _ in range(STEPS):
        params, state, value = step(params, state, *batch())
        losses.append(value)
    assert_as_by_hand(losses, params)


@pytest.mark.parametrize("targets", ["indices", "probabilities"])
def test_every_option_at_once_learns(targets):
    x, labels = batch()
    options = {
        "weight": jnp.array([1.0, 2.0, 0.5, 1.0, 3.0]),
        "label_smoothing": 0.01,
        "class_mask": jnp.array([True] * CLASSES + [False]),
        "z_loss": 1e-3,
        "softcap": 20.0,
    }
    if targets == "probabilities":
        options["sample_weight"] = labels != PADDING
        labels = jax.nn.one_hot(labels, CLASSES + 1)
    else:
        options["ignore_index"] = PADDING
    optimizer = optax.adam(RATE)

    def padded_logits(params):
        nan = jnp.full((EXAMPLES, 1), jnp.nan)  # an excluded class may hold anything
        return jnp.concatenate([logits_of(params, x), nan], -1)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        value, grads = jax.value_and_grad(
            lambda p: jaxent.cross_entropy(padded_logits(p), labels, **options)
        )(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    params, state, losses = parameters(), optimizer.init(parameters()), []
    for _ in range(STEPS):
        params, state, value = step(params, state)
        losses.append(value)
    chex.assert_tree_all_finite((losses, params))
    assert losses[-1] < 0.3 * losses[0]  # smoothing and z_loss leave a floor
    right = jnp.argmax(logits_of(params, x), -1) == batch()[1]
    assert jnp.all(right | (batch()[1] == PADDING))


# ---- Mixed precision ------------------------------------------------------------------


def test_bfloat16_compute_with_float32_parameters_learns():
    model = Network(jaxent.CrossEntropyLoss(ignore_index=PADDING), dtype=jnp.bfloat16)
    optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(model, optimizer, x, labels):
        def loss_of(model):
            logits = model(x)
            return model.loss(logits, labels), logits

        (loss, logits), grads = nnx.value_and_grad(loss_of, has_aux=True)(model)
        optimizer.update(model, grads)
        return loss, logits, grads

    losses = []
    for _ in range(STEPS):
        loss, logits, grads = step(model, optimizer, *batch())
        losses.append(loss)
        assert logits.dtype == jnp.bfloat16
        chex.assert_type(loss, jnp.float32)
        chex.assert_type(jax.tree.leaves(grads), jnp.float32)
        chex.assert_tree_all_finite((loss, grads))
    chex.assert_type(jax.tree.leaves(model.parameters()), jnp.float32)
    assert_learned(losses)
    # The first loss is that of bfloat16 logits: off by their rounding, at most a few.
    logits_eps = float(jnp.finfo(jnp.bfloat16).eps)
    chex.assert_trees_all_close(losses[0], reference()[0][0], rtol=4 * logits_eps)


def test_loss_of_bfloat16_logits_is_computed_in_float32():
    logits = (4 * logits_of(parameters(), batch()[0])).astype(jnp.bfloat16)
    of_loss = functools.partial(jaxent.cross_entropy, ignore_index=PADDING)
    loss, grad = jax.jit(jax.value_and_grad(of_loss))(logits, batch()[1])
    expected, expected_grad = jax.value_and_grad(by_hand)(logits.astype(jnp.float32), batch()[1])
    chex.assert_type([loss, grad], [jnp.float32, jnp.bfloat16])
    chex.assert_trees_all_close(loss, expected, rtol=ROUNDINGS)
    eps = float(jnp.finfo(jnp.bfloat16).eps)  # the gradient is rounded to it, once
    chex.assert_trees_all_close(grad.astype(jnp.float32), expected_grad, rtol=eps, atol=ROUNDINGS)


# ---- Accumulating gradients -----------------------------------------------------------

MICRO_BATCHES, WEIGHT = 4, jnp.array([1.0, 2.0, 0.5, 3.0])


@functools.cache
def tokens():
    """Micro-batches of 15, 8, 0 and 3 counted tokens, of 16."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(MICRO_BATCHES, 16, FEATURES)), jnp.float32)
    labels = rng.integers(CLASSES, size=(MICRO_BATCHES, 16))
    for i, counted in enumerate([15, 8, 0, 3]):
        labels[i, counted:] = PADDING
    return x, jnp.asarray(labels, jnp.int32)


def sums(params, x, labels, weight):
    """The gradient of a micro-batch's sum, and what its mean would be divided by."""
    options = {"ignore_index": PADDING, "weight": weight}

    def loss_of(params):
        return jaxent.cross_entropy(logits_of(params, x), labels, reduction="sum", **options)

    return *jax.value_and_grad(loss_of)(params), jaxent.total_weight(labels, **options)


def add(a, b):
    return jax.tree.map(jnp.add, a, b)


@jax.jit
def accumulated_by_scan(params, x, labels, weight):
    def step(total, micro_batch):
        return add(total, sums(params, *micro_batch, weight)), None

    zero = (0.0, jax.tree.map(jnp.zeros_like, params), 0.0)
    (loss, grads, total), _ = jax.lax.scan(step, zero, (x, labels))
    return jax.tree.map(lambda g: g / total, (loss, grads))


def accumulated_by_loop(params, x, labels, weight):
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(sums, n=1))
    parts = [step(params, x[i], labels[i], weight) for i in range(MICRO_BATCHES)]
    loss, grads, total = functools.reduce(add, parts)
    return jax.tree.map(lambda g: g / total, (loss, grads))


@pytest.mark.parametrize("accumulated", [accumulated_by_scan, accumulated_by_loop])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["no weight", "weight"])
def test_accumulated_sums_over_total_weight_are_the_whole_batchs_mean(accumulated, weight):
    x, labels = tokens()

    def mean(params):
        return jaxent.cross_entropy(
            logits_of(params, x.reshape(-1, FEATURES)),
            labels.reshape(-1),
            ignore_index=PADDING,
            weight=weight,
        )

    expected = jax.jit(jax.value_and_grad(mean))(parameters())
    chex.assert_trees_all_close(
        accumulated(parameters(), x, labels, weight), expected, rtol=ROUNDINGS, atol=ROUNDINGS
    )
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(expected[1]))


def test_mean_of_micro_batch_means_is_another_number():
    """Why `total_weight` is there: the counted tokens are not spread evenly."""
    x, labels = tokens()
    params = parameters()

    @jax.jit
    @jax.vmap
    def means(x, labels):
        return jaxent.cross_entropy(logits_of(params, x), labels, ignore_index=PADDING)

    each = means(x, labels)
    whole, _ = accumulated_by_scan(params, x, labels, None)
    assert each[2] == 0  # the one without tokens
    assert abs(jnp.mean(each) - whole) > 0.1 * whole


def test_training_on_accumulated_gradients_equals_training_on_the_whole_batch():
    x, labels = tokens()
    optimizer = optax.adam(RATE)

    def whole(params, x, labels, weight):
        def mean(params):
            return jaxent.cross_entropy(
                logits_of(params, x), labels, axis=-1, ignore_index=PADDING, weight=weight
            )

        return jax.value_and_grad(mean)(params)

    def train(gradient):
        @jax.jit
        @chex.assert_max_traces(n=1)
        def step(params, state):
            loss, grads = gradient(params, x, labels, WEIGHT)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, loss

        chex.clear_trace_counter()
        params, state, losses = parameters(), optimizer.init(parameters()), []
        for _ in range(STEPS):
            params, state, loss = step(params, state)
            losses.append(loss)
        return losses, params

    losses, params = train(accumulated_by_scan)
    expected_losses, expected_params = train(whole)
    assert losses[-1] < 0.5 * losses[0]
    chex.assert_trees_all_close(losses, expected_losses, rtol=ROUNDINGS, atol=ROUNDINGS)
    chex.assert_trees_all_close(params, expected_params, rtol=ROUNDINGS, atol=ROUNDINGS)
