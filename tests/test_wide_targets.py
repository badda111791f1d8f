"""Integers that JAX would cut to 32 bits are judged before they are: never another class."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import examples
from hypothesis import given

import jaxent
from jaxent import reference

LOGITS = np.log(np.array([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]], "float32"))
HEAD = LOGITS, np.eye(3, dtype="float32")
FUNCTIONS = {
    "cross_entropy": lambda t, **kw: jaxent.cross_entropy(LOGITS, t, reduction="none", **kw),
    "nll": lambda t, **kw: jaxent.nll(LOGITS, t, reduction="none", **kw),
    "linear_cross_entropy": lambda t, **kw: jaxent.linear_cross_entropy(
        *HEAD, t, reduction="none", **kw
    ),
    "token_stats": lambda t, **kw: -jaxent.token_stats(LOGITS, t, **kw).log_prob,
    "linear_token_stats": lambda t, **kw: -jaxent.linear_token_stats(*HEAD, t, **kw).log_prob,
    "CrossEntropyLoss": lambda t, **kw: jaxent.CrossEntropyLoss(reduction="none", **kw)(LOGITS, t),
    "reference.cross_entropy": lambda t, **kw: reference.cross_entropy(
        LOGITS, t, reduction="none", **kw
    ),
    "reference.nll": lambda t, **kw: reference.nll(LOGITS, t, reduction="none", **kw),
    "reference.linear_cross_entropy": lambda t, **kw: reference.linear_cross_entropy(
        *HEAD, t, reduction="none", **kw
    ),
    "reference.token_stats": lambda t, **kw: -reference.token_stats(LOGITS, t, **kw).log_prob,
}
# -2**63 is what NaN becomes as an int64; the others are classes, or ignored, when cut.
WIDE = [
    -(2**63),
    2**63 - 1,
    2**32,
    2**32 + 1,
    2**32 - 100,
    -(2**32) + 2,
    -(2**31) - 1,
    2**31,
    2**40,
]
functions = pytest.mark.parametrize("function", FUNCTIONS)


@functions
@pytest.mark.parametrize("wide", WIDE)
def test_a_wide_integer_is_out_of_range(function, wide):
    f = FUNCTIONS[function]
    for targets in (np.array([wide, 1]), [wide, 1], [np.int64(wide), 1], (wide, 1)):
        losses = np.asarray(f(targets))
        assert np.isnan(losses[0])
        np.testing.assert_allclose(losses[1], np.log(4), rtol=1e-6)


@functions
@pytest.mark.parametrize("wide", [2**63, 2**64 - 1, 2**32, 2**64 - 100])
def test_a_wide_unsigned_integer_is_out_of_range(function, wide):
    for targets in (np.array([wide, 1], "uint64"), [wide, 1], [wide, -100]):
        losses = np.asarray(FUNCTIONS[function](targets))
        assert np.isnan(losses[0])
        assert np.isfinite(losses[1])


@functions
@pytest.mark.parametrize("wide", [2**64, -(2**63) - 1, 2**100, -(2**100)])
def test_an_integer_wider_than_any_dtype_is_out_of_range(function, wide):
    losses = np.asarray(FUNCTIONS[function]([wide, 1]))
    assert np.isnan(losses[0])
    assert np.isfinite(losses[1])


@functions
@pytest.mark.parametrize("ignored", [-(2**63), 2**63 - 1, 2**32, 2**32 + 1, 2**31 - 1, 2**31 - 2])
def test_a_wide_integer_is_ignored_where_it_is_asked(function, ignored):
    f = FUNCTIONS[function]
    np.testing.assert_array_equal(f(np.array([ignored, 1]), ignore_index=ignored)[0], 0)
    for other in (*WIDE, 2**31 - 1, 2**31 - 2):
        if other != ignored:
            assert np.isnan(f(np.array([other, 1]), ignore_index=ignored)[0]), other


@examples(60)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 5), min_size=2, max_size=2),
    st.none() | st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 5),
    st.booleans(),
    st.sampled_from(sorted(FUNCTIONS)),
)
def test_what_numpy_integers_mean_is_what_they_are(targets, ignored, x64, function):
    with jax.enable_x64(x64):
        found = np.asarray(FUNCTIONS[function](np.array(targets, "int64"), ignore_index=ignored))
    for row, target, loss in zip(LOGITS, targets, found):
        wanted = 0 if target == ignored else -row[target] if 0 <= target < 3 else np.nan
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)


@pytest.mark.parametrize("module", [jaxent, reference])
def test_total_weight_counts_what_is_not_ignored(module):
    for targets in (np.array([-(2**63), 1, 2**32 + 1]), [-(2**63), 1, 2**32 + 1]):
        assert module.total_weight(targets) == 3
        assert module.total_weight(targets, ignore_index=-(2**63)) == 2
        assert module.total_weight(targets, ignore_index=2**32 + 1, weight=[1, 2, 3]) == 3
        assert module.total_weight(targets, weight=[1, 2, 3]) == 4  # out of range counts as 1


def test_targets_of_a_constant_in_compiled_code_are_judged_too():
    wide = np.array([2**32 + 1, 1])
    loss, gradient = jax.jit(jax.value_and_grad(lambda x: jaxent.cross_entropy(x, wide)))(LOGITS)
    assert np.isnan(loss)
    assert np.all(np.isnan(gradient[0]))
    assert np.all(np.isfinite(gradient[1]))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "uint32"])
def test_an_ignore_index_that_no_target_can_be_is_an_error(dtype):
    targets = jnp.zeros(2, dtype)
    limit = jnp.iinfo(dtype).max
    for function in FUNCTIONS.values():
        with pytest.raises(ValueError, match=f"ignore_index={limit + 1}: targets are {dtype}"):
            function(targets, ignore_index=limit + 1)
    with pytest.raises(ValueError, match="no int8 is 255"):
        jaxent.total_weight(np.array([-1, 3], "int8"), ignore_index=255)


@functions
def test_a_negative_ignore_index_is_no_unsigned_target(function):
    losses = FUNCTIONS[function](np.array([0, 156], "uint8"), ignore_index=-100)
    assert np.isfinite(losses[0])
    assert np.isnan(losses[1])


class OtherArray:
    """What another library's array looks like to NumPy."""

    def __init__(self, values):
        self.values = np.asarray(values)

    def __array__(self, dtype=None, copy=None):
        return self.values if dtype is None else self.values.astype(dtype)


