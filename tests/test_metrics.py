"""`jaxent.metrics`: sums that no order and no split changes, and what is read from them."""

import functools
import math
import sys

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from calls import calls, examples, precision
from flax import nnx
from hypothesis import given
from jax.sharding import PartitionSpec as P
from sharded import MESHES, laid_out, make_mesh

import jaxent
from jaxent._exact_sums import read, total_of
from jaxent.metrics import Calibration, Metric, TokenSums, fit_temperature

RANDOM = np.random.default_rng(0)
LOGITS = np.float32(3 * RANDOM.normal(size=(16, 8, 7)))
TARGETS = np.where(RANDOM.uniform(size=(16, 8)) < 0.3, -100, RANDOM.integers(0, 7, (16, 8)))
WEIGHT = np.float32(RANDOM.uniform(0.1, 2, (16, 8)) * (RANDOM.uniform(size=(16, 8)) < 0.8))
BYTES = RANDOM.integers(1, 9, (16, 8))
CONFIDENCE = np.float32(RANDOM.uniform(size=1000) ** 0.3)
CORRECT = RANDOM.uniform(size=1000) < CONFIDENCE**2


def from_logits(logits, targets):
    return TokenSums.from_logits(logits, targets, top_k=3)


def exact(sums):
    """The sums' words, all digits carried through: equal where the numbers are."""
    return np.asarray(read(jax.device_get(sums).words))


def assert_same(a, b):
    np.testing.assert_array_equal(exact(a), exact(b))


# The sums


@st.composite
def terms(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([0, 100]))
    magnitude = np.exp(draw(st.sampled_from([0, 3, 20])) * random.normal(size=size))
    signs = random.choice([-1, 1], size) if draw(st.booleans()) else np.ones(size)
    x = np.clip(signs * magnitude, -1e38, 1e38)
    return x.astype(draw(st.sampled_from(["float32", "float64", "bfloat16"])))


@given(terms())
@examples(40)
def test_a_sum_is_that_of_fsum_to_the_last_bit(x):
    with jax.enable_x64(x.dtype == np.float64):
        words = jax.jit(total_of)(x)
        assert read(np.asarray(words)) == math.fsum(x.astype(np.float64))
        value, size = read(words), np.abs(x.astype(np.float64)).sum()
        assert value.dtype == jnp.result_type(float)
    if np.isfinite(x).all():
        np.testing.assert_allclose(value, math.fsum(x.astype(float)), rtol=5e-7, atol=size * 1e-37)


@pytest.mark.parametrize(
    ("x", "total"),
    [
        ([np.inf, 1], np.inf),
        ([1, -np.inf], -np.inf),
        ([np.inf, -np.inf], np.nan),
        ([np.nan, 1], np.nan),
        ([1e-45, 1e-45], 2 * 1.401298464324817e-45),
        ([3e38, 3e38, -3e38], float(np.float32(3e38))),
        ([-1, 2.0**-40], 2.0**-40 - 1),
    ],
)
def test_the_ends_of_float32_and_what_is_not_finite_are_summed_too(x, total):
    x = np.float32(x)
    words = total_of(x)
    added = words + total_of(x)
    np.testing.assert_array_equal(read(np.asarray(words)), total)
    np.testing.assert_array_equal(read(np.asarray(added)), 2 * total)
    if x[0] != np.float32(1e-45):  # which XLA's float32 flushes to 0
        np.testing.assert_array_equal(read(words), np.float32(total))


def test_the_sum_of_nine_million_terms_does_not_overflow():
    x = np.resize(np.float32([1 - 2.0**-24, -(2.0**-60), 255]), 9_000_000)
    assert read(np.asarray(jax.jit(total_of)(x))) == 3e6 * (256 - 2.0**-24) - 3e6 * 2.0**-60


def test_ten_to_the_nine_tokens_are_counted_and_summed_right():
    sums = one = from_logits(LOGITS, TARGETS)
    for _ in range(30):
        sums = sums + sums
    assert sums.count == 2.0**30 * (TARGETS != -100).sum() > 1e9
    for name in ("loss", "accuracy", "top_k_accuracy", "entropy", "squared_log_normalizer"):
        assert getattr(sums, name) == getattr(one, name)
    np.testing.assert_array_equal(exact(sums), exact(one) * 2.0**30)


