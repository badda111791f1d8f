"""The laws that define the library, each over generated calls, values and gradients.

Of the laws in docs/design/laws.md these are 1 to 12. Law 11 on meshes is in test_mesh, 13 in
test_confidence, 14 in test_call_cost and test_tokens, 15 in test_sparse and test_distillation.
"""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import (
    EVERY_OPTION,
    NLL_OPTIONS,
    assert_close,
    assert_same,
    calls,
    eps,
    evaluate,
    examples,
    extreme_calls,
    full_mask,
    head_calls,
    precision,
)
from hypothesis import assume, given

import jaxent
from jaxent import reference
from jaxent._forms import forced

law = examples(15)
HALF_AND_SINGLE = ["float32", "bfloat16"]
BATCHED = [((4, 5), 1), ((6, 3), 1), ((3, 5, 2), 1)]


# Sums over at most 6 classes and 12 examples, each a handful of roundings: 32 ulps of the
# largest number. Gradients in half precision differ by their one rounding.
ULPS = 32


@pytest.mark.usefixtures("sums")
@examples(60)
@given(calls(EVERY_OPTION))
def test_law_2_cross_entropy_equals_its_reference(call):
    actual = evaluate(jaxent.cross_entropy, call)
    assert_same(actual, evaluate(reference.cross_entropy, call), ULPS)


@pytest.mark.usefixtures("sums")
@examples(30)
@given(calls(NLL_OPTIONS))
def test_law_2_nll_equals_its_reference(call):
    assert_same(evaluate(jaxent.nll, call), evaluate(reference.nll, call), ULPS)


@pytest.mark.usefixtures("sums")
@examples(30)
@given(extreme_calls(EVERY_OPTION))
def test_law_2_cross_entropy_equals_its_reference_at_extremes(call):
    actual, expected = (evaluate(m.cross_entropy, call) for m in (jaxent, reference))
    if not np.all(np.isfinite(expected[0])):
        # Forward mode has no rule for a scale whose logit is infinite: only a loss can show that.
        for _, gradients in (actual, expected):
            gradients.pop("logit_scale", None)
    assert_same(actual, expected, ULPS)


@pytest.mark.usefixtures("sums")
@law
@given(extreme_calls(EVERY_OPTION, ["NaN"]))
def test_law_2_nan_that_counts_shows_where_its_reference_has_it(call):
    """Beside the loss in its row's gradient; what examples share may be NaN in part.

    Of a single class the formula is a constant, which has no gradient that could be NaN.
    """
    (loss, gradients), (expected, expected_gradients) = (
        evaluate(m.cross_entropy, call) for m in (jaxent, reference)
    )
    assert_close(loss, expected, ULPS)
    if call.shape[call.axis] > 1:
        assert_close(gradients["logits"], expected_gradients["logits"], ULPS)


@examples(15)
@given(extreme_calls(NLL_OPTIONS))
def test_law_2_nll_equals_its_reference_at_extremes(call):
    assert_same(evaluate(jaxent.nll, call), evaluate(reference.nll, call), ULPS)


@law
@given(calls(EVERY_OPTION, shapes=[((3, 5, 2), 1)], dtypes=HALF_AND_SINGLE))
def test_cross_entropy_is_the_same_without_jit(call):
    actual = evaluate(jaxent.cross_entropy, call, jit=False)
    assert_same(actual, evaluate(reference.cross_entropy, call), ULPS)


@law
@given(calls(("class_mask",)))
def test_law_2_log_softmax_equals_its_reference(call):
    def scores(function):
        def loss(logits, targets, axis, class_mask=None):
            log_probs = function(logits, axis, class_mask=class_mask)
            assert log_probs.dtype == call.dtype
            return jnp.where(jnp.isfinite(log_probs), log_probs, 0).sum(axis)

        return loss

    call = call.replace(targets=np.zeros((), "int32"))
    actual = evaluate(scores(jaxent.log_softmax), call)
    # The sum of rounded log-probabilities has their rounding.
    (loss, grads), (wanted, wanted_grads) = actual, evaluate(scores(reference.log_softmax), call)
    assert_close(loss, wanted, ULPS)
    assert_close(grads["logits"], wanted_grads["logits"], ULPS)