@functions
def test_targets_of_other_libraries_and_byte_orders_are_judged_too(function):
    f = FUNCTIONS[function]
    expected = np.asarray(f(np.array([2, 1])))
    for dtype in (">i2", ">i4", ">i8", ">u8"):
        np.testing.assert_array_equal(f(np.array([2, 1], dtype)), expected)
    np.testing.assert_array_equal(f(OtherArray([2, 1])), expected)
    one_by_one = [np.array(2**32 + 1), np.array(1)]
    for wide in (OtherArray([2**32 + 1, 1]), np.array([2**32 + 1, 1], ">i8"), one_by_one):
        losses = np.asarray(f(wide))
        assert np.isnan(losses[0])
        assert losses[1] == expected[1]
        with pytest.raises(ValueError, match=rf"targets\[0\] is {2**32 + 1}"):
            jaxent.check_targets(wide, 3)


def test_token_files_are_judged_too(tmp_path):
    tokens = np.memmap(tmp_path / "tokens", dtype="int64", mode="w+", shape=(2,))
    tokens[:] = [2**32 + 1, 0]
    assert np.isnan(jaxent.cross_entropy(LOGITS, tokens))
    with pytest.raises(ValueError, match=rf"targets\[0\] is {2**32 + 1}"):
        jaxent.check_targets(tokens, 3)


def test_an_empty_list_is_no_targets():
    assert jaxent.cross_entropy(np.zeros((0, 3), "float32"), []) == 0
    assert jaxent.total_weight([]) == 0


def test_logits_of_other_byte_orders_are_what_they_are():
    expected = jaxent.cross_entropy(LOGITS, [2, 1], weight=[1, 2, 3])
    found = jaxent.cross_entropy(LOGITS.astype(">f4"), [2, 1], weight=np.array([1, 2, 3], ">f8"))
    np.testing.assert_array_equal(found, expected)
    found = jaxent.linear_cross_entropy(*(x.astype(">f4") for x in HEAD), [2, 1], weight=[1, 2, 3])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# check_targets


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            np.array([0, 5, 7]),
            r"targets\[1\] is 5, outside \[0, 5\) and not ignore_index=-100; 2 of",
        ),
        ([[0, 1], [2, -1]], r"targets\[1, 1\] is -1, outside .*; 1 of 4 targets are"),
        (jnp.array([9]), r"targets\[0\] is 9"),
        (np.array([2**32 + 1, 0]), rf"targets\[0\] is {2**32 + 1}"),
        ([2**70, 0], rf"targets\[0\] is {2**70}"),
        (7, "targets is 7"),
    ],
)
def test_check_targets_names_the_first_bad_one(targets, message):
    with pytest.raises(ValueError, match=message):
        jaxent.check_targets(targets, 5)


def test_check_targets_passes_what_a_loss_takes():
    jaxent.check_targets(np.array([0, 4, -100]), 5)
    jaxent.check_targets(np.array([0, 4, 255], "uint8"), 5, ignore_index=255)
    jaxent.check_targets(np.array([-(2**63), 4]), 5, ignore_index=-(2**63))
    jaxent.check_targets(np.zeros((0, 3), int), 5)
    for bad in ({"ignore_index": None}, {"ignore_index": 0}):
        with pytest.raises(ValueError, match="is -100, outside"):
            jaxent.check_targets(np.array([0, -100]), 5, **bad)


def test_check_targets_refuses_what_are_no_indices():
    with pytest.raises(TypeError, match="check_targets takes class indices"):
        jaxent.check_targets(np.zeros(3), 5)
    with pytest.raises(TypeError, match=r"num_classes must be a positive integer, got 5\.0"):
        jaxent.check_targets(np.zeros(3, int), 5.0)
    with pytest.raises(ValueError, match="num_classes must be a positive integer, got 0"):
        jaxent.check_targets(np.zeros(3, int), 0)


@pytest.mark.parametrize("shape", [(3,), (2, 2), (), (0,)])
def test_check_targets_is_checkifys_check_in_traced_code(shape):
    from jax.experimental import checkify

    def step(targets):
        jaxent.check_targets(targets, 5)
        return targets.sum()

    checked = jax.jit(checkify.checkify(step))
    error, _ = checked(jnp.full(shape, 4))
    error.throw()
    if 0 in shape:
        return
    bad = jnp.full(shape, 9) if not shape else jnp.full(shape, 4).at[(-1,) * len(shape)].set(9)
    error, _ = checked(bad)
    with pytest.raises(checkify.JaxRuntimeError, match=r"target 9, .* outside \[0, 5\)"):
        error.throw()


def test_check_targets_is_the_callers_own_effect():
    jaxpr = jax.make_jaxpr(lambda t: jaxent.cross_entropy(LOGITS, t))(jnp.zeros(2, int))
    assert not jaxpr.effects
    with pytest.raises(ValueError, match="functionaliz"):
        jax.jit(lambda t: jaxent.check_targets(t, 5))(jnp.zeros(2, int))
