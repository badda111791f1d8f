"""next_token_targets: the shift that every causal model needs, written once."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import examples
from hypothesis import given
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxent

DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


def one_by_one(tokens, segment_ids, ignore_index):
    """Each target by the definition, as Python integers."""
    targets = np.full(tokens.shape, ignore_index, object)
    for place in np.ndindex(tokens.shape):
        after = (*place[:-1], place[-1] + 1)
        if after[-1] < tokens.shape[-1] and segment_ids[after] == segment_ids[place]:
            targets[place] = int(tokens[after])
    return targets


@st.composite
def packed_rows(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from([(7,), (1,), (0,), (3, 5), (2, 3, 4), (0, 4)]))
    dtype = draw(st.sampled_from(DTYPES))
    tokens = random.integers(0, 100, shape).astype(dtype)
    segment_ids = np.sort(random.integers(-1, 3, shape), -1) if draw(st.booleans()) else None
    return tokens, segment_ids, draw(st.sampled_from([-100, -1, 0, 200]))


@examples(40)
@given(packed_rows(), st.sampled_from(["NumPy", "JAX", "jit", "x64"]))
def test_targets_are_those_of_the_definition(rows, how):
    tokens, segment_ids, ignore_index = rows
    ids = np.zeros(tokens.shape, int) if segment_ids is None else segment_ids
    expected = one_by_one(tokens, ids, ignore_index)

    def call(tokens, segment_ids):
        return jaxent.next_token_targets(tokens, segment_ids=segment_ids, ignore_index=ignore_index)

    with jax.enable_x64(how == "x64"):
        if how == "JAX":
            tokens = jnp.asarray(tokens)
        actual = (jax.jit(call) if how == "jit" else call)(tokens, segment_ids)
    assert isinstance(actual, jax.Array)
    np.testing.assert_array_equal(np.asarray(actual).astype(object), expected)
    kind, limits = jax.dtypes.canonicalize_dtype(tokens.dtype), jnp.iinfo(tokens.dtype)
    if how != "x64" and limits.min <= ignore_index <= limits.max:
        assert actual.dtype == kind


@pytest.mark.parametrize("wide", [2**32 + 1, 2**32 - 100, 2**31 + 3, -(2**40)])
def test_a_token_that_is_cut_is_neither_another_class_nor_ignored(wide):
    tokens = [1, wide, 2]
    for given_tokens in (tokens, np.asarray(tokens)):
        targets = jaxent.next_token_targets(given_tokens)
        losses = jaxent.cross_entropy(jnp.zeros((3, 5)), targets, reduction="none")
        assert np.isnan(losses[0])
        np.testing.assert_allclose(losses[1:], [np.log(5), 0], rtol=1e-6)
    if 0 <= wide < 2**32:
        targets = jaxent.next_token_targets(jnp.asarray(np.asarray(tokens, "uint32")))
        assert targets.dtype == jnp.int32
        assert np.isnan(jaxent.cross_entropy(jnp.zeros((3, 5)), targets))


@pytest.mark.parametrize("ignore_index", [2**31 - 1, -100])
def test_a_token_beyond_the_targets_dtype_is_out_of_range_whatever_is_ignored(ignore_index):
    for tokens in (np.array([1, 2**40, 2**33, 3]), [1, 2**40, 2**33, 3], [1, 2**64, -(2**63), 3]):
        targets = jaxent.next_token_targets(tokens, ignore_index=ignore_index)
        assert targets.dtype == jnp.int32
        np.testing.assert_array_equal(targets[2:], [3, ignore_index])
        assert np.all((targets[:2] >= 2**31 - 2) & (targets[:2] != ignore_index))


def test_hidden_states_need_no_shift():
    hidden = jax.random.normal(jax.random.key(0), (2, 6, 4))
    kernel = jax.random.normal(jax.random.key(1), (4, 9))
    tokens = jax.random.randint(jax.random.key(2), (2, 6), 0, 9)
    loss = jaxent.linear_cross_entropy(hidden, kernel, jaxent.next_token_targets(tokens))
    expected = jaxent.cross_entropy((hidden @ kernel)[:, :-1], tokens[:, 1:], axis=-1)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_an_explicit_mesh_may_split_the_sequence():
    mesh = jax.make_mesh((2, 2), ("data", "sequence"), (AxisType.Explicit,) * 2)
    tokens = np.arange(32).reshape(4, 8)
    ids = tokens // 3
    expected = jaxent.next_token_targets(tokens, segment_ids=ids)
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, P("data", "sequence")) for x in (tokens, ids)]
        for call in (jaxent.next_token_targets, jax.jit(jaxent.next_token_targets)):
            targets = call(split[0], segment_ids=split[1])
            assert jax.typeof(targets).sharding.spec == P("data", "sequence")
            np.testing.assert_array_equal(targets, expected)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"tokens": [1.0, 2.0]}, TypeError, "tokens must be an integer array, got float"),
        ({"tokens": [True, False]}, TypeError, r"tokens must be an integer array, got bool\[2\]"),
        ({"tokens": 3}, ValueError, r"tokens must be a sequence, \(\.\.\., T\), got a scalar"),
        (
            {"segment_ids": [1, 2]},
            ValueError,
            r"tokens are \[3\], segment_ids \[2\]: they must be of one shape",
        ),
        ({"segment_ids": [1.0, 2, 2]}, TypeError, "segment_ids must be an integer array"),
        ({"ignore_index": None}, ValueError, "ignore_index must be an integer"),
        ({"ignore_index": 2**31}, ValueError, "ignore_index=2147483648 is no int32"),
    ],
)
def test_refused_by_name(keywords, error, message):
    with pytest.raises(error, match=message):
        jaxent.next_token_targets(**({"tokens": [1, 2, 3]} | keywords))


@pytest.mark.parametrize("ids", [[2**40, 2**40, 2**41, 2**41], [2**63, 2**63, 2**63 + 1, 0]])
def test_segments_are_told_apart_whatever_their_numbers(ids):
    for segment_ids in (ids, np.array(ids, "uint64")):
        targets = jaxent.next_token_targets(np.array([5, 6, 7, 8]), segment_ids=segment_ids)
        last = 8 if ids[-1] == ids[-2] else -100
        np.testing.assert_array_equal(targets, [6, -100, last, -100])