@given(st.integers(0, 2**32 - 1))
@examples(6)
def test_no_order_and_no_split_of_the_tokens_changes_a_bit(seed):
    random = np.random.default_rng(seed)
    order = random.permutation(16)
    batches = np.split(order, [random.choice([1, 6])])
    parts = [TokenSums.from_logits(LOGITS[i], TARGETS[i], sample_weight=WEIGHT[i]) for i in batches]
    sums = functools.reduce(TokenSums.__add__, parts, TokenSums.empty())
    whole = jaxent.token_stats(LOGITS, TARGETS)
    # Of the same statistics: those of another batch may be rounded otherwise.
    stats = [jax.tree.map(lambda x, i=i: x[i], whole) for i in batches]
    mine = [TokenSums.from_stats(s, sample_weight=WEIGHT[i]) for s, i in zip(stats, batches)]
    together = TokenSums.from_stats(whole, sample_weight=WEIGHT)
    assert_same(mine[0] + mine[1], together)
    assert_same(mine[1].merge(mine[0]), together)
    np.testing.assert_allclose(exact(sums), exact(together), rtol=1e-6)
    losses = np.where(np.asarray(whole.counted), WEIGHT * -np.asarray(whole.log_prob), 0)
    read_loss, read_weight = exact(together)[:2]
    assert read_loss == math.fsum(losses.astype(float).ravel())
    assert read_weight == math.fsum(np.where(whole.counted, WEIGHT, 0).astype(float).ravel())
    assert together.loss == pytest.approx(read_loss / read_weight, rel=5e-7)


# What is read


OPTIONS = ("ignore_index", "sample_weight", "class_mask", "logit_scale")


