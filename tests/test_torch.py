"""PyTorch parity: values and gradients of its functions, then each difference.

The functions are F.cross_entropy, F.nll_loss and F.linear_cross_entropy. Where the two differ by
design, a test shows both sides.
"""

import functools
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import examples
from hypothesis import given

import jaxent

torch = pytest.importorskip("torch")
F = torch.nn.functional

REDUCTIONS = ("mean", "sum", "none")
OURS = {"cross_entropy": jaxent.cross_entropy, "nll_loss": jaxent.nll}
SHAPES = [(4, 5), (6,), (3, 4, 2), (2, 3, 2, 2), (1, 2)]  # (C,) or (N, C, d1..dK)

# Every example under a new shape, dtype or option compiles once: few of them a case.
few = examples(3)
examples = given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 2**32 - 1),
)


def ours(name, floats, others, cotangent, ignore_index):
    """Loss and gradients with respect to `floats`, by reduction; all arguments go by name."""
    with jax.enable_x64(cotangent.dtype == np.float64):
        return jax.device_get(_ours(name, floats, others, cotangent, ignore_index))


@functools.partial(jax.jit, static_argnames=("name", "ignore_index"))
def _ours(name, floats, others, cotangent, ignore_index):
    results = {}
    for reduction in REDUCTIONS:

        def loss(floats, reduction=reduction):
            options = {**floats, **others}
            logits, targets = options.pop("input"), options.pop("target")
            options |= {"ignore_index": ignore_index, "reduction": reduction, "axis": 1}
            return OURS[name](logits, targets, **options)

        value, pull = jax.vjp(loss, floats)
        (gradients,) = pull(cotangent if reduction == "none" else jnp.ones_like(value))
        results[reduction] = value, gradients
    return results


def theirs(name, floats, others, cotangent, ignore_index, reduction):
    floats = {k: torch.tensor(v, requires_grad=True) for k, v in floats.items()}
    options = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in others.items()}
    if "label_smoothing" in options:
        options["label_smoothing"] = float(options["label_smoothing"])
    loss = getattr(F, name)(**floats, **options, ignore_index=ignore_index, reduction=reduction)
    loss.backward(torch.tensor(cotangent) if reduction == "none" else None)
    return loss.detach().numpy(), {k: v.grad.numpy() for k, v in floats.items()}


def check_parity(name, floats, others, cotangent, ignore_index=-100):
    """All three reductions, values and gradients, equal to rounding."""
    logits = floats["input"]
    results = ours(name, floats, others, cotangent, ignore_index)
    assert results.keys() == set(REDUCTIONS)
    # Each number is a sum of at most 24 terms, each up to the largest logit times a weight
    # below 2, in another order on either side. Over 4800 calls the two were never more than
    # 2 units of rounding apart, of the number and the largest logit together; 16 leaves room.
    tolerance = 16 * np.finfo(logits.dtype).eps
    scale = max(1.0, np.abs(logits).max())
    for reduction, (loss, gradients) in results.items():
        expected_loss, expected = theirs(name, floats, others, cotangent, ignore_index, reduction)
        assert np.all(np.isfinite(expected_loss))
        assert np.any(expected_loss != 0)
        assert gradients.keys() == expected.keys()
        gradients, expected = {"loss": loss, **gradients}, {"loss": expected_loss, **expected}
        for key, value in gradients.items():
            assert value.dtype == expected[key].dtype == logits.dtype
            np.testing.assert_allclose(
                value,
                expected[key],
                rtol=tolerance,
                atol=tolerance * scale,
                err_msg=f"{reduction}: {key}",
                strict=True,
            )


def draw(shape, dtype, seed):
    """Logits, class weights (one of them 0), a cotangent, and the generator."""
    random = np.random.default_rng(seed)
    num_classes, rows = (shape[0], ()) if len(shape) == 1 else (shape[1], (shape[0], *shape[2:]))
    logits = 3 * random.normal(size=shape).astype(dtype)
    weight = random.uniform(0.2, 2, num_classes).astype(dtype)
    weight[0] = 0
    cotangent = np.asarray(random.normal(size=rows), dtype)
    return logits, weight, cotangent, random


