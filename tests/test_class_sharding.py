"""Law 11 for split classes: over mapped axes, alone or with split examples, all is the whole's.

The head's kernel is split over classes too, and over its width. `tests/sharded_calls.py` has the
calls.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sharded import assert_equal, floats, jit, make_mesh
from sharded_calls import (
    AXES,
    CASES,
    MAPPED,
    SIZES,
    WHOLE,
    arrays,
    call,
    given,
    nested,
    over_mesh,
    whole,
    with_gradients,
)

import jaxent
from jaxent import reference


@functools.cache
def mesh():
    return make_mesh("auto", **SIZES)


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


def test_the_calls_are_what_these_tests_need():
    a = arrays()
    per_shard = a["m"].reshape(4, -1).sum(-1)
    assert per_shard.tolist() == [6, 6, 5, 0]
    counted = (a["y"] != -100) & (a["s"] != 0)
    assert counted.reshape(2, -1).sum(-1).tolist() == [5, 6]
    assert np.isnan(a["x"]).any()
    assert np.isnan(a["h"]).any()


@pytest.mark.parametrize("case", CASES)
def test_law_2_whole_equals_the_reference(case):
    expected = jit(with_gradients(call(case, WHOLE, reference)))(given(case))
    assert_equal(whole(case), expected)


@pytest.mark.parametrize(
    ("way", "case"),
    [(way, case) for way in ("shard_map", "vmap") for case in CASES]
    + [(way, case) for way in ("shard_map, check_vma=False", "pmap of vmap") for case in FULLEST],
)
def test_law_11_loss_and_gradient_outside_the_mapped_function_equal_the_whole(case, way):
    mapped = WAYS[way](call(case, MAPPED))
    assert_equal(jit(with_gradients(mapped))(given(case)), whole(case))


@pytest.mark.parametrize("case", CASES)
def test_law_11_gradient_inside_a_checked_shard_map_equals_the_whole(case):
    evaluated = with_gradients(call(case, MAPPED))
    mapped = WAYS["shard_map"](evaluated, floats(given(case)))
    assert_equal(jit(mapped)(given(case)), whole(case))


@pytest.mark.parametrize("way", ["vmap", "pmap of vmap", "shard_map, check_vma=False"])
@pytest.mark.parametrize("case", FULLEST)
def test_law_11_gradient_inside_other_maps_is_right_after_pmean_and_division(case, way):
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


@pytest.mark.parametrize("case", CASES)
def test_reference_refuses_the_names_of_mapped_axes(case):
    """It computes whole arrays, which is what these tests compare with."""
    for way in ("shard_map", "vmap"):
        mapped = WAYS[way](call(case, MAPPED, reference))
        message = r"axis_name='\w+': jaxent.reference computes whole arrays.* is a mapped axis"
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(mapped, given(case))


def test_reference_takes_the_names_of_a_mesh_whose_arrays_are_whole():
    tree = given("cross_entropy")
    with jax.set_mesh(mesh()):
        actual = jit(call("cross_entropy", MAPPED, reference))(tree)
    assert_equal(actual, whole("cross_entropy")[0])


# ---- Values that cannot raise --------------------------------------------------------------


def hard_rows():
    """Return logits, targets of every kind, and sample weights, some of which are 0.

    The logits are infinite or not a number on some shards of the classes or on all.
    """
    x = np.array(given("cross_entropy")["clean"])
    labels = np.arange(len(x)) % x.shape[1]
    weights = np.ones(len(x), np.float32)
    x[0, :6] = -np.inf  # a whole shard; the target is on it
    x[1, 6:12] = -np.inf  # the target is elsewhere
    x[2] = x[3] = -np.inf
    x[4, 7] = x[5, 7] = np.nan
    x[6, 20] = x[7, 20] = np.inf
    x[8] += 1e4
    x[9, :6] -= 1e4
    labels[[10, 11]] = 24, -7
    labels[[12, 13]] = -100
    x[13] = np.nan
    weights[[3, 5, 7, 11]] = 0
    return jnp.asarray(x), jnp.asarray(labels), jnp.asarray(weights)


@pytest.mark.parametrize("function", ["cross_entropy", "nll"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_is_not_finite_is_as_loud_as_in_whole_rows(function, smoothing):
    x, y, s = hard_rows()
    cotangent = jnp.cos(jnp.arange(len(y)))
    keywords = {"reduction": "none", "ignore_index": -100}
    if function == "cross_entropy":
        keywords |= {"label_smoothing": smoothing, "z_loss": 0.01}

    def losses(x, s, **names):
        return getattr(jaxent, function)(x, y, sample_weight=s, **keywords, **names)

    mapped = jax.shard_map(
        lambda x, s: losses(x, s, class_axis_name="model"),
        mesh=mesh(),
        in_specs=(P(None, "model"), P()),
        out_specs=P(),
    )

    @jit
    def both(x, s):
        def values(f):
            value, pull = jax.vjp(f, x, s)
            return value, pull(cotangent)

        return values(mapped), values(losses)

    actual, expected = (jax.tree.leaves(results) for results in both(x, s))
    assert np.isnan(expected[0]).any()
    assert np.isinf(expected[0]).any()
    for a, b in zip(actual, expected):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        np.testing.assert_allclose(a, b, rtol=16 * float(jnp.finfo("float32").eps), atol=1e-5)


def test_prediction_of_split_classes_is_the_first_of_equals():
    x = np.zeros((3, 24), np.float32)
    x[1, [8, 20]] = 3
    x[2, :12] = -np.inf
    y = jnp.array([0, 8, 20])

    def predictions(x, **names):
        return jaxent.token_stats(x, y, **names).prediction

    mapped = jax.shard_map(
        functools.partial(predictions, class_axis_name="model"),
        mesh=mesh(),
        in_specs=P(None, "model"),
        out_specs=P(),
    )
    assert mapped(x).tolist() == predictions(x).tolist() == [0, 8, 12]


# ---- Objects -------------------------------------------------------------------------------


def test_objects_over_shards_equal_the_whole():
    names = {"axis_name": "data", "class_axis_name": "model"}
    tree = given("linear, every option") | given("nll")
    losses = {
        "dense": jaxent.CrossEntropyLoss(label_smoothing=0.1, z_loss=0.01, softcap=3.0, **names),
        "nll": jaxent.NLLLoss(**names),
        "head": jaxent.LinearCrossEntropyLoss(
            label_smoothing=0.1, width_axis_name="data", dtype=jnp.float32, **names
        ),
    }
    wide = given("linear, width split")["wide_k"]

    def evaluated(tree, **whole):
        keywords = {"weight": tree["w"], "sample_weight": tree["s"], **whole}
        return (
            losses["dense"](tree["clean"], tree["y"], **keywords),
            losses["nll"](tree["clean"], tree["y"], **keywords),
            losses["head"](
                tree["h"],
                tree["wide_k"],
                tree["y"],
                bias=tree["b"],
                **keywords,
                **({"width_axis_name": None} if whole else {}),
            ),
        )

    tree = tree | {"wide_k": wide}
    actual = jit(over_mesh(mesh())(evaluated))(tree)
    expected = jit(functools.partial(evaluated, axis_name=None, class_axis_name=None))(tree)
    assert_equal(actual, expected)
    assert "class_axis_name='model'" in repr(losses["head"])