@given(calls(OPTIONS, [((4, 5), 1), ((3, 5, 2), 1)], ["float32", "float64"], ("indices",)))
@examples(4)
def test_readings_are_the_plain_formulas(call):
    options = {k: v for k, v in {**call.others, **call.floats}.items() if k != "logits"}
    with precision(call):
        sums = TokenSums.from_logits(
            call.floats["logits"], **options, top_k=2, num_bytes=np.full(call.cotangent.shape, 3)
        )
        sums = jax.device_get(sums)
    x = np.moveaxis(call.floats["logits"].astype(float), call.axis, -1)
    x = x * float(options.get("logit_scale", 1))
    mask = options.get("class_mask")
    if mask is not None:
        full = mask if mask.ndim == 1 else np.moveaxis(mask, call.axis, -1)
        x = np.where(np.broadcast_to(full, x.shape), x, -np.inf)
    y, ignored = call.targets.astype(int), options.get("ignore_index", -100)
    weight = np.broadcast_to(options.get("sample_weight", np.ones(())), y.shape).astype(float)
    counted = (y != ignored) & (weight != 0) & np.isfinite(x).any(-1)
    x, y, weight = x[counted], y[counted], weight[counted]
    assert sums.count == len(y)
    if not len(y):
        assert np.isnan(list(sums.compute().values())).all()
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        lse = np.log(np.exp(x).sum(-1))
        log_p = x - lse[:, None]
        p = np.exp(log_p)
        entropy = -np.where(p > 0, p * log_p, 0).sum(-1).mean()
    loss = -np.sum(weight * log_p[np.arange(len(y)), y]) / weight.sum()
    ranks = np.argsort(np.argsort(-x, -1, kind="stable"), -1)[np.arange(len(y)), y]
    expected = {
        "loss": loss,
        "perplexity": np.exp(loss),
        "bits_per_token": loss / np.log(2),
        "bits_per_byte": loss / np.log(2) / 3,
        "accuracy": np.mean(ranks == 0),
        "top_k_accuracy": np.mean(ranks < 2),
        "entropy": entropy,
        "squared_log_normalizer": np.mean(lse**2),
        "weight": weight.sum(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(sums, name), value, rtol=2e-5, atol=1e-5, err_msg=name)


def test_an_uncounted_token_is_in_no_sum_even_when_nan_and_a_counted_nan_shows():
    bad = np.where((WEIGHT == 0)[..., None] | (TARGETS == -100)[..., None], np.nan, LOGITS)
    options = {"sample_weight": WEIGHT, "num_bytes": BYTES, "top_k": 2}
    assert_same(
        TokenSums.from_logits(bad, TARGETS, **options),
        TokenSums.from_logits(LOGITS, TARGETS, **options),
    )
    seen = Calibration.from_logits(bad, TARGETS, sample_weight=WEIGHT)
    assert_same(seen, Calibration.from_logits(LOGITS, TARGETS, sample_weight=WEIGHT))
    bad = LOGITS.copy()
    bad[np.nonzero(TARGETS != -100)[0][0], np.nonzero(TARGETS != -100)[1][0]] = np.nan
    sums = TokenSums.from_logits(bad, TARGETS, top_k=2)
    assert np.isnan([sums.loss, sums.entropy, sums.accuracy, sums.top_k_accuracy]).all()
    out = TokenSums.from_logits(LOGITS, np.where(TARGETS == 3, 7, TARGETS), top_k=2)
    assert np.isnan([out.loss, out.accuracy, out.top_k_accuracy]).all()
    assert np.isfinite([out.entropy, out.squared_log_normalizer]).all()
    found = Calibration.from_logits(LOGITS, np.where(TARGETS == 3, 7, TARGETS))
    assert np.isnan(found.expected_calibration_error)
    assert np.isnan(Calibration.from_logits(bad, TARGETS).expected_calibration_error)


def test_of_equal_logits_the_first_are_the_top_k():
    sums = TokenSums.from_logits(jnp.zeros((4, 4)), jnp.arange(4), axis=-1, top_k=3)
    assert (sums.top_k_accuracy, sums.accuracy) == (0.75, 0.25)


def test_what_a_batch_came_without_is_nan():
    plain = TokenSums.from_logits(LOGITS, TARGETS)
    full = TokenSums.from_logits(LOGITS, TARGETS, num_bytes=BYTES, top_k=2)
    for sums in (plain, plain + full):
        assert np.isnan([sums.bits_per_byte, sums.top_k_accuracy]).all()
    assert np.isfinite([full.bits_per_byte, (full + TokenSums.empty()).top_k_accuracy]).all()
    expected = full.bits_per_token * (TARGETS != -100).sum() / BYTES[TARGETS != -100].sum()
    np.testing.assert_allclose(full.bits_per_byte, expected, rtol=1e-6)


def test_statistics_of_a_head_give_what_its_logits_give():
    hidden, kernel = LOGITS[..., :5], np.float32(RANDOM.normal(size=(5, 7)))
    sums = TokenSums.from_stats(jaxent.linear_token_stats(hidden, kernel, TARGETS))
    expected = TokenSums.from_logits(jnp.matmul(hidden, kernel, precision="highest"), TARGETS)
    for name, value in sums.compute().items():
        np.testing.assert_allclose(value, expected.compute()[name], rtol=1e-5)


# Where it is used


def test_a_scan_in_shard_map_begins_with_sums_that_vary():
    mesh = make_mesh("auto", data=2)

    def local(logits, targets):
        def step(sums, batch):
            return sums + TokenSums.from_logits(*batch), None

        none = jax.lax.pcast(TokenSums.empty(), "data", to="varying")
        return jax.lax.scan(step, none, (logits, targets))[0].psum("data")

    logits, targets = np.stack([LOGITS] * 4), np.stack([TARGETS] * 4)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P())
    found, expected = jax.jit(mapped)(logits, targets), TokenSums.from_logits(logits, targets)
    np.testing.assert_array_equal(found.words, expected.words)


def test_shards_of_a_mapped_axis_add_up_to_the_whole():
    whole = from_logits(LOGITS, TARGETS)

    def local(x, y):
        return from_logits(x, y).psum("data")

    mesh = make_mesh("auto", data=4, model=2)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P())
    assert_same(jax.jit(mapped)(LOGITS, TARGETS), whole)
    stacks = LOGITS.reshape(8, 2, 8, 7), TARGETS.reshape(8, 2, 8)
    found = jax.pmap(local, axis_name="data")(*stacks)
    assert_same(jax.tree.map(lambda words: words[3], found), whole)
    assert_same(jax.vmap(from_logits)(*stacks).reduce(), whole)

    def calibration(x, y):
        return Calibration.from_logits(x, y).psum("data")

    mapped = jax.shard_map(calibration, mesh=mesh, in_specs=P("data"), out_specs=P())
    assert_same(jax.jit(mapped)(LOGITS, TARGETS), Calibration.from_logits(LOGITS, TARGETS))