def draw_indices(random, rows, num_classes, ignored):
    """Return class indices.

    The first is counted and of positive weight; of several, the last is ignored, and some between.
    """
    targets = np.asarray(random.integers(0, num_classes, rows))
    targets = np.where(random.uniform(size=rows) < 0.2, ignored, targets)
    if targets.size > 1:
        targets[(-1,) * targets.ndim] = ignored
    targets[(0,) * targets.ndim] = num_classes - 1
    return targets


IGNORED = pytest.mark.parametrize("ignored", [-100, -1, 0])  # 0 is a class
WEIGHTED = pytest.mark.parametrize("weighted", [False, True])
SMOOTHED = pytest.mark.parametrize("smoothed", [False, True])


def smoothings(smoothed, dtype):
    """The options to try: none, or traced ones, which share a compilation."""
    values = (0.1, 1.0, 0.0) if smoothed else ()
    return [{"label_smoothing": np.dtype(dtype).type(v)} for v in values] or [{}]


@SMOOTHED
@IGNORED
@WEIGHTED
@few
@examples
def test_cross_entropy_of_indices_is_pytorchs(weighted, ignored, smoothed, shape, dtype, seed):
    logits, weight, cotangent, random = draw(shape, dtype, seed)
    targets = draw_indices(random, cotangent.shape, len(weight), ignored)
    for others in smoothings(smoothed, dtype):
        others |= {"target": targets} | ({"weight": weight} if weighted else {})
        check_parity("cross_entropy", {"input": logits}, others, cotangent, ignored)


@SMOOTHED
@WEIGHTED
@few
@examples
def test_cross_entropy_of_probabilities_is_pytorchs(weighted, smoothed, shape, dtype, seed):
    logits, weight, cotangent, random = draw(shape, dtype, seed)
    # Taken as given by both: some are negative, and they need not add up to 1.
    probabilities = random.uniform(-0.2, 1, shape).astype(dtype)
    floats = {"input": logits, "target": probabilities} | ({"weight": weight} if weighted else {})
    for others in smoothings(smoothed, dtype):
        check_parity("cross_entropy", floats, others, cotangent)


@IGNORED
@WEIGHTED
@few
@examples
def test_nll_is_pytorchs(weighted, ignored, shape, dtype, seed):
    logits, weight, cotangent, random = draw(shape, dtype, seed)
    axis = 0 if len(shape) == 1 else 1
    log_probs = logits - np.log(np.exp(logits).sum(axis, keepdims=True))
    targets = draw_indices(random, cotangent.shape, len(weight), ignored)
    others = {"target": targets} | ({"weight": weight} if weighted else {})
    check_parity("nll_loss", {"input": log_probs}, others, cotangent, ignored)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_as_a_python_number_is_pytorchs(smoothing):
    logits, weight, _, _ = draw((4, 5), "float32", 0)
    targets = np.array([4, 1, -100, 0])
    loss = jax.jit(functools.partial(jaxent.cross_entropy, label_smoothing=smoothing))
    expected = F.cross_entropy(
        *map(torch.tensor, (logits, targets, weight)), label_smoothing=smoothing
    )
    np.testing.assert_allclose(loss(logits, targets, weight=weight), expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_weight_gradient_which_pytorch_has_for_probabilities_only_is_that_of_one_hot(smoothing):
    logits, weight, _, _ = draw((4, 5), "float32", 1)
    targets = np.array([4, 1, 4, 0])

    def loss(weight):
        return jaxent.cross_entropy(
            logits, targets, weight=weight, reduction="sum", label_smoothing=smoothing
        )

    weight_, one_hot = torch.tensor(weight, requires_grad=True), torch.eye(5)[targets]
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
        F.cross_entropy(torch.tensor(logits), torch.tensor(targets), weight=weight_)
    F.cross_entropy(
        torch.tensor(logits), one_hot, weight_, reduction="sum", label_smoothing=smoothing
    ).backward()
    assert np.any(weight_.grad.numpy() != 0)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(weight), weight_.grad, rtol=1e-5, atol=1e-5)


def test_probability_targets_with_an_ignore_index_of_a_class_are_refused_by_both():
    logits = np.zeros((2, 3), np.float32)
    with pytest.raises(RuntimeError, match="ignore_index is not supported"):
        F.cross_entropy(torch.tensor(logits), torch.tensor(logits), ignore_index=0)
    with pytest.raises(ValueError, match="ignore_index=0"):
        jaxent.cross_entropy(logits, logits, ignore_index=0)


