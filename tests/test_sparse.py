"""Sparse targets: law 15, what they say that dense ones cannot, and that they are never dense."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import (
    EVERY_OPTION,
    HeadCall,
    NLL_OPTIONS,
    assert_close,
    assert_same,
    calls,
    eps,
    evaluate,
    examples,
    full_mask,
    head_calls,
    precision,
)
from hypothesis import given
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent
from jaxent import SparseTargets, reference
from jaxent._forms import forced

ULPS = 32
SINGLE = ["float32", "bfloat16"]
SPLIT = [((4, 6), 1), ((6,), 0), ((3, 4, 2), 1)]  # classes in two halves


@st.composite
def sparse_calls(draw, of=calls, options=EVERY_OPTION, *shapes, **keywords):
    """A call with few classes an example: some twice, some places empty, some probabilities 0.

    Its `targets` are the probabilities, (..., K), and `indices` are an argument of their own.
    """
    options = [name for name in options if name != "ignore_index"]
    call = draw(of(options, *shapes, targets=["probabilities"], **keywords))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, num_classes = call.cotangent.shape, call.shape[call.axis]
    shape = (*rows, draw(st.sampled_from([1, 2, 4, 7])))
    ignored = draw(st.sampled_from([-100, -1, None, 0]))
    dtype = draw(st.sampled_from(["int8", "int16", "int32", "int64"]))
    indices = random.integers(0, num_classes, shape)
    if ignored is not None:
        indices = np.where(random.uniform(size=shape) < 0.3, ignored, indices)
    probabilities = random.uniform(size=shape) * (random.uniform(size=shape) < 0.8)
    if (mask := call.get("class_mask")) is not None:  # no mass where there is no class
        mask = np.moveaxis(full_mask(mask, call.shape, call.axis), call.axis, -1)
        exists = np.take_along_axis(mask, np.clip(indices, 0, None), -1)
        probabilities = np.where(exists, probabilities, 0)
    floats = call.floats | {"targets": probabilities.astype(call.dtype)}
    others = call.others | {"indices": indices.astype(dtype), "ignore_index": ignored}
    return dataclasses.replace(call, floats=floats, others=others)


def sparse(function):
    """The function of a sparse call."""

    def run(*positional, indices, **keywords):
        *first, probabilities = positional
        return function(*first, SparseTargets(indices, probabilities), **keywords)

    return run


def dense(function):
    """The function of a sparse call, with the probabilities of all classes made of it."""

    def run(*positional, indices, ignore_index, **keywords):
        *first, probabilities = positional
        logits = first[0]
        if len(first) == 2:
            num_classes, axis = first[1].shape[keywords["class_axis"]], -1
        else:
            axis = keywords["axis"]
            num_classes = logits.shape[axis]
        empty = indices == ignore_index if ignore_index is not None else np.zeros(1, bool)
        one_hots = (indices[..., None] == np.arange(num_classes)) & ~empty[..., None]
        wide = jnp.promote_types(probabilities.dtype, "float32")
        wide_probabilities = probabilities[..., None].astype(wide)
        targets = jnp.sum(jnp.where(one_hots, wide_probabilities, 0), -2)
        counted = ~np.all(np.broadcast_to(empty, indices.shape), -1)
        weight = jnp.where(counted, keywords.pop("sample_weight", np.float32(1)), 0)
        targets = jnp.moveaxis(targets, -1, axis)
        return function(*first, targets, sample_weight=weight, **keywords)

    return run


@pytest.mark.usefixtures("sums")
@examples(40)
@given(sparse_calls())
def test_law_15_sparse_targets_equal_dense_ones(call):
    assert_same(
        evaluate(sparse(jaxent.cross_entropy), call),
        evaluate(dense(jaxent.cross_entropy), call),
        2 * ULPS,
    )


@examples(30)
@given(sparse_calls())
def test_law_2_sparse_targets_equal_their_reference(call):
    assert_same(
        evaluate(sparse(jaxent.cross_entropy), call),
        evaluate(sparse(reference.cross_entropy), call),
        ULPS,
    )


@examples(15)
@given(sparse_calls(options=NLL_OPTIONS))
def test_law_15_nll_of_sparse_targets_equals_dense_ones(call):
    actual = evaluate(sparse(jaxent.nll), call)
    assert_same(actual, evaluate(dense(jaxent.nll), call), ULPS)
    assert_same(actual, evaluate(sparse(reference.nll), call), ULPS)


@pytest.mark.parametrize("made_forward", [False, True])
@examples(25)
@given(sparse_calls(head_calls))
def test_law_15_a_head_with_sparse_targets_equals_dense_ones(made_forward, call):
    with forced(made_forward=made_forward, skip=True, block=3):
        actual = evaluate(sparse(jaxent.linear_cross_entropy), call)
    assert_same(actual, evaluate(dense(reference.linear_cross_entropy), call), 2 * ULPS)
    assert_same(actual, evaluate(sparse(reference.linear_cross_entropy), call), 2 * ULPS)
