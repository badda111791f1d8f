"""Tokens of a head that do not count: they are in no block, and nothing else changes."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import eps
from hypothesis import given, settings

import jaxent
from jaxent import reference
from jaxent._forms import forced
from jaxent._head.tokens import Blocks

TOKENS, WIDTH, CLASSES = 40, 6, 21
forms = pytest.mark.parametrize("made_forward", [False, True])
parts = pytest.mark.parametrize("part", [0.3, 1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 12), st.booleans())
def test_blocks_have_each_token_that_counts_once_and_in_order(uncounted, size, skip):
    blocks = Blocks.of(size, jnp.array(uncounted)[:, None], skip)
    tokens = np.arange(len(uncounted))
    counted = tokens[~np.array(uncounted)] if skip else tokens
    order = tokens if blocks.order is None else np.asarray(blocks.order)
    np.testing.assert_array_equal(order[: len(counted)], counted)
    assert sorted(order[: len(tokens)]) == list(tokens)
    assert len(order) % size == 0
    assert (int(blocks.turns) - 1) * size < len(counted) <= int(blocks.turns) * size
    x = jnp.arange(2 * len(tokens)).reshape(-1, 2)
    np.testing.assert_array_equal(blocks.back(blocks.first(x)), x)
    assert not np.any(np.broadcast_to(blocks.unreached(), (len(order), 1))[: len(counted)])


def draw(part, seed=0):
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(TOKENS, WIDTH)).astype("float32")
    kernel = random.normal(size=(WIDTH, CLASSES)).astype("float32")
    targets = random.integers(0, CLASSES, TOKENS).astype("int32")
    uncounted = random.permutation(TOKENS) < part * TOKENS
    return hidden, kernel, targets, uncounted


def in_blocks(made_forward):
    jax.clear_caches()
    return forced(made_forward=made_forward, skip=True, block=7)


def assert_alike(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        size = max(1, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=32 * eps("float32") * size)


KINDS = {
    "ignored": lambda targets, uncounted: (np.where(uncounted, -100, targets), None),
    "a mask": lambda targets, uncounted: (targets, ~uncounted),
    "weights": lambda targets, uncounted: (
        targets,
        np.where(uncounted, 0, np.linspace(0.5, 2, TOKENS)).astype("float32"),
    ),
}
OPTIONS = {
    "plain": {},
    "every option": {
        "weight": np.linspace(0.5, 2, CLASSES, dtype="float32"),
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 4.0,
        "logit_scale": 0.7,
        "class_mask": np.arange(CLASSES) != 3,
        "bias": np.linspace(-1, 1, CLASSES, dtype="float32"),
    },
}


@forms
@pytest.mark.parametrize("part", [0, 0.4, 1])
@pytest.mark.parametrize(
    ("kind", "options"), [("ignored", "plain"), *((k, "every option") for k in KINDS)]
)
def test_law_14_a_head_that_skips_tokens_is_the_formula(made_forward, part, kind, options):
    hidden, kernel, targets, uncounted = draw(part)
    targets = np.where(targets == 3, 4, targets)
    targets, sample_weight = KINDS[kind](targets, uncounted)
    hidden[uncounted] = np.nan

    def run(module, reduction):
        def loss(hidden, kernel):
            return module.linear_cross_entropy(
                hidden,
                kernel,
                targets,
                sample_weight=sample_weight,
                reduction=reduction,
                **OPTIONS[options],
            )

        def total(hidden, kernel):
            losses = loss(hidden, kernel)
            return jnp.sum(losses * jnp.linspace(1, 2, losses.size).reshape(losses.shape)), losses

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, kernel)

    reduction = "mean" if made_forward else "none"
    expected = run(reference, reduction)
    with in_blocks(made_forward):
        assert_alike(run(jaxent, reduction), expected)


@forms
def test_a_sample_weight_of_0_has_its_derivatives_where_it_is_differentiated(made_forward):
    hidden, kernel, targets, uncounted = draw(0.5)
    sample_weight = np.where(uncounted, 0, 1).astype("float32")

    def loss(module, sample_weight, hidden):
        return module.linear_cross_entropy(
            hidden, kernel, targets, sample_weight=sample_weight, reduction="sum"
        )

    def derivatives(module):
        of = functools.partial(loss, module)
        both = jax.grad(of, (0, 1))(sample_weight, hidden)
        mixed = jax.jacobian(jax.grad(of, 1))(sample_weight, hidden)
        other = jax.jacobian(jax.grad(of, 0), 1)(sample_weight, hidden)
        return jax.grad(of)(sample_weight, hidden), both, mixed, other

    expected = derivatives(reference)
    assert np.all(expected[0][uncounted] > 0)
    with in_blocks(made_forward):
        assert_alike(derivatives(jaxent), expected)


@forms
@parts
def test_second_order_with_skipped_tokens_is_the_formulas(made_forward, part):
    hidden, kernel, targets, uncounted = draw(part)
    targets = np.where(uncounted, -100, targets)

    def norm(module):
        def of(hidden, kernel):
            gradients = jax.grad(module.linear_cross_entropy, (0, 1))(hidden, kernel, targets)
            return sum(jnp.sum(x * x) for x in gradients)

        return jax.jit(jax.grad(of, (0, 1)))(hidden, kernel)

    expected = norm(reference)
    with in_blocks(made_forward):
        assert_alike(norm(jaxent), expected)


@forms
def test_vmap_over_batches_of_other_counts(made_forward):
    batches = [draw(part, seed) for seed, part in enumerate((0, 0.4, 1))]
    hidden, kernel, targets = (np.stack([b[i] for b in batches]) for i in range(3))
    targets = np.where(np.stack([b[3] for b in batches]), -100, targets)

    def run(module):
        loss = jax.value_and_grad(module.linear_cross_entropy, (0, 1))
        return jax.jit(jax.vmap(loss))(hidden, kernel, targets)

    expected = run(reference)
    with in_blocks(made_forward):
        found = run(jaxent)
        program = jax.make_jaxpr(jax.vmap(jaxent.linear_cross_entropy))(hidden, kernel, targets)
    assert_alike(found, expected)
    # A turn is no select over what a batch carries: all take as many as the longest.
    assert "reduce_or" not in str(program)


@parts
def test_statistics_of_skipped_tokens_are_0(part):
    hidden, kernel, targets, uncounted = draw(part)
    targets = np.where(uncounted, -100, targets)

    def run(module):
        def total(hidden, kernel):
            stats = module.linear_token_stats(hidden, kernel, targets)
            floats = stats[:3]
            return sum(jnp.sum(jnp.cos(x)) for x in floats), stats

        return jax.jit(jax.grad(total, (0, 1), has_aux=True))(hidden, kernel)

    expected = run(reference)
    with in_blocks(False):
        found = run(jaxent)
    assert_alike(found[0], expected[0])
    assert_alike(found[1]._asdict(), expected[1]._asdict())


@pytest.mark.parametrize("differentiated", [False, True])
@forms
def test_law_14_the_number_of_turns_is_that_of_the_tokens_that_count(made_forward, differentiated):
    """No loop over tokens has a length that the compiler knows, where tokens may not count."""
    arguments = (
        jax.ShapeDtypeStruct((4096, 8), "float32"),
        jax.ShapeDtypeStruct((8, 4096), "float32"),
        jax.ShapeDtypeStruct((4096,), "int32"),
    )

    def open_loops(sample_weight=None, **keywords):
        loss = functools.partial(jaxent.linear_cross_entropy, **keywords)
        run = jax.value_and_grad(loss, (0, 1)) if differentiated else loss
        with forced(made_forward=made_forward, skip=True):
            lowered = jax.jit(run).lower(*arguments, sample_weight=sample_weight)
        text = lowered.compile().as_text()
        loops = [line for line in text.splitlines() if " while(" in line]
        return sum("known_trip_count" not in line for line in loops)

    assert open_loops()
    assert not open_loops(ignore_index=None)
    assert open_loops(ignore_index=None, sample_weight=jax.ShapeDtypeStruct((4096,), "float32"))