# The linear head

linear = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="PyTorch before 2.13 has no linear_cross_entropy"
)
seeds = given(seed=st.integers(0, 2**32 - 1))  # a case compiles once


@functools.partial(jax.jit, static_argnames=("ignore_index", "chunk_size"))
def ours_linear(floats, others, cotangent, ignore_index, chunk_size=None):
    """As `ours`, of a head with PyTorch's names."""
    results = {}
    for reduction in REDUCTIONS:

        def loss(floats, reduction=reduction):
            return jaxent.linear_cross_entropy(
                floats["input"],
                floats["linear_weight"],
                others["target"],
                bias=floats.get("linear_bias"),
                class_axis=0,
                weight=others.get("weight"),
                label_smoothing=others.get("label_smoothing", 0.0),
                ignore_index=ignore_index,
                reduction=reduction,
                chunk_size=chunk_size,
            )

        value, pull = jax.vjp(loss, floats)
        (gradients,) = pull(cotangent if reduction == "none" else jnp.ones_like(value))
        results[reduction] = value, gradients
    return results


def theirs_linear(floats, others, cotangent, ignore_index, reduction, options=None):
    others = others | {"options": options}
    return theirs("linear_cross_entropy", floats, others, cotangent, ignore_index, reduction)


def check_head_parity(results, floats, others, cotangent, ignore_index=None, options=(None,)):
    """All three reductions, values and gradients, equal to rounding, however PyTorch chunks."""
    # As in check_parity, with matmuls. Over 14000 calls the two were never more than 6 units of
    # rounding apart, of the number and the largest argument or logit together.
    tolerance = 16 * np.finfo("float32").eps
    hidden, kernel = floats["input"], floats["linear_weight"]
    logits = np.tensordot(hidden, kernel, (-1, -1))
    scale = max(1.0, *(np.abs(x).max() for x in (hidden, kernel, logits)))
    for (reduction, (loss, gradients)), option in itertools.product(results.items(), options):
        expected_loss, expected = theirs_linear(
            floats, others, cotangent, ignore_index, reduction, option
        )
        assert np.all(np.isfinite(expected_loss))
        assert np.any(expected_loss != 0)
        assert gradients.keys() == expected.keys()
        for key, value in {"loss": loss, **gradients}.items():
            np.testing.assert_allclose(
                value,
                expected_loss if key == "loss" else expected[key],
                rtol=tolerance,
                atol=tolerance * scale,
                err_msg=f"{reduction}: {key}, {option}",
                strict=True,
            )


def draw_head(shape, seed, biased):
    """Hidden states, kernel and bias; class weights, a cotangent, and the generator."""
    *rows, num_classes, width = [size for size in shape if size is not None]
    _, weight, cotangent, random = draw((*rows[:1], num_classes, *rows[1:]), "float32", seed)
    floats = {
        "input": random.normal(size=(*rows, width)).astype("float32"),
        "linear_weight": 2 * random.normal(size=(num_classes, width)).astype("float32"),
    }
    if biased:
        floats["linear_bias"] = random.normal(size=num_classes).astype("float32")
    return floats, weight, cotangent, random


@linear
@pytest.mark.parametrize(
    ("shape", "biased", "weighted", "ignored"),  # N, C, D; one example without N
    [
        ((4, 5, 3), False, False, -100),
        ((6, 3, 4), True, True, -1),
        ((None, 6, 2), True, False, 0),
        ((1, 2, 3), False, True, -100),
    ],
)
@few
@seeds
def test_linear_cross_entropy_of_indices_is_pytorchs_however_it_chunks(
    shape, biased, weighted, ignored, seed
):
    floats, weight, cotangent, random = draw_head(shape, seed, biased)
    targets = draw_indices(random, cotangent.shape, len(weight), ignored)
    others = {"target": targets} | ({"weight": weight} if weighted else {})
    chunks = torch.nn.LinearCrossEntropyOptions
    options = [
        None,
        chunks(),
        *(
            chunks(batch_chunk_size=2, chunking_method=None, acc_policy=policy)
            for policy in ("accurate", "balanced", "compact")
        ),
    ]
    results = jax.device_get(ours_linear(floats, others, cotangent, ignored, chunk_size=2))
    check_head_parity(results, floats, others, cotangent, ignored, options)