@pytest.mark.parametrize("kind", MESHES)
def test_arrays_that_a_mesh_splits_need_no_psum(kind):
    mesh = make_mesh(kind, data=4, model=2)
    with jax.set_mesh(mesh):
        tree = {"x": LOGITS, "y": TARGETS, "w": WEIGHT}
        tree = laid_out(tree, mesh, lambda name, _: P("data"))

        @jax.jit
        def both(x, y, w):
            sums = TokenSums.from_logits(x, y, sample_weight=w, top_k=3)
            return sums + TokenSums.empty(), Calibration.from_logits(x, y)

        found = jax.device_get(both(**tree))
    assert_same(found[0], TokenSums.from_logits(LOGITS, TARGETS, sample_weight=WEIGHT, top_k=3))
    assert_same(found[1], Calibration.from_logits(LOGITS, TARGETS))


def test_a_scan_carries_the_sums_and_a_gradient_leaves_them_alone():
    def step(carry, batch):
        def loss(scale):
            value, stats = jaxent.cross_entropy(
                scale * batch[0], batch[1], axis=-1, return_stats=True
            )
            return value, TokenSums.from_stats(stats)

        (_, sums), slope = jax.value_and_grad(loss, has_aux=True)(1.0)
        return carry + sums, (sums, slope)

    carried, (stacked, _) = jax.jit(functools.partial(jax.lax.scan, step))(
        TokenSums.empty(), (LOGITS, TARGETS)
    )
    assert_same(carried, stacked.reduce())
    np.testing.assert_allclose(carried.loss, from_logits(LOGITS, TARGETS).loss, rtol=1e-6)


def test_it_is_a_metric_of_nnx_in_a_multi_metric():
    metrics = nnx.MultiMetric(
        tokens=Metric(top_k=3, axis=-1),
        calibration=Metric(Calibration, num_bins=5),
        loss=nnx.metrics.Average("loss"),
        accuracy=nnx.metrics.Accuracy(),
    )

    @nnx.jit
    def step(metrics, x, y, mask):
        metrics.update(logits=x, labels=y, loss=jnp.zeros(y.shape), mask=mask)

    empty = metrics.compute()
    assert np.isnan(empty["tokens"]["loss"])
    for x, y in zip(LOGITS, TARGETS):
        step(metrics, x, jnp.maximum(y, 0), y != -100)
    found = metrics.compute()
    assert_same(metrics.tokens.sums, sum_of_rows(top_k=3))
    expected = (LOGITS.argmax(-1) == TARGETS)[TARGETS != -100].mean()
    np.testing.assert_allclose(found["tokens"]["accuracy"], expected, rtol=1e-6)
    calibration = Calibration.from_logits(LOGITS, TARGETS, num_bins=5)
    assert calibration.expected_calibration_error == found["calibration"]
    metrics.reset()
    assert metrics.tokens.sums.count == metrics.calibration.sums.reliability.count.sum() == 0
    of_stats = Metric()
    of_stats.update(stats=jaxent.token_stats(LOGITS, TARGETS))
    assert of_stats.sums.count == (TARGETS != -100).sum()
    assert "top_k_accuracy" in found["tokens"]
    assert "top_k_accuracy" not in of_stats.compute()


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"logits and targets \(or labels\) are needed, or stats", lambda: Metric().update(loss=1)),
        ("statistics have no confidence", lambda: Metric(Calibration).update(stats=STATS)),
        ("top_k is for logits", lambda: Metric(top_k=2).update(stats=STATS)),
        ("did you mean ignore_index", lambda: Metric(ignore_indx=0)),
        ("did you mean top_k", lambda: Metric(topk=2)),
        ("num_bins is not known", lambda: Metric(num_bins=2)),
        ("kind must be TokenSums or Calibration", lambda: Metric("calibration")),
        (
            "did you mean sample_weight",
            lambda: Metric().update(logits=LOGITS, labels=TARGETS, sample_weights=1),
        ),
        ("stats must be a jaxent.TokenStats", lambda: TokenSums.from_stats((1, 2))),
    ],
)
def test_a_misspelt_or_useless_name_is_an_error(message, call):
    with pytest.raises(TypeError, match=message):
        call()


