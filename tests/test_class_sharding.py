"""Law 11 for split classes: over mapped axes, alone or with split examples, all is the whole's.

The head's kernel is split over classes too, and over its width. `tests/sharded_calls.py` has the
calls.
"""

import functools

import jax
import numpy as np
import pytest
from sharded import assert_equal, auto_mesh, floats, jit
from sharded_calls import (
    AXES,
    CASES,
    MAPPED,
    SIZES,
    WHOLE,
    arrays,
    given,
    nested,
    over_mesh,
)

import jaxent
from jaxent import reference


@functools.cache
def mesh():
    return auto_mesh((2, 4), ("data", "model"))


WAYS = {
    "shard_map": lambda *out: over_mesh(mesh())(*out),
    "shard_map, check_vma=False": lambda *out: over_mesh(mesh(), check_vma=False)(*out),
    "vmap": nested(jax.vmap, jax.vmap),
    "pmap of vmap": nested(jax.pmap, jax.vmap),
}
FULLEST = (
    "cross_entropy, every option",
    "cross_entropy, probabilities",
    "linear, every option",
    "linear, width split",
    "linear_token_stats",
)


def call(case, names, module=jaxent):
    return lambda tree: CASES[case][0](module, tree, names)


def with_gradients(f):
    def evaluated(tree):
        return jax.value_and_grad(lambda some: f(tree | some))(floats(tree))

    return evaluated


@functools.cache
def whole(case):
    return jit(with_gradients(call(case, WHOLE)))(given(case))


def test_the_calls_are_what_these_tests_need():
    a = arrays()
    per_shard = a["m"].reshape(4, -1).sum(-1)
    assert per_shard.tolist() == [6, 6, 5, 0]
    counted = (a["y"] != -100) & (a["s"] != 0)
    assert counted.reshape(2, -1).sum(-1).tolist() == [5, 6]
    assert np.isnan(a["x"]).any() and np.isnan(a["h"]).any()


@pytest.mark.parametrize("case", CASES)
def test_whole_equals_the_reference(case):
    expected = jit(with_gradients(call(case, WHOLE, reference)))(given(case))
    assert_equal(whole(case), expected)


@pytest.mark.parametrize(
    "way, case",
    [(way, case) for way in ("shard_map", "vmap") for case in CASES]
    + [(way, case) for way in ("shard_map, check_vma=False", "pmap of vmap") for case in FULLEST],
)
def test_loss_and_gradient_outside_the_mapped_function_equal_the_whole(case, way):
    mapped = WAYS[way](call(case, MAPPED))
    assert_equal(jit(with_gradients(mapped))(given(case)), whole(case))


@pytest.mark.parametrize("case", CASES)
def test_gradient_inside_a_checked_shard_map_equals_the_whole(case):
    evaluated = with_gradients(call(case, MAPPED))
    mapped = WAYS["shard_map"](evaluated, floats(given(case)))
    assert_equal(jit(mapped)(given(case)), whole(case))


@pytest.mark.parametrize("way", ["vmap", "pmap of vmap", "shard_map, check_vma=False"])
@pytest.mark.parametrize("case", FULLEST)
def test_gradient_inside_other_maps_is_right_after_pmean_and_division(case, way):
    def corrected(tree):
        value, gradients = with_gradients(call(case, MAPPED))(tree)
        for name, gradient in gradients.items():
            for axis, size in SIZES.items():
                split = axis in AXES[name]
                gradient = gradient / size if split else jax.lax.pmean(gradient, axis)
            gradients[name] = gradient
        return value, gradients

    mapped = WAYS[way](corrected, floats(given(case)))
    assert_equal(jit(mapped)(given(case)), whole(case))


@pytest.mark.parametrize("case", [case for case in CASES if "linear" not in case])
def test_reference_over_shards_equals_the_whole(case):
    mapped = WAYS["shard_map"](call(case, MAPPED, reference))
    assert_equal(jit(with_gradients(mapped))(given(case)), whole(case))