@linear
@pytest.mark.parametrize(
    ("shape", "biased", "weighted"), [((4, 5, 3), False, True), ((None, 6, 2), True, False)]
)
@few
@seeds
def test_linear_cross_entropy_with_label_smoothing_is_pytorchs(shape, biased, weighted, seed):
    floats, weight, cotangent, random = draw_head(shape, seed, biased)
    targets = draw_indices(random, cotangent.shape, len(weight), -100)
    for others in smoothings(True, "float32"):
        others |= {"target": targets} | ({"weight": weight} if weighted else {})
        results = jax.device_get(ours_linear(floats, others, cotangent, -100))
        check_head_parity(results, floats, others, cotangent)


@linear
@pytest.mark.parametrize(
    ("shape", "biased", "weighted", "smoothed"),
    [
        ((4, 5, 3), True, True, True),
        ((6, 3, 4), False, True, False),
        ((None, 6, 2), True, False, False),
    ],
)
@few
@seeds
def test_linear_cross_entropy_of_probabilities_is_pytorchs(shape, biased, weighted, smoothed, seed):
    floats, weight, cotangent, random = draw_head(shape, seed, biased)
    probabilities = random.uniform(-0.2, 1, (*cotangent.shape, len(weight))).astype("float32")
    for others in smoothings(smoothed, "float32"):
        others |= {"target": probabilities} | ({"weight": weight} if weighted else {})
        results = jax.device_get(ours_linear(floats, others, cotangent, -100, chunk_size=2))
        check_head_parity(results, floats, others, cotangent)


@linear
def test_wide_linear_cross_entropy_whose_gradients_are_made_forward_is_pytorchs():
    floats, weight, cotangent, random = draw_head((6, 5, 1024), 7, biased=True)
    floats["linear_weight"] /= 32
    others = {"target": draw_indices(random, (6,), 5, -100), "weight": weight}
    options = [None, torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4, chunking_method=None)]
    results = jax.device_get(ours_linear(floats, others, cotangent, -100))
    check_head_parity(results, floats, others, cotangent, None, options)


def over_codebooks(loss, num_axes, out_axes=0):
    """Return `loss(kernel, bias, targets)` for each of d1..dK.

    The arrays are (C, d1..dK, D), (C, d1..dK) and (N, d1..dK).
    """
    for _ in range(num_axes):
        loss = jax.vmap(loss, (1, 1, 1), out_axes)
    return loss


@functools.partial(jax.jit, static_argnames="num_axes")
def ours_codebooks(floats, others, cotangent, num_axes):
    """As `ours_linear`, of heads with a kernel (C, d1..dK, D)."""
    results = {}
    targets, weight = others["target"], others.get("weight")
    for reduction in REDUCTIONS:

        def loss(floats, reduction=reduction):
            def one(kernel, bias, targets):
                return jaxent.linear_cross_entropy(
                    floats["input"],
                    kernel,
                    targets,
                    bias=bias,
                    class_axis=0,
                    weight=weight,
                    reduction="none" if reduction == "none" else "sum",
                )

            head = floats["linear_weight"], floats.get("linear_bias")
            if reduction == "none":
                return over_codebooks(one, num_axes, out_axes=1)(*head, targets)
            total = jnp.sum(over_codebooks(one, num_axes)(*head, targets))
            divisor = jaxent.total_weight(targets, weight=weight)
            return total / divisor if reduction == "mean" else total

        value, pull = jax.vjp(loss, floats)
        (gradients,) = pull(cotangent if reduction == "none" else jnp.ones_like(value))
        results[reduction] = value, gradients
    return results


def draw_codebooks(shape, seed, biased):
    *rows, num_classes, axes, width = shape
    floats, weight, _, random = draw_head((*rows, num_classes, width), seed, biased=False)
    floats["linear_weight"] = random.normal(size=(num_classes, *axes, width)).astype("float32")
    if biased:
        floats["linear_bias"] = random.normal(size=(num_classes, *axes)).astype("float32")
    return floats, weight, random.normal(size=(*rows, *axes)).astype("float32"), random