@law
@given(calls(("weight", "ignore_index", "sample_weight"), targets=["indices"]))
def test_law_2_total_weight_equals_its_reference_and_what_mean_divides_by(call):
    keywords = {
        k: call.get(k, -100 if k == "ignore_index" else None)
        for k in ("weight", "ignore_index", "sample_weight")
    }
    with precision(call):
        actual = jaxent.total_weight(call.targets, **keywords)
        assert_close(actual, reference.total_weight(call.targets, **keywords), ULPS)
    mean, _ = evaluate(jaxent.cross_entropy, call.replace(reduction="mean"))
    total, _ = evaluate(jaxent.cross_entropy, call.replace(reduction="sum"))
    assert_close(total, mean * float(actual), ULPS)


@law
@given(calls(NLL_OPTIONS, dtypes=HALF_AND_SINGLE))
def test_law_1_cross_entropy_is_nll_of_log_softmax(call):
    def composed(logits, targets, axis, **keywords):
        return jaxent.nll(jaxent.log_softmax(logits, axis), targets, axis=axis, **keywords)

    loss, grads = evaluate(jaxent.cross_entropy, call)
    composed_loss, composed_grads = evaluate(composed, call)
    # Log-probabilities (of size up to 20 here) are rounded to the logits' dtype.
    rounding = 20 * eps(call.dtype) / eps("float32")
    assert_close(composed_loss, loss, ULPS + rounding)
    for name, grad in grads.items():
        assert_close(composed_grads[name], grad, ULPS + rounding, "float32")


@law
@given(calls(("weight", "sample_weight", "label_smoothing", "z_loss"), targets=["indices"]))
def test_law_3_indices_equal_one_hot_probabilities(call):
    call = call.replace(reduction="none")
    one_hot = jax.nn.one_hot(call.targets.astype(int), call.shape[call.axis], axis=call.axis)
    as_probabilities = call.replace(targets=np.asarray(one_hot))
    loss, grads = evaluate(jaxent.cross_entropy, call)
    same_loss, same_grads = evaluate(jaxent.cross_entropy, as_probabilities)
    assert_close(same_loss, loss, ULPS)
    for name in grads:
        assert_close(same_grads[name], grads[name], ULPS)


@law
@given(calls(("sample_weight", "label_smoothing"), targets=["indices"]))
def test_law_3_indices_equal_one_hot_probabilities_in_the_mean(call):
    one_hot = jax.nn.one_hot(call.targets.astype(int), call.shape[call.axis], axis=call.axis)
    loss, _ = evaluate(jaxent.cross_entropy, call)
    same, _ = evaluate(jaxent.cross_entropy, call.replace(targets=np.asarray(one_hot)))
    assert_close(same, loss, ULPS)


@law
@given(
    calls(("weight", "ignore_index", "sample_weight", "class_mask", "z_loss", "softcap")),
    st.floats(0, 1, width=32),
)
def test_law_4_smoothing_is_a_mixture_with_uniform_targets(call, smoothing):
    call = call.replace(reduction="none")
    if (mask := call.get("class_mask")) is not None:
        exists = full_mask(mask, call.shape, call.axis)
        # Target mass on a class that does not exist is infinite.
        assume(np.all(exists.any(call.axis)))
    else:
        exists = np.ones(call.shape, bool)
    uniform = exists / exists.sum(call.axis, keepdims=True)
    wide = "float64" if call.dtype == "float64" else "float32"
    counted, _ = evaluate(
        jaxent.cross_entropy, call.replace(label_smoothing=np.asarray(smoothing, wide))
    )
    hard, _ = evaluate(jaxent.cross_entropy, call)
    even = call.replace(targets=uniform.astype(wide))
    ignore_index = call.get("ignore_index", -100)
    if call.targets.dtype.kind in "iu":
        ignored = np.zeros_like(hard, bool)
        if ignore_index is not None:
            ignored = call.targets == ignore_index
        even = even.replace(ignore_index=-100)
    else:
        ignored = np.zeros_like(hard, bool)
    spread, _ = evaluate(jaxent.cross_entropy, even)
    mixed = (1 - smoothing) * hard + smoothing * spread
    assert_close(counted[~ignored], mixed[~ignored].astype(wide), 2 * ULPS)


@law
@given(
    calls(("weight", "ignore_index", "label_smoothing", "reduction"), dtypes=HALF_AND_SINGLE),
    st.integers(-16, 16),
)
def test_law_5_a_shift_of_all_logits_changes_nothing(call, shift):
    # Quarters below 4 and integers up to 16 add exactly in 8 bits.
    quarters = np.round(np.clip(call.floats["logits"].astype("float32"), -3.75, 3.75) * 4) / 4
    call = call.replace(logits=quarters.astype(call.dtype))
    shifted = call.replace(logits=(quarters + shift).astype(call.dtype))
    loss, grads = evaluate(jaxent.cross_entropy, call)
    shifted_loss, shifted_grads = evaluate(jaxent.cross_entropy, shifted)
    np.testing.assert_array_equal(shifted_loss, loss)
    for name in grads:
        np.testing.assert_array_equal(shifted_grads[name], grads[name])