def test_sums_are_shown_and_added_by_python_and_shapes_that_differ_are_not():
    sums = TokenSums.from_logits(jnp.zeros((2, 4)), jnp.array([0, 1]))
    assert repr(sum([sums, sums])) == "TokenSums(loss=1.38629, accuracy=0.5, count=4)"
    assert "num_bins=15" in repr(Calibration.empty())
    stacked = jax.vmap(from_logits)(LOGITS, TARGETS)
    assert repr(stacked) == "TokenSums(words=int32[16, 8, 42])"
    for a, b in ((Calibration.empty(1), Calibration.empty()), (stacked, sums)):
        with pytest.raises(ValueError, match="are not added"):
            a + b
    for unstacked in (sums, Calibration.empty()):
        with pytest.raises(ValueError, match="nothing stacked to reduce"):
            unstacked.reduce()
    found = jax.vmap(Calibration.from_logits)(LOGITS, TARGETS).expected_calibration_error
    one = Calibration.from_logits(LOGITS[3], TARGETS[3]).expected_calibration_error
    np.testing.assert_allclose(found[3], one, rtol=1e-5)


@pytest.mark.parametrize("options", [{"softcap": 1.0}, {"logit_scale": 1e-20}, {"logit_scale": -2}])
def test_the_first_of_one_is_the_prediction(options):
    logits = np.float32([[100, 200], [200, 100], [1e-30, 2e-30]])
    sums = TokenSums.from_logits(logits, [0, 0, 0], axis=-1, top_k=1, **options)
    assert sums.top_k_accuracy == sums.accuracy
    mask = np.array([False, True, True])
    excluded = TokenSums.from_logits([[1.0, 2, 3]], [0], axis=-1, top_k=3, class_mask=mask)
    assert excluded.top_k_accuracy == 0


def test_the_nan_flag_finds_nothing_in_sums_without_nan():
    with jax.debug_nans(True), jax.disable_jit():
        sums = TokenSums.from_logits(LOGITS[0], TARGETS[0])
        assert np.isfinite(float(sums.loss))


def sum_of_rows(**options):
    rows = (TokenSums.from_logits(x, y, **options) for x, y in zip(LOGITS, TARGETS))
    return functools.reduce(TokenSums.__add__, rows)


def test_it_follows_the_protocol_of_clu():
    found = TokenSums.empty()
    for x, y in zip(LOGITS, TARGETS):
        found = found.merge(TokenSums.from_model_output(logits=x, targets=y, learning_rate=0.1))
    assert_same(found, sum_of_rows() + TokenSums.empty())
    assert found.compute()["loss"] == found.loss
    with pytest.raises(TypeError):
        found + Calibration.empty()


# Calibration


def test_calibration_is_the_plain_formula_and_no_split_changes_it():
    sums = Calibration.from_confidence(CONFIDENCE, CORRECT, num_bins=10)
    parts = [
        Calibration.from_confidence(CONFIDENCE[s], CORRECT[s], num_bins=10)
        for s in (slice(300, None), slice(300))
    ]
    assert_same(parts[0] + parts[1], sums)
    sums = jax.device_get(sums)
    bins = np.maximum(np.ceil(CONFIDENCE * np.float32(10)) - 1, 0)
    error = 0.0
    for b, (count, confidence, accuracy) in enumerate(zip(*sums.reliability)):
        here = bins == b
        assert count == here.sum()
        if not count:
            assert np.isnan([confidence, accuracy]).all()
            continue
        assert confidence == math.fsum(CONFIDENCE[here].astype(float)) / count
        assert accuracy == CORRECT[here].mean()
        error += abs(confidence - accuracy) * count / len(CONFIDENCE)
    assert sums.expected_calibration_error == pytest.approx(error, rel=1e-12)
    assert error > 0.05


@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5}, {"softcap": 2.0}])
def test_confidence_is_the_probability_of_the_prediction(options):
    x = LOGITS.astype(float) * options.get("logit_scale", 1)
    x = 2 * np.tanh(x / 2) if "softcap" in options else x
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    sums = Calibration.from_logits(np.moveaxis(LOGITS, -1, 1), TARGETS, **options)
    counted = TARGETS != -100
    count, confidence, _ = jax.device_get(sums).reliability
    assert count.sum() == counted.sum()
    np.testing.assert_allclose(np.nansum(count * confidence), p.max(-1)[counted].sum(), rtol=1e-6)


def test_a_confidence_that_is_no_probability_is_nan():
    for bad in (1.5, -0.1, np.nan):
        sums = Calibration.from_confidence(np.float32([0.5, bad]), np.array([True, True]))
        assert np.isnan(sums.expected_calibration_error)
        counted = Calibration.from_confidence(
            np.float32([0.5, bad]), np.array([True, True]), counted=np.array([True, False])
        )
        assert counted.expected_calibration_error == 0.5