@linear
@pytest.mark.parametrize(
    ("shape", "biased", "weighted"),  # N, C, (d1..dK), D
    [((4, 5, (2,), 3), False, True), ((3, 4, (2, 3), 2), True, False)],
)
@few
@seeds
def test_linear_cross_entropy_under_vmap_is_pytorchs_of_several_codebooks(
    shape, biased, weighted, seed
):
    floats, weight, cotangent, random = draw_codebooks(shape, seed, biased)
    targets = draw_indices(random, cotangent.shape, len(weight), -100)
    others = {"target": targets} | ({"weight": weight} if weighted else {})
    results = jax.device_get(ours_codebooks(floats, others, cotangent, len(shape[2])))
    check_head_parity(results, floats, others, cotangent)


@linear
def test_mean_over_codebooks_of_probabilities_is_the_mean_of_their_means():
    floats, _, cotangent, random = draw_codebooks((4, 5, (2, 3), 3), 8, biased=True)
    probabilities = random.dirichlet(np.ones(5), cotangent.shape).astype("float32")
    targets = np.moveaxis(probabilities, -1, 1).copy()  # (N, C, d1, d2)
    expected, _ = theirs_linear(floats, {"target": targets}, cotangent, None, "mean")

    def one(kernel, bias, targets):
        return jaxent.linear_cross_entropy(
            floats["input"], kernel, targets, bias=bias, class_axis=0
        )

    for _ in range(2):
        one = jax.vmap(one, (1, 1, 2))
    means = jax.jit(one)(floats["linear_weight"], floats["linear_bias"], targets)
    np.testing.assert_allclose(jnp.mean(means), expected, rtol=1e-5)


@linear
def test_mean_of_codebook_means_is_another_number_where_their_counts_differ():
    floats, _, cotangent, _ = draw_codebooks((4, 5, (2,), 3), 9, biased=False)
    targets = np.array([[1, 2], [0, -100], [4, -100], [3, -100]])
    expected, _ = theirs_linear(floats, {"target": targets}, cotangent, None, "mean")
    loss = functools.partial(jaxent.linear_cross_entropy, floats["input"], class_axis=0)
    means = jax.jit(jax.vmap(loss, (1, 1)))(floats["linear_weight"], targets)
    assert abs(jnp.mean(means) - expected) > 1e-2
    counts = np.array([4, 1])
    np.testing.assert_allclose(jnp.sum(means * counts) / 5, expected, rtol=1e-5)


# What differs, by design

NOTHING_COUNTED = {
    "all ignored": (np.full(3, -100), np.ones(5, np.float32)),
    "all of weight 0": (np.array([1, 2, 1]), np.float32([1, 0, 0, 1, 1])),
    "no examples": (np.zeros(0, int), np.ones(5, np.float32)),
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("case", NOTHING_COUNTED)
def test_mean_over_nothing_is_0_where_pytorchs_is_nan(case, name):
    targets, weight = NOTHING_COUNTED[case]
    logits = np.random.default_rng(0).normal(size=(len(targets), 5)).astype(np.float32)
    floats, others = {"input": logits}, {"target": targets, "weight": weight}
    cotangent = np.ones(len(targets), np.float32)
    loss, _ = theirs(name, floats, others, cotangent, -100, "mean")
    assert np.isnan(loss)
    loss, gradients = ours(name, floats, others, cotangent, -100)["mean"]
    assert loss == 0
    np.testing.assert_array_equal(gradients["input"], np.zeros_like(logits), strict=True)


def test_mean_over_no_probabilities_is_0_where_pytorchs_is_nan():
    empty = np.zeros((0, 5), np.float32)
    assert F.cross_entropy(torch.tensor(empty), torch.tensor(empty)).isnan()
    assert jax.jit(jaxent.cross_entropy)(empty, empty) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nan_in_an_ignored_row_stays_out_of_the_gradient_where_pytorch_lets_it_in(smoothing):
    logits, weight, cotangent, _ = draw((4, 5), "float32", 2)
    logits[1] = np.nan
    floats = {"input": logits}
    others = {"target": np.array([4, -100, 1, 2]), "weight": weight}
    others["label_smoothing"] = np.float32(smoothing)
    results = ours("cross_entropy", floats, others, cotangent, -100)
    for reduction, (loss, gradients) in results.items():
        expected, theirs_ = theirs("cross_entropy", floats, others, cotangent, -100, reduction)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)  # finite on both sides
        assert np.all(np.isfinite(expected))
        assert np.all(np.isnan(theirs_["input"][1]))
        np.testing.assert_array_equal(gradients["input"][1], np.zeros(5))
        counted = [0, 2, 3]
        np.testing.assert_allclose(
            gradients["input"][counted], theirs_["input"][counted], rtol=1e-5, atol=1e-6
        )