@law
@given(calls(EVERY_OPTION, dtypes=HALF_AND_SINGLE), st.integers(0, 2**32 - 1))
def test_law_6_a_permutation_of_the_classes_changes_nothing(call, seed):
    axis, num_classes = call.axis, call.shape[call.axis]
    order = np.random.default_rng(seed).permutation(num_classes)
    place = np.argsort(order)
    changes = {"logits": call.floats["logits"].take(order, axis)}
    if "targets" in call.floats:
        changes["targets"] = call.targets.take(order, axis)
    else:
        inside = (call.targets >= 0) & (call.targets < num_classes)
        index = np.where(inside, call.targets, 0).astype(int)
        changes["targets"] = np.where(inside, place[index], call.targets).astype(call.targets.dtype)
        ignored = call.get("ignore_index")
        if ignored is not None and 0 <= ignored < num_classes:
            changes["ignore_index"] = int(place[ignored])
    if "weight" in call.floats:
        changes["weight"] = call.floats["weight"][order]
    if (mask := call.get("class_mask")) is not None:
        changes["class_mask"] = mask[order] if mask.ndim == 1 else mask.take(order, axis)
    permuted = call.replace(**changes)
    loss, grads = evaluate(jaxent.cross_entropy, call)
    permuted_loss, permuted_grads = evaluate(jaxent.cross_entropy, permuted)
    assert_close(permuted_loss, loss, ULPS)
    for name in grads:
        grad = grads[name]
        if name in ("logits", "targets"):
            grad = grad.take(order, axis)
        elif name == "weight":
            grad = grad[order]
        assert_close(permuted_grads[name], grad, ULPS)


@law
@given(calls(EVERY_OPTION, dtypes=HALF_AND_SINGLE), st.data())
def test_law_7_moving_the_class_axis_changes_nothing(call, data):
    axis = data.draw(st.integers(-len(call.shape), len(call.shape) - 1))

    def moved(array):
        return np.moveaxis(array, call.axis, axis)

    changes = {"logits": moved(call.floats["logits"]), "axis": axis}
    if "targets" in call.floats:
        changes["targets"] = moved(call.targets)
    if (mask := call.get("class_mask")) is not None and mask.ndim > 1:
        changes["class_mask"] = moved(mask)
    loss, grads = evaluate(jaxent.cross_entropy, call)
    moved_loss, moved_grads = evaluate(jaxent.cross_entropy, call.replace(**changes))
    assert_close(moved_loss, loss, ULPS)
    for name in grads:
        expected = moved(grads[name]) if name in ("logits", "targets") else grads[name]
        assert_close(moved_grads[name], expected, ULPS)


@law
@given(calls(EVERY_OPTION, BATCHED, HALF_AND_SINGLE), st.integers(0, 2**32 - 1))
def test_law_8_uncounted_example_acts_as_deleted(call, seed):
    random = np.random.default_rng(seed)
    if call.get("sample_weight") is not None and call.get("sample_weight").size == 1:
        call = call.replace(sample_weight=None)
    rows = call.cotangent.shape
    gone = random.uniform(size=rows) < 0.5
    gone.reshape(rows[0], -1)[0] = True
    # Whole first-axis entries go, so that what is left is an array again.
    gone = np.broadcast_to(
        gone.reshape(rows[0], -1)[:, :1].reshape([-1] + [1] * (len(rows) - 1)), rows
    )
    kept = ~gone.reshape(rows[0], -1)[:, 0]
    in_logits = np.broadcast_to(np.expand_dims(gone, call.axis), call.shape)
    logits = np.where(in_logits, np.nan, call.floats["logits"]).astype(call.dtype)
    changes, deleted = {"logits": logits}, {"logits": call.floats["logits"][kept]}
    by_index = "targets" not in call.floats and call.get("ignore_index", -100) is not None
    if by_index and call.targets.dtype.kind == "i" and random.uniform() < 0.5:
        changes["targets"] = np.where(gone, call.get("ignore_index", -100), call.targets).astype(
            call.targets.dtype
        )
    else:
        weight = call.get("sample_weight", np.ones(rows, "float32"))
        changes["sample_weight"] = np.where(gone, 0, weight).astype(weight.dtype)
        if "targets" in call.floats:
            changes["targets"] = np.where(in_logits, np.nan, call.targets).astype(call.dtype)
    for name in ("targets", "sample_weight"):
        if call.get(name) is not None:
            deleted[name] = call.get(name)[kept]
    if (mask := call.get("class_mask")) is not None and mask.ndim > 1:
        deleted["class_mask"] = mask[kept]
    whole = evaluate(jaxent.cross_entropy, call.replace(**changes))
    shorter = call.replace(**deleted)
    shorter.cotangent = call.cotangent[kept]
    part = evaluate(jaxent.cross_entropy, shorter)
    loss = whole[0]
    if call.get("reduction") == "none":
        np.testing.assert_array_equal(loss[gone], 0)
        loss = loss[kept]
    assert_close(loss, part[0], ULPS)
    for name, expected in part[1].items():
        grad = whole[1][name]
        if name in ("logits", "targets"):
            np.testing.assert_array_equal(grad[in_logits].astype("float32"), 0)
        if name in ("logits", "targets", "sample_weight"):
            grad = grad[kept]
        assert_close(grad, expected, ULPS)