def best_temperature(loss):
    """By golden section in the logarithm, float64."""
    low, high = -5.0, 5.0
    for _ in range(60):
        third = (high - low) / 3
        if loss(np.exp(low + third)) < loss(np.exp(high - third)):
            high -= third
        else:
            low += third
    return np.exp((low + high) / 2)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 20.0])
def test_the_temperature_is_that_of_the_smallest_loss(sharpness):
    labels = np.array([RANDOM.choice(7, p=np.exp(x) / np.exp(x).sum()) for x in LOGITS[:, 0]])
    logits = sharpness * LOGITS[:, 0]

    def plain(temperature):
        x = logits.astype(float) / temperature
        return np.mean(
            np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1))
            + x.max(-1)
            - x[np.arange(16), labels]
        )

    expected, found = best_temperature(plain), float(fitted(logits, labels))
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    assert plain(found) <= plain(expected) + 1e-6


@jax.jit
def fitted(logits, labels):
    return fit_temperature(lambda scale: jaxent.cross_entropy(logits, labels, logit_scale=scale))


def test_another_solver_fits_the_temperature_and_a_nan_shows():
    labels, logits = jnp.array([0, 0, 0, 1]), jnp.array([[8.0, 0.0]] * 4)

    def loss(scale):
        return jaxent.cross_entropy(logits, labels, logit_scale=scale)

    solver = optax.with_extra_args_support(optax.sgd(0.5))
    found = fit_temperature(loss, solver=solver, max_steps=500)
    np.testing.assert_allclose(found, 8 / np.log(3), rtol=1e-4)
    for bad in (jnp.nan, jnp.inf):
        assert np.isnan(fit_temperature(lambda scale, bad=bad: loss(scale) + bad))


@pytest.mark.parametrize("factor", [1e-9, 1.0, 1e6])
def test_the_temperature_is_that_of_any_multiple_of_the_loss(factor):
    logits = jnp.array([[8.0, 0.0]] * 4)

    def loss(scale):
        targets = jnp.array([0, 0, 0, 1])
        return factor * jaxent.cross_entropy(logits, targets, logit_scale=scale)

    np.testing.assert_allclose(fit_temperature(loss), 8 / np.log(3), rtol=1e-4)


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"return_stats": True}])
def test_the_temperature_is_that_of_a_scalar(options):
    def loss(scale):
        return jaxent.cross_entropy(LOGITS, TARGETS, logit_scale=scale, **options)

    with pytest.raises(TypeError, match="loss must return a scalar, got arrays of"):
        fit_temperature(loss)


# Wrong calls


def test_without_optax_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ImportError, match=r"optax.lbfgs: pip install optax, or pass a solver"):
        fit_temperature(lambda scale: scale)


STATS = jaxent.token_stats(LOGITS, TARGETS)
WRONG = {
    "sample_weight is": lambda: TokenSums.from_stats(STATS, sample_weight=WEIGHT[0]),
    "num_bytes is": lambda: TokenSums.from_stats(STATS, num_bytes=BYTES[0]),
    "top_k must be a positive integer, got 0": lambda: TokenSums.from_logits(
        LOGITS, TARGETS, top_k=0
    ),
    "top_k is for class indices": lambda: TokenSums.from_logits(
        LOGITS, jax.nn.softmax(LOGITS), axis=-1, top_k=2
    ),
    "num_bins must be a positive integer, got 0": lambda: Calibration.empty(0),
    "correct is": lambda: Calibration.from_confidence(CONFIDENCE, CORRECT[:5]),
    "more than the 134217728": lambda: jax.eval_shape(
        TokenSums.from_stats, jax.tree.map(lambda x: jax.ShapeDtypeStruct((2**28,), x.dtype), STATS)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


@pytest.mark.parametrize("number", [2.0, "all", True, None])
def test_a_number_of_things_is_an_integer(number):
    with pytest.raises(TypeError, match="num_bins must be a positive integer, got "):
        Calibration.empty(number)
    if number is not None:
        with pytest.raises(TypeError, match="top_k must be a positive integer, got "):
            TokenSums.from_logits(LOGITS, TARGETS, top_k=number)