def test_probability_0_at_a_logit_of_minus_infinity_costs_nothing_where_pytorch_gives_nan():
    logits = np.float32([[0.0, -np.inf, 1.0]])
    targets = np.float32([[0.5, 0.0, 0.5]])
    assert F.cross_entropy(torch.tensor(logits), torch.tensor(targets)).isnan()
    loss, gradient = jax.jit(jax.value_and_grad(jaxent.cross_entropy))(logits, targets)
    p = 1 / (1 + np.e)  # of the first class, the second having none
    np.testing.assert_allclose(loss, -0.5 * np.log(p) - 0.5 * np.log(1 - p), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[p - 0.5, 0.0, 0.5 - p]], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", OURS)
def test_loss_of_half_precision_is_float32_where_pytorchs_is_rounded_to_half(name, dtype):
    random = np.random.default_rng(3)
    logits = jnp.asarray(np.log(random.dirichlet(np.ones(5), 30)), dtype)
    targets = random.integers(0, 5, 30)
    single = torch.tensor(np.asarray(logits, np.float32))
    half = single.to(getattr(torch, dtype)).requires_grad_()
    theirs_ = getattr(F, name)(half, torch.tensor(targets))
    assert theirs_.dtype == half.dtype
    loss, gradient = jax.jit(jax.value_and_grad(OURS[name]))(logits, targets)
    assert loss.dtype == jnp.float32
    assert gradient.dtype == logits.dtype
    expected = getattr(F, name)(single, torch.tensor(targets)).item()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert abs(theirs_.item() - expected) > 1e-4
    theirs_.backward()
    # Each gradient is rounded to half precision: once here, a few times there.
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        gradient.astype("float32"), half.grad.float(), rtol=4 * eps, atol=eps
    )


@pytest.mark.parametrize(("name", "bad"), list(itertools.product(OURS, [5, 100, -1, -99])))
def test_target_out_of_range_is_nan_in_its_row_where_pytorch_raises(name, bad):
    logits, _, cotangent, _ = draw((4, 5), "float32", 4)
    targets = np.array([3, bad, 0, -100])
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        getattr(F, name)(torch.tensor(logits), torch.tensor(targets))
    results = ours(name, {"input": logits}, {"target": targets}, cotangent, -100)
    assert np.isnan(results["mean"][0])
    assert np.isnan(results["sum"][0])
    loss, gradients = results["none"]
    good = np.array([True, False, True, True])
    expected, theirs_ = theirs(
        name, {"input": logits[good]}, {"target": targets[good]}, cotangent[good], -100, "none"
    )
    assert np.isnan(loss[1])
    assert np.all(np.isnan(gradients["input"][1]))
    np.testing.assert_allclose(loss[good], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradients["input"][good], theirs_["input"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32"])
def test_indices_of_any_integer_dtype_are_taken_where_pytorch_wants_int64(dtype):
    logits, _, _, _ = draw((4, 5), "float32", 5)
    targets = np.array([3, 1, -100, 0], dtype)
    with pytest.raises(RuntimeError, match="expected target dtype to be Long"):
        F.cross_entropy(torch.tensor(logits), torch.tensor(targets))
    expected = F.cross_entropy(torch.tensor(logits), torch.tensor(targets).long())
    np.testing.assert_allclose(jax.jit(jaxent.cross_entropy)(logits, targets), expected, rtol=1e-5)


def test_weight_of_another_float_dtype_is_taken_where_pytorch_wants_the_logits():
    logits, weight, _, _ = draw((4, 5), "float32", 6)
    targets, half = np.array([3, 1, -100, 2]), weight.astype(np.float16)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        F.cross_entropy(*map(torch.tensor, (logits, targets, half)))
    expected = F.cross_entropy(*map(torch.tensor, (logits, targets, half.astype(np.float32))))
    loss = jax.jit(jaxent.cross_entropy)(logits, targets, weight=half)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@linear
@pytest.mark.parametrize("chunked", [False, True])
def test_linear_mean_over_no_tokens_is_0_where_pytorchs_is_nan(chunked):
    floats, _, cotangent, _ = draw_head((4, 5, 3), 10, biased=True)
    others = {"target": np.full(4, -100)}
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    loss, _ = theirs_linear(floats, others, cotangent, None, "mean", options)
    assert np.isnan(loss)
    loss, gradients = ours_linear(floats, others, cotangent, -100)["mean"]
    assert loss == 0
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, np.zeros_like(floats[name]), strict=True)


@linear
@pytest.mark.parametrize("chunked", [False, True])
def test_nan_hidden_state_of_an_ignored_token_stays_out_where_pytorch_lets_it_in(chunked):
    floats, _, cotangent, _ = draw_head((4, 5, 3), 11, biased=True)
    floats["input"][1] = np.nan
    targets = np.array([4, -100, 1, 2])
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    loss, theirs_ = theirs_linear(floats, {"target": targets}, cotangent, None, "sum", options)
    assert np.isnan(loss) == chunked
    assert np.all(np.isnan(theirs_["linear_weight"]))
    others = {"target": targets}
    results = ours_linear(floats, others, cotangent, -100)
    floats["input"] = np.nan_to_num(floats["input"])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        results,
        ours_linear(floats, others, cotangent, -100),
    )
    assert np.all(results["sum"][1]["input"][1] == 0)