@law
@given(
    calls(
        (
            "weight",
            "ignore_index",
            "sample_weight",
            "label_smoothing",
            "z_loss",
            "softcap",
            "reduction",
        ),
        [((4, 5), 1), ((3, 6, 2), 1)],
        HALF_AND_SINGLE,
    ),
    st.integers(0, 2**32 - 1),
)
def test_law_8_excluded_class_acts_as_deleted(call, seed):
    random = np.random.default_rng(seed)
    axis, num_classes = call.axis, call.shape[call.axis]
    exists = random.uniform(size=num_classes) < 0.6
    exists[1] = True
    shape = [-1 if i == axis else 1 for i in range(len(call.shape))]
    gone = np.broadcast_to(~exists.reshape(shape), call.shape)
    logits = np.where(gone, np.nan, call.floats["logits"]).astype(call.dtype)
    changes = {"logits": logits, "class_mask": exists}
    deleted = {"logits": call.floats["logits"].compress(exists, axis)}
    if "targets" in call.floats:
        changes["targets"] = np.where(gone, 0, call.targets).astype(call.dtype)
        deleted["targets"] = call.targets.compress(exists, axis)
    else:
        call = call.replace(ignore_index=-1)
        targets = call.targets.astype(int)
        alive = exists[np.clip(targets, 0, num_classes - 1)] & (targets >= 0)
        targets = np.where(alive, targets, -1 if call.targets.dtype.kind == "i" else 1)
        renamed = np.where(targets < 0, targets, np.cumsum(exists)[targets] - 1)
        changes["targets"] = targets.astype(call.targets.dtype)
        deleted["targets"] = renamed.astype(call.targets.dtype)
    if "weight" in call.floats:
        deleted["weight"] = call.floats["weight"][exists]
    loss, grads = evaluate(jaxent.cross_entropy, call.replace(**changes))
    expected_loss, expected = evaluate(jaxent.cross_entropy, call.replace(**deleted))
    assert_close(loss, expected_loss, ULPS)
    for name in expected:
        grad = grads[name]
        if name in ("logits", "targets"):
            np.testing.assert_array_equal(grad[gone].astype("float32"), 0)
            grad = grad.compress(exists, axis)
        elif name == "weight":
            np.testing.assert_array_equal(grad[~exists], 0)
            grad = grad[exists]
        assert_close(grad, expected[name], ULPS)


@law
@given(
    calls(("weight", "ignore_index", "sample_weight", "class_mask", "label_smoothing", "reduction"))
)
def test_law_9_gradient_of_a_row_sums_to_zero(call):
    loss, grads = evaluate(jaxent.cross_entropy, call)
    assert np.all(np.isfinite(loss))
    grad = grads["logits"].astype("float64")
    # C roundings in the dtype of the gradient, and the float32 ones behind them. A single class has
    # those of the two 1s whose difference it is.
    num_classes = call.shape[call.axis]
    bound = num_classes * (eps(call.dtype) + ULPS * eps(loss.dtype))
    size = max(np.abs(grad).max(initial=0), num_classes == 1)
    assert np.abs(grad.sum(call.axis)).max(initial=0) <= bound * size