@linear
def test_hidden_states_of_any_leading_shape_are_taken_where_pytorch_wants_one_axis():
    floats, _, _, random = draw_head((6, 5, 3), 12, biased=False)
    hidden, kernel = floats["input"].reshape(2, 3, 3), floats["linear_weight"]
    targets = random.integers(0, 5, (2, 3))
    with pytest.raises(RuntimeError, match="dimensionality 1 or 2, got 3"):
        F.linear_cross_entropy(*map(torch.tensor, (hidden, kernel, targets)))
    expected = F.linear_cross_entropy(
        *map(torch.tensor, (floats["input"], kernel, targets.ravel()))
    )
    loss = jax.jit(functools.partial(jaxent.linear_cross_entropy, class_axis=0))
    loss = loss(hidden, kernel, targets)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@linear
def test_chunks_have_a_functional_gradient_and_a_hessian_where_pytorchs_have_neither():
    floats, _, _, _ = draw_head((4, 5, 3), 13, biased=False)
    hidden, kernel = floats["input"], floats["linear_weight"]
    targets = np.array([4, 0, 1, 2])

    def theirs_of(options):
        head = torch.tensor(kernel), torch.tensor(targets)
        return lambda hidden: F.linear_cross_entropy(hidden, *head, options=options)

    def loss(hidden):
        return jaxent.linear_cross_entropy(hidden, kernel, targets, class_axis=0, chunk_size=2)

    point, second = torch.tensor(hidden), torch.autograd.functional.hessian
    whole = theirs_of(None)
    chunked = theirs_of(
        torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method=None)
    )
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(chunked)(point)
    assert torch.all(second(chunked, point) == 0)  # silently
    gradient, hessian = jax.jit(lambda x: (jax.grad(loss)(x), jax.hessian(loss)(x)))(hidden)
    np.testing.assert_allclose(gradient, torch.func.grad(whole)(point), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(hessian, second(whole, point), rtol=1e-4, atol=1e-6)


@linear
def test_probability_targets_go_with_a_negative_ignore_index_where_pytorch_wants_none():
    floats, _, cotangent, random = draw_head((4, 5, 3), 14, biased=False)
    others = {"target": random.dirichlet(np.ones(5), 4).astype("float32")}
    with pytest.raises(RuntimeError, match="ignore_index cannot be specified"):
        theirs_linear(floats, others, cotangent, -100, "mean")
    loss = functools.partial(
        jaxent.linear_cross_entropy, floats["input"], floats["linear_weight"], class_axis=0
    )
    with pytest.raises(ValueError, match="ignore_index=0"):
        loss(others["target"], ignore_index=0)
    expected, _ = theirs_linear(floats, others, cotangent, None, "mean")
    np.testing.assert_allclose(jax.jit(loss)(others["target"]), expected, rtol=1e-5)