@pytest.mark.parametrize("made_forward", [False, True])
@law
@given(head_calls(EVERY_OPTION))
def test_law_10_head_equals_cross_entropy_of_its_logits(made_forward, call):
    # Gradients in the forward pass are for wide kernels, too slow for here.
    with gradients_in_the_forward_pass(made_forward):
        actual = evaluate(jaxent.linear_cross_entropy, call)
    assert_same(actual, evaluate(reference.linear_cross_entropy, call), 2 * ULPS)


def gradients_in_the_forward_pass(wanted):
    return forced(made_forward=wanted, skip=True, block=3)


@law
@given(calls(EVERY_OPTION, BATCHED, HALF_AND_SINGLE))
def test_law_12_vmap_of_one_example_equals_the_batch(call):
    call = call.replace(reduction="none")
    rows = call.cotangent.shape
    if (weight := call.get("sample_weight")) is not None:
        call = call.replace(sample_weight=np.broadcast_to(weight, rows).copy())
    mapped = {"logits", "targets", "sample_weight"}
    if (mask := call.get("class_mask")) is not None and mask.ndim > 1:
        mapped.add("class_mask")

    def batched(logits, targets, axis, **keywords):
        names = ["logits", "targets", *keywords]
        values = dict(zip(names, [logits, targets, *keywords.values()]))
        arrays = {k: v for k, v in values.items() if k in mapped}
        fixed = {k: v for k, v in values.items() if k not in mapped}

        def one(arrays):
            return jaxent.cross_entropy(**arrays, **fixed, axis=axis - 1)

        return jax.vmap(one)(arrays)

    actual = evaluate(batched, call)
    assert_same(actual, evaluate(jaxent.cross_entropy, call), ULPS)


SPLIT = [((4, 6), 1), ((6,), 0), ((3, 4, 2), 1), ((2, 3, 8), 2)]  # classes in two halves


def over_halves_of_the_classes(function):
    """The function over a mapped axis, each half with its own part of what has a class axis."""

    def split(*positional, **keywords):
        names = (
            ("hidden", "kernel", "targets") if "class_axis" in keywords else ("logits", "targets")
        )
        values = dict(zip(names, positional)) | keywords
        axis = -1 if "hidden" in values else values["axis"]
        places = {"logits": axis, "kernel": values.get("class_axis"), "weight": 0, "bias": 0}
        if jnp.issubdtype(values["targets"].dtype, jnp.floating):
            places["targets"] = axis
        if (mask := values.get("class_mask")) is not None:
            places["class_mask"] = axis if mask.ndim > 1 else 0
        places = {k: axis % np.ndim(values[k]) for k, axis in places.items() if k in values}
        fixed = {k: v for k, v in values.items() if k not in places}

        def half(part):
            arguments = fixed | part
            first = [arguments.pop(name) for name in names]
            return function(*first, **arguments, class_axis_name="halves")

        halves = {k: values[k] for k in places}
        for k, axis in places.items():
            shape = halves[k].shape
            halves[k] = halves[k].reshape(*shape[:axis], 2, -1, *shape[axis + 1 :])
        return jax.vmap(half, (places,), None, axis_name="halves")(halves)

    return split


@law
@given(calls(EVERY_OPTION, SPLIT))
def test_law_11_split_classes_equal_the_whole(call):
    actual = evaluate(over_halves_of_the_classes(jaxent.cross_entropy), call)
    assert_same(actual, evaluate(jaxent.cross_entropy, call), ULPS)


@examples(6)
@given(calls(NLL_OPTIONS, SPLIT))
def test_law_11_split_log_probabilities_equal_the_whole(call):
    actual = evaluate(over_halves_of_the_classes(jaxent.nll), call)
    assert_same(actual, evaluate(jaxent.nll, call), ULPS)


@law
@given(head_calls(EVERY_OPTION, [call for call in SPLIT if call[1] == len(call[0]) - 1]))
def test_law_11_head_of_split_classes_equals_the_whole(call):
    actual = evaluate(over_halves_of_the_classes(jaxent.linear_cross_entropy), call)
    assert_same(actual, evaluate(jaxent.linear_cross_entropy, call), 2 * ULPS)


@pytest.mark.parametrize(
    "name",
    [
        "log_softmax",
        "nll",
        "cross_entropy",
        "linear_cross_entropy",
        "total_weight",
        "token_stats",
        "linear_token_stats",
    ],
)
def test_reference_has_the_same_signature(name):
    import inspect

    actual = inspect.signature(getattr(jaxent, name)).parameters.values()
    twin = inspect.signature(getattr(reference, name)).parameters.values()
    assert [(p.name, p.default, p.kind) for p in actual] == [
        (p.name, p.default, p.kind) for p in twin
    ]
