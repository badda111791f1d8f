"""Distillation: divergences from a teacher, of logits and of two heads whose logits nobody has."""

import dataclasses
import functools
import inspect
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from calls import (
    DTYPES,
    FLOAT_STATS,
    SHAPES,
    assert_close,
    assert_same_with_stats,
    eps,
    examples,
)
from hypothesis import given
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import jit
from test_call_cost import counting

import jaxent
from jaxent import reference
from jaxent._forms import forced

BETAS = (0.0, 1.0, 0.3, 0.01, "traced")
OPTIONS = (
    "targets",
    "sample_weight",
    "class_mask",
    "scales",
    "caps",
    "temperature",
    "reduction",
    "return_stats",
)
ULPS = 64


@dataclasses.dataclass
class Call:
    """Arguments of a divergence: float arrays, differentiated, and the others."""

    floats: dict[str, Any]
    others: dict[str, Any]
    cotangent: np.ndarray

    def replace(self, **changes):
        floats, others = dict(self.floats), dict(self.others)
        for name, value in changes.items():
            (floats if name in floats else others)[name] = value
        return dataclasses.replace(self, floats=floats, others=others)

    def run(self, function, **changes):
        """The loss, any statistics, and the gradients of the floats against the cotangent."""

        def scalar(floats):
            found = function(**{**self.others, **floats, **changes})
            loss, stats = found if self.others.get("return_stats") else (found, None)
            total = jnp.sum(loss * (self.cotangent if loss.ndim else 1))
            for factor, name in () if stats is None else enumerate(FLOAT_STATS, 2):
                total += jnp.sum(getattr(stats, name) * self.cotangent / factor)
            return total, (loss, stats)

        with jax.enable_x64(self.is_wide):
            (_, found), gradients = jit(jax.value_and_grad(scalar, has_aux=True))(self.floats)
            return jax.tree.map(np.asarray, (*found, gradients))

    @property
    def is_wide(self):
        values = jax.tree.leaves((self.floats, self.others))
        return any(getattr(x, "dtype", None) == "float64" for x in values)

    def widened(self):
        """The call in float64."""

        def wide(x):
            is_float = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
            return np.asarray(x, "float64") if is_float else x

        return dataclasses.replace(
            self,
            floats={k: wide(v) for k, v in self.floats.items()},
            others={k: wide(v) for k, v in self.others.items()},
            cotangent=self.cotangent.astype("float64"),
        )


@st.composite
def calls(draw, options=OPTIONS, shapes=SHAPES, dtypes=DTYPES, size=3.0, betas=BETAS):
    """A call of `distillation`; `size` is that of its logits."""
    shape, axis = draw(st.sampled_from(shapes))
    dtype = jnp.dtype(draw(st.sampled_from(dtypes)))
    wide = "float64" if dtype == "float64" else "float32"
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, num_classes = shape[:axis] + shape[axis + 1 :], shape[axis]
    floats = {"logits": (size * random.normal(size=shape)).astype(dtype)}
    others: dict[str, Any] = {"axis": axis}
    others["teacher_logits"] = (size * random.normal(size=shape)).astype(dtype)

    def drawn(name, *values):
        return draw(st.sampled_from(values)) if name in options else values[0]

    def scalar(name, value, traced):
        if traced:
            floats[name] = np.asarray(value, wide)
        elif value is not None:
            others[name] = value

    beta = draw(st.sampled_from(betas))
    scalar("beta", 0.4 if beta == "traced" else beta, beta == "traced")
    temperature = drawn("temperature", None, 0.5, 4.0, "traced")
    scalar("temperature", 1.7 if temperature == "traced" else temperature, temperature == "traced")
    scale = drawn("scales", None, 0.7, "traced")
    scalar("logit_scale", 0.7 if scale == "traced" else scale, scale == "traced")
    if scale is not None:
        others["teacher_logit_scale"] = 1.2
    if drawn("caps", False, True):
        others |= {"softcap": 4.0, "teacher_softcap": 5.0}
    if drawn("targets", False, True):
        targets = np.where(random.uniform(size=rows) < 0.4, -100, 9 * num_classes)
        others["targets"] = targets.astype("int32")
    weights = drawn("sample_weight", None, "mask", "weights", "broadcast")
    if weights == "mask":
        others["sample_weight"] = random.uniform(size=rows) < 0.7
    elif weights is not None:
        of = rows if weights == "weights" else tuple(1 for _ in rows)
        values = random.uniform(0.2, 2, of) * (random.uniform(size=of) < 0.7)
        floats["sample_weight"] = values.astype(wide)
    mask = drawn("class_mask", None, "classes", "full")
    if mask is not None:
        others["class_mask"] = random.uniform(size=shape if mask == "full" else num_classes) < 0.7
    others["reduction"] = drawn("reduction", "none", "mean", "sum")
    others["return_stats"] = drawn("return_stats", False, True)
    return Call(floats, others, random.normal(size=rows).astype(wide))


HEAD_SHAPES = [((5,), 0), ((4, 5), 1), ((7, 13), 1), ((2, 3, 6), 2), ((0, 4), 1)]


@st.composite
def head_calls(draw, options=OPTIONS, shapes=HEAD_SHAPES, dtypes=DTYPES, **keywords):
    """A call of `linear_distillation`, its chunks of any size."""
    call = draw(calls(options, shapes, dtypes, **keywords))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits, floats, others = call.floats["logits"], dict(call.floats), dict(call.others)
    for name in ("logits", "teacher_logits", "axis"):
        floats.pop(name, None)
        others.pop(name, None)
    for who, into in (("", floats), ("teacher_", others)):
        width, class_axis = draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([-1, 0]))
        kernel = 2 * random.normal(size=(width, logits.shape[-1]))
        hidden = random.normal(size=(*logits.shape[:-1], width))
        into[f"{who}hidden"] = hidden.astype(logits.dtype)
        into[f"{who}kernel"] = (kernel if class_axis else kernel.T).astype(logits.dtype)
        others[f"{who}class_axis"] = class_axis
        if draw(st.booleans()):
            into[f"{who}bias"] = random.normal(size=logits.shape[-1]).astype(call.cotangent.dtype)
    others["chunk_size"] = draw(st.sampled_from([None, 1, 2, 3, 5, 13]))
    return dataclasses.replace(call, floats=floats, others=others)


# ---- Law 2 and law 15: the formula -----------------------------------------------------------


@examples(5)
@given(calls())
def test_law_2_distillation_equals_its_reference(call):
    assert_same_with_stats(call.run(jaxent.distillation), call.run(reference.distillation), ULPS)


@examples(4)
@given(st.booleans(), head_calls())
def test_law_15_distillation_of_heads_equals_that_of_their_logits(skip, call):
    with forced(skip=skip, block=3):
        actual = call.run(jaxent.linear_distillation)
    assert_same_with_stats(actual, call.run(reference.linear_distillation), 2 * ULPS)


@pytest.mark.parametrize("name", ["distillation", "linear_distillation"])
def test_reference_has_the_same_signature(name):
    of = [inspect.signature(getattr(m, name)).parameters for m in (jaxent, reference)]
    assert [(p.name, p.default) for p in of[0].values()] == [
        (p.name, p.default) for p in of[1].values()
    ]


# ---- Peers, by value -------------------------------------------------------------------------

X, W = (np.random.default_rng(i).normal(size=(6, 9)).astype("float32") for i in range(2))


def log_softmax(x, temperature=1.0):
    return jax.nn.log_softmax(x / temperature, -1)


def published_jsd(student, teacher, beta, temperature):
    """`generalized_jsd_loss` of TRL's GKDTrainer, and Liger's, with the beta of the former."""
    student, teacher = log_softmax(student, temperature), log_softmax(teacher, temperature)

    def kl_div(log_input, log_target):  # torch.nn.functional.kl_div(log_target=True)
        return jnp.exp(log_target) * (log_target - log_input)

    if beta == 0:
        return kl_div(student, teacher).sum(-1)
    if beta == 1:
        return kl_div(teacher, student).sum(-1)
    mixture = jax.nn.logsumexp(
        jnp.stack([student + jnp.log1p(-beta), teacher + jnp.log(beta)]), axis=0
    )
    return (beta * kl_div(mixture, teacher) + (1 - beta) * kl_div(mixture, student)).sum(-1)


@pytest.mark.parametrize(
    ("beta", "temperature"), [(0.0, 1.0), (1.0, 2.5), (0.1, 1.0), (0.5, 2.5), (0.9, 1.0)]
)
def test_it_is_the_published_divergence(beta, temperature):
    found = jaxent.distillation(X, W, beta=beta, temperature=temperature, reduction="none")
    assert_close(found, published_jsd(X, W, beta, temperature), 16)


def test_beta_0_is_the_kl_divergence_of_optax():
    wanted = optax.losses.kl_divergence(log_softmax(X), jnp.exp(log_softmax(W)))
    assert_close(jaxent.distillation(X, W, reduction="none"), wanted, 16)


def test_beta_0_is_the_cross_entropy_of_the_teacher_less_its_entropy():
    p = jax.nn.softmax(W)
    wanted = jaxent.cross_entropy(X, p, axis=-1) - jaxent.cross_entropy(W, p, axis=-1)
    assert_close(jaxent.distillation(X, W), wanted, 16)


def test_the_statistics_are_those_of_targets_that_are_the_teachers_probabilities():
    for temperature in (1.0, 2.5):
        loss, stats = jaxent.distillation(X, W, temperature=temperature, return_stats=True)
        p = jax.nn.softmax(W / temperature)
        wanted = jaxent.token_stats(X / temperature, p, axis=-1)
        jax.tree.map(lambda a, b: assert_close(a, b, 16, "float32"), stats, wanted)
        teacher = jaxent.token_stats(W / temperature, p, axis=-1)
        assert_close(loss, jnp.mean(teacher.log_prob - stats.log_prob), 16)
        assert_close(loss, jaxent.distillation(X, W, temperature=temperature), 0)


# ---- Exactness -------------------------------------------------------------------------------


def in_float64(x, w, beta, temperature):
    """Divergence and gradient by hand, and the roundings that float32 makes of each.

    No step is a difference of numbers nearly equal. A distance c from the largest logit, in units
    of T, is rounded to |c| eps, and exp(c) with it: those are the roundings of a class's term,
    beside a few that any has. An error of a normalizer is the same for all classes: a gradient has
    none of it, and a divergence its square.
    """

    def distances(v):
        c = (v - v.max(-1, keepdims=True)) / temperature
        rest = np.where(np.arange(v.shape[-1]) == v.argmax(-1)[:, None], 0, np.exp(c))
        return c, np.log1p(rest.sum(-1, keepdims=True))

    (c_q, log_q), (c_p, log_p) = distances(x), distances(w)
    p, q = np.exp(c_p - log_p), np.exp(c_q - log_q)
    shifts = x.max(-1, keepdims=True) - w.max(-1, keepdims=True)
    t = (x - w - shifts) / temperature - (log_q - log_p)  # log q / p

    def gap(p, q, t):  # p (exp(t) - 1 - t), of t = log q / p
        near = np.abs(t) < 1
        return np.where(near, p * (np.expm1(np.where(near, t, 0)) - t), q - p - p * t)

    def change(t, share):  # log(1 + share (exp(t) - 1))
        near = np.abs(t) < 1
        far = np.logaddexp(np.log1p(-share), np.log(share) + t)
        return np.where(near, np.log1p(share * np.expm1(np.where(near, t, 0))), far)

    if beta == 0:
        terms, slopes = gap(p, q, t), np.where(t < 1, p * np.expm1(np.minimum(t, 1)), q - p)
    elif beta == 1:
        terms, slopes = gap(q, p, -t), q * t
    else:
        m, a, b = beta * p + (1 - beta) * q, change(t, 1 - beta), change(-t, beta)
        terms, slopes = beta * gap(p, m, a) + (1 - beta) * gap(q, m, b), -(1 - beta) * q * b
    gradient = slopes - q * slopes.sum(-1, keepdims=True)  # of beta 0, but for roundings, slopes
    roundings = 16 + 2 * np.minimum(np.maximum(-c_p, -c_q), 104)  # exp(-104) is 0
    of_loss, of_gradient = (np.sum(roundings * np.abs(v), -1) for v in (terms, slopes))
    of_gradient = of_gradient[:, None] / temperature
    return terms.sum(-1), gradient / temperature, of_loss, of_gradient


@examples(30)
@given(
    st.sampled_from([0.0, 1.0, 0.5, 0.02, 0.98]),
    st.sampled_from([0.1, 3.0, 100.0, 1e4]),
    st.sampled_from([1e-5, 1e-3, 0.1, 3.0, 100.0]),
    st.sampled_from([0.1, 0.7, 3.0, 10.0]),
    st.integers(0, 2**32 - 1),
)
def test_loss_and_gradient_are_exact_to_a_few_roundings(beta, size, difference, temperature, seed):
    random = np.random.default_rng(seed)
    x = (size * random.normal(size=(16, 17))).astype("float32")
    w = (x + difference * random.normal(size=x.shape)).astype("float32")
    keywords = {"beta": beta, "temperature": temperature, "reduction": "none"}
    loss, pull = jax.vjp(lambda x: jaxent.distillation(x, w, **keywords), x)
    (gradient,) = pull(jnp.ones_like(loss))
    wide = np.float64(np.float32(temperature))
    wanted, wanted_gradient, of_loss, of_gradient = in_float64(*map(np.float64, (x, w)), beta, wide)
    unit = eps("float32")
    assert np.all(np.abs(loss - wanted) <= unit * of_loss + (8 * unit) ** 2)
    assert np.all(np.abs(gradient - wanted_gradient) <= unit * of_gradient + 1e-36)  # float32 ends


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_law_13_a_nearly_certain_class_keeps_its_digits_whatever_product_its_logit_is_of(beta):
    """A product that XLA adds to in one rounding is not the same number in every loop."""
    random = np.random.default_rng(10)
    x, w = ((random.normal(size=(8, 5)) + np.eye(5)[1] * c).astype("float32") for c in (21, 23))
    h, unit = np.float32(0.7), eps("float32")

    def dense(x):
        return jaxent.distillation(x, w, beta=beta, logit_scale=h, teacher_logit_scale=h)

    def heads(k, tk):
        hidden = np.full((1, 1), h)
        return jaxent.linear_distillation(hidden, k, hidden, tk, beta=beta, chunk_size=2)

    loss, gradient = jax.jit(jax.value_and_grad(dense))(x)
    of_head = jax.jit(jax.value_and_grad(heads))(x[:1], w[:1])
    exact = [np.float64(h) * np.float64(v) for v in (x, w)]
    wanted, wanted_gradient, of_loss, of_gradient = in_float64(*exact, beta, 1.0)
    for n, found in ((8, (loss, gradient)), (1, of_head)):
        assert abs(found[0] - wanted[:n].mean()) <= unit * of_loss[:n].mean()
        error = np.abs(found[1] - h * wanted_gradient[:n] / n)
        assert np.all(error <= unit * of_gradient[:n] / n)


def test_law_13_statistics_of_a_nearly_certain_row_keep_their_digits():
    random = np.random.default_rng(10)
    x, w = ((random.normal(size=(8, 5)) + np.eye(5)[1] * c).astype("float32") for c in (21, 23))
    eye = np.eye(5, dtype="float32")
    with jax.enable_x64(True):
        _, wanted = reference.distillation(*map(np.float64, (x, w)), return_stats=True)
    _, dense = jit(functools.partial(jaxent.distillation, return_stats=True))(x, w)
    heads = functools.partial(jaxent.linear_distillation, return_stats=True, chunk_size=2)
    _, of_heads = jit(heads)(x, eye, w, eye)
    for found in (dense, of_heads):
        for name in ("log_prob", "entropy"):  # exp of a distance of 22 is rounded 22 times
            np.testing.assert_allclose(
                getattr(found, name), getattr(wanted, name), rtol=32 * eps("float32")
            )


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.4])
def test_of_the_same_heads_divergence_and_gradient_are_0(beta):
    kernel = np.random.default_rng(2).normal(size=(9, 50)).astype("float32")

    @jax.jit
    def run(x, w, k, tk):
        def loss(x, k):
            dense = jaxent.distillation(x, w, beta=beta)
            return dense + jaxent.linear_distillation(x, k, w, tk, beta=beta, chunk_size=20)

        return jax.value_and_grad(loss, (0, 1))(x, k)

    for x in (X, 1e4 * X):
        found = run(x, x, kernel, kernel)
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), found)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.4])
def test_the_hessian_at_the_teacher_is_that_of_a_square(beta):
    """Every divergence is q-weighted least squares there, times 1, or beta (1 - beta)."""
    x, p = X[0], jax.nn.softmax(X[0])
    hessian = jit(jax.hessian(lambda x: jaxent.distillation(x, X[0], beta=beta)))(x)
    factor = beta * (1 - beta) if 0 < beta < 1 else 1
    assert_close(hessian, factor * (jnp.diag(p) - jnp.outer(p, p)), 16)


def test_a_class_that_one_of_them_excludes():
    @functools.partial(jit, static_argnums=2)
    def run(x, w, beta):
        return jax.value_and_grad(lambda x: jaxent.distillation(x, w, beta=beta))(x)

    third, second = np.float32([[0.0, 0.0, -np.inf]]), np.float32([[0.0, -np.inf, 0.0]])
    for beta, x, w, wanted in (
        (0.0, second, third, np.inf),
        (1.0, second, third, np.inf),
        (0.5, second, third, np.log(2) / 2),
        # Where p is 0, q may be anything: no 0 * log 0.
        (0.0, np.zeros_like(third), third, np.log(3 / 2)),
        (1.0, second, np.zeros_like(second), np.log(3 / 2)),
        (0.0, third, third, 0),
    ):
        loss, gradient = run(x, w, beta)
        np.testing.assert_allclose(loss, wanted, rtol=1e-6)
        assert np.all(np.isfinite(gradient)) or np.isinf(wanted)


@pytest.mark.parametrize(("name", "beta"), [("sample_weight", 1.0), ("targets", 0.3)])
def test_law_8_what_is_excluded_or_does_not_count_acts_as_deleted(name, beta):
    kept, exists = np.arange(6) % 4 != 1, np.arange(9) % 3 != 2
    outside = ~(kept[:, None] & exists)
    random = np.random.default_rng(6)
    x, w = (
        np.where(outside, random.choice([np.nan, np.inf, -np.inf], v.shape), v).astype("float32")
        for v in (X, W)
    )
    weights = {"targets": np.where(kept, 3, -100), "sample_weight": kept.astype("float32")}
    keywords = {name: weights[name], "class_mask": exists}

    def twice(x, w, **keywords):
        """The loss, and the gradients of first and second order."""

        def loss(x):
            return jaxent.distillation(x, w, beta=beta, temperature=0.8, **keywords)

        squared = jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))
        return loss(x), jax.grad(loss)(x), squared(x)

    part = np.ix_(kept, exists)
    loss, *gradients = jit(lambda x: twice(x, w, **keywords))(x)
    wanted, *wanted_gradients = jit(twice)(X[part], W[part])
    assert_close(loss, wanted, 32)
    for found, gradient in zip(gradients, wanted_gradients):
        assert_close(np.asarray(found)[part], gradient, 32)
        np.testing.assert_array_equal(np.asarray(found)[outside], 0)


def test_law_8_an_uncounted_token_reaches_nothing_of_the_heads():
    h, th = X.copy(), W.copy()
    k, tk = (np.random.default_rng(i).normal(size=(9, 12)).astype("float32") for i in (3, 4))
    h[1], th[2] = np.nan, np.inf
    kept = np.array([True, False, False, True, True, False])

    def loss(h, k, s, th):
        return jaxent.linear_distillation(h, k, th, tk, sample_weight=s, chunk_size=5)

    run = jax.value_and_grad(loss, (0, 1, 2))
    wanted = jit(run)(h[kept], k, np.ones(3, "float32"), th[kept])
    _, stats = jaxent.linear_distillation(
        h, k, th, tk, sample_weight=kept, chunk_size=5, return_stats=True
    )
    np.testing.assert_array_equal(stats.counted, kept)
    for name in (*FLOAT_STATS, "correct"):
        assert np.all(np.isfinite(getattr(stats, name)))
        np.testing.assert_array_equal(getattr(stats, name)[~kept], 0)
    np.testing.assert_array_equal(stats.prediction[~kept], -1)
    # The derivative by a weight of 0 is that of the loss of its token.
    each = jaxent.linear_distillation(h, k, th, tk, reduction="none", chunk_size=5)
    with forced(skip=True, block=2):
        found = jit(lambda *a: run(*a))(h, k, kept.astype("float32"), th)
    assert_close(found[0], wanted[0], 16)
    assert_close(found[1][0][kept], wanted[1][0], 16)
    np.testing.assert_array_equal(found[1][0][~kept], 0)
    assert_close(found[1][1], wanted[1][1], 16)
    assert_close(found[1][2][5], (each[5] - found[0]) / 3, 32)


# ---- Second order ----------------------------------------------------------------------------


def with_stats(loss, stats, total=jnp.sum):
    """The loss and a function of the statistics that are floats, which has all derivatives."""
    return loss + total(sum(jnp.sin(getattr(stats, name)) for name in FLOAT_STATS))


@pytest.mark.parametrize(
    ("name", "beta"),
    [("distillation", b) for b in (0.0, 1.0, 0.3)] + [("linear_distillation", 0.3)],
)
def test_second_order_equals_the_reference(name, beta):
    random = np.random.default_rng(5)
    s = np.float32([1, 0, 2, 0.5, 0, 1])
    t, scale = np.float32(1.7), np.float32(0.8)
    keywords = {"class_mask": np.arange(9) != 4, "softcap": 3.0}
    arrays = [X, s, t, scale] + ([np.float32(beta)] if 0 < beta < 1 else [])
    if name == "linear_distillation":
        kernel, bias = random.normal(size=(9, 9)), random.normal(size=9)
        arrays += [kernel.astype("float32"), bias.astype("float32")]
    teacher = random.normal(size=(9, 5)).astype("float32")

    def loss(module, arrays):
        x, s, t, scale, *rest = arrays
        options = keywords | {"sample_weight": s, "temperature": t, "logit_scale": scale}
        options["beta"] = rest.pop(0) if 0 < beta < 1 else beta
        options["return_stats"] = True
        if name == "distillation":
            return with_stats(*module.distillation(x, W, **options))
        return with_stats(
            *module.linear_distillation(
                x,
                rest[0],
                W[:, :5],
                teacher,
                bias=rest[1],
                teacher_class_axis=0,
                chunk_size=4,
                **options,
            )
        )

    direction = [np.asarray(random.normal(size=np.shape(x)), "float32") for x in arrays]

    def along(module):
        gradient = jax.grad(lambda arrays: loss(module, arrays))
        if name == "distillation":
            return jax.jvp(gradient, (arrays,), (direction,))[1]

        def product(arrays):
            return sum(jnp.vdot(g, d) for g, d in zip(gradient(arrays), direction))

        return jax.grad(product)(arrays)

    found, wanted = (jit(along, static_argnums=0)(m) for m in (jaxent, reference))
    jax.tree.map(lambda a, b: assert_close(a, b, 256), found, wanted)


# ---- Transformations, shards, cost -----------------------------------------------------------


def test_law_12_vmap_of_one_example_equals_the_batch():
    k, tk = (np.random.default_rng(i).normal(size=(9, 12)).astype("float32") for i in (3, 4))

    def batch(x, w, th, k):
        keywords = {"beta": 0.3, "reduction": "none"}
        dense = jaxent.distillation(x, w, **keywords)
        return dense + jaxent.linear_distillation(x, k, th, tk, chunk_size=5, **keywords)

    def with_gradients(f, x, k, *teacher):
        return jax.value_and_grad(lambda x, k: f(x, *teacher, k).sum(), (0, 1))(x, k)

    mapped = jax.vmap(batch, (0, 0, None, None))
    found = jit(functools.partial(with_gradients, mapped))(X, k, W, W[0])
    wanted = jit(functools.partial(with_gradients, batch))(X, k, W, np.stack([W[0]] * 6))
    jax.tree.map(lambda a, b: assert_close(a, b, 64), found, wanted)


def split_calls():
    """Functions of arrays, axis names and a module, the arrays, and which axes split each."""
    random = np.random.default_rng(7)

    def drawn(*shape):
        return random.normal(size=shape).astype("float32")

    s = random.uniform(0.5, 2, 8).astype("float32")
    s[3] = 0
    mask = np.arange(12) != 7
    shared = {"s": s, "m": mask, "t": np.float32(1.3), "b": np.float32(0.4)}
    specs = {"s": ("data",), "m": ("model",), "t": (), "b": ()}

    def options(a, beta):
        beta = a["b"] if beta is None else beta
        return {"sample_weight": a["s"], "class_mask": a["m"], "temperature": a["t"], "beta": beta}

    def dense(a, names, beta):
        found = jaxent.distillation(a["x"], a["w"], return_stats=True, **options(a, beta), **names)
        return with_stats(*found, total_over(names))

    def head(a, names, beta):
        names = {"width_axis_name": "data", **names} if names else {}
        found = jaxent.linear_distillation(
            a["h"], a["k"], a["th"], a["tk"], bias=a["bias"], teacher_class_axis=0, **names,
            return_stats=True, **options(a, beta),
        )  # fmt: skip
        return with_stats(*found, total_over(names))

    def total_over(names):
        if not names:
            return jnp.sum
        return lambda values: jax.lax.psum(jnp.sum(values), names["axis_name"])

    logits = {"x": drawn(8, 12), "w": drawn(8, 12)}
    heads = {
        "h": drawn(8, 4),
        "k": drawn(4, 12),
        "th": drawn(8, 6),
        "tk": drawn(12, 6),
        "bias": drawn(12),
    }
    specs |= {"x": ("data", "model"), "w": ("data", "model"), "bias": ("model",)}
    specs |= {"h": ("data",), "th": ("data",), "k": ("data", "model"), "tk": ("model", "data")}
    return {"dense": (dense, logits | shared), "head": (head, heads | shared)}, specs


@pytest.mark.parametrize(
    ("name", "beta", "wheres"),
    [
        ("dense", 1.0, ["outside"]),
        ("dense", None, ["inside"]),
        ("head", None, ["inside", "explicit mesh"]),
    ],
)
def test_law_11_over_shards_it_is_that_of_the_whole(name, beta, wheres):
    """With gradients taken inside and outside of the mapped function, and on an explicit mesh."""
    cases, specs = split_calls()
    function, arrays = cases[name]
    floats = [k for k in arrays if k not in ("m", "w", "th", "tk")]
    names = {"axis_name": "data", "class_axis_name": "model"}
    spec = {k: P(*specs[k]) for k in arrays}

    def with_gradients(f):
        def run(arrays):
            rest = {k: v for k, v in arrays.items() if k not in floats}
            return jax.value_and_grad(lambda x: f(rest | x))({k: arrays[k] for k in floats})

        return run

    def split(a):
        return function(a, names, beta)

    def whole(a):
        return function(a, {}, beta)

    wanted = jit(with_gradients(whole))(arrays)
    for where in wheres:
        kind = AxisType.Explicit if where == "explicit mesh" else AxisType.Auto
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
        mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec,))
        if where == "explicit mesh":
            with jax.set_mesh(mesh):
                shardings = {k: NamedSharding(mesh, spec[k]) for k in arrays}
                found = jit(with_gradients(whole))(jax.device_put(arrays, shardings))
        elif where == "outside":
            found = jit(with_gradients(mapped(split, out_specs=P())))(arrays)
        else:
            out_specs = P(), {k: spec[k] for k in floats}
            found = jit(mapped(with_gradients(split), out_specs=out_specs))(arrays)
        jax.tree.map(lambda a, b: assert_close(a, b, 64), *map(jax.device_get, (found, wanted)))


@pytest.mark.parametrize("name", ["dense", "head"])
def test_law_11_second_order_over_shards_is_that_of_the_whole(name):
    cases, specs = split_calls()
    function, arrays = cases[name]
    names = {"axis_name": "data", "class_axis_name": "model"}
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = {k: P(*specs[k]) for k in arrays}
    split = jax.shard_map(
        lambda a: function(a, names, None), mesh=mesh, in_specs=(spec,), out_specs=P()
    )
    by = ["x"] if name == "dense" else ["h", "k"]

    def second(function):
        def slope(floats):
            gradient = jax.grad(lambda floats: function(arrays | floats))(floats)
            return sum(jnp.sum(jnp.sin(g)) for g in gradient.values())

        return jit(jax.grad(slope))({k: arrays[k] for k in by})

    found, wanted = second(split), second(lambda a: function(a, {}, None))
    jax.tree.map(lambda a, b: assert_close(a, b, 256), *map(jax.device_get, (found, wanted)))


@pytest.mark.parametrize("name", ["distillation", "linear_distillation"])
def test_gradients_of_statistics_alone_on_an_explicit_mesh_set_or_not(name):
    mesh = jax.make_mesh((3,), ("data",), axis_types=(AxisType.Explicit,))
    kernel = np.random.default_rng(3).normal(size=(9, 12)).astype("float32")

    def entropy(x, w):
        heads = (x, w) if name == "distillation" else (x, kernel, w, kernel)
        return getattr(jaxent, name)(*heads, return_stats=True)[1].entropy.sum()

    expected = jit(jax.grad(entropy))(X, W)
    split = jax.device_put((X, W), NamedSharding(mesh, P("data")))
    found = [jit(jax.grad(entropy))(*split)]
    with jax.set_mesh(mesh):
        found.append(jit(jax.grad(entropy))(*split))
    for gradient in found:
        assert_close(jax.device_get(gradient), expected, 16)


@pytest.mark.parametrize("mapped", ["teacher", "beta"])
def test_vmap_over_what_only_some_statistics_depend_on_has_all_gradients(mapped):
    k, tk = (np.random.default_rng(i).normal(size=(9, 12)).astype("float32") for i in (3, 4))
    teachers, betas = np.stack([W, -W, W[::-1]]), np.float32([0.2, 0.5, 0.9])

    def of_one(x, k, i):
        w, beta = (teachers[i], 0.5) if mapped == "teacher" else (W, betas[i])
        return loss(x, k, w, beta)

    def loss(x, k, w, beta):
        dense = jaxent.distillation(x, w, beta=beta, return_stats=True)
        heads = jaxent.linear_distillation(x, k, w, tk, beta=beta, return_stats=True)
        return with_stats(*dense) + with_stats(*heads)

    def of_all(x, k):
        if mapped == "teacher":
            return jnp.sum(jax.vmap(lambda w: loss(x, k, w, 0.5))(teachers))
        return jnp.sum(jax.vmap(lambda beta: loss(x, k, W, beta))(betas))

    found, wanted = (
        jit(jax.value_and_grad(function, (0, 1)))(X, k)
        for function in (of_all, lambda x, k: sum(of_one(x, k, i) for i in range(3)))
    )
    jax.tree.map(lambda a, b: assert_close(a, b, 64), found, wanted)


H, K = X[:, :5], np.random.default_rng(8).normal(size=(5, 40)).astype("float32")
T = np.random.default_rng(9).normal(size=(9, 40)).astype("float32")


@pytest.mark.parametrize(("beta", "transform"), [(0.0, lambda f: f), (0.25, jax.grad)])
def test_law_14_a_second_eager_call_traces_and_compiles_nothing(beta, transform):
    def calls(beta, temperature, sample_weight):
        keywords = {"beta": beta, "temperature": temperature, "sample_weight": sample_weight}
        dense = transform(lambda x: jaxent.distillation(x, W, **keywords))
        head = transform(lambda h: jaxent.linear_distillation(h, K, W, T, **keywords))
        jax.block_until_ready((dense(X), head(H)))

    for _ in range(2):
        calls(beta, 2.0, np.ones(6))
    with counting():
        calls(beta if beta == 0 else 0.75, 3.0, np.zeros(6))


def test_law_14_a_program_has_no_effects():
    for f in (jax.grad, jax.hessian):
        loss = lambda h: jaxent.linear_distillation(h, K, W, T, beta=0.5)  # noqa: E731
        jaxpr = jax.make_jaxpr(f(loss))(H)
        assert not jaxpr.effects
        assert "callback" not in str(jaxpr)


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def scratch(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("return_stats", [False, True])
def test_memory_is_that_of_linear_cross_entropy(return_stats):
    h, k, y = shape(2048, 256), shape(256, 65536), shape(2048, dtype="int32")
    th, tk = shape(2048, 512), shape(512, 65536)

    def loss(h, k, th, tk):
        found = jaxent.linear_distillation(h, k, th, tk, beta=0.5, return_stats=return_stats)
        return with_stats(*found) if return_stats else found

    def cross_entropy(h, k, y):
        return jaxent.linear_cross_entropy(h, k, y, ignore_index=None)

    with forced(made_forward=False):
        limit = 1.5 * scratch(jax.value_and_grad(cross_entropy, (0, 1)), h, k, y)
    assert scratch(jax.value_and_grad(loss, (0, 1)), h, k, th, tk) <= limit

    def second(h, k, th, tk):
        return jax.jvp(lambda h, k: jax.grad(loss, (0, 1))(h, k, th, tk), (h, k), (h, k))[1]

    # A kernel's gradient is 67 MB.
    assert scratch(second, h, k, th, tk) <= (42e6 if return_stats else 36e6)


@pytest.mark.parametrize("return_stats", [False, True])
def test_the_first_order_goes_over_the_heads_once_for_each_sum_and_gradient(return_stats):
    """Eight products: of each head for its normalizer, the terms and the gradients; and those."""
    loss = lambda h, k: jaxent.linear_distillation(h, k, W, T, return_stats=return_stats)  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1), has_aux=return_stats))(H, K)
    assert str(jaxpr).count("dot_general[") == 8


# ---- Errors ----------------------------------------------------------------------------------

WRONG = {
    "beta": ({"beta": 1.5}, ValueError, r"beta must be in \[0, 1\], got 1.5"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
    "negative": ({"temperature": -1}, ValueError, "temperature must be positive, got -1"),
    "targets": ({"targets": np.zeros(5, int)}, ValueError, r"targets are .*must be \[6\]"),
    "soft": ({"targets": np.ones((6, 9))}, TypeError, "only say which examples are ignored"),
    "softcap": ({"teacher_softcap": 0}, ValueError, "teacher_softcap must be a positive"),
    "scale": ({"teacher_logit_scale": X}, ValueError, "teacher_logit_scale must be a scalar"),
    "stats": ({"return_stats": 1}, TypeError, "return_stats must be True or False, got "),
    "reduction": ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case):
    keywords, error, message = WRONG[case]
    for call in (
        lambda: jaxent.distillation(X, W, **keywords),
        lambda: reference.distillation(X, W, **keywords),
        lambda: jaxent.linear_distillation(X, np.eye(9), W, np.eye(9), **keywords),
    ):
        with pytest.raises(error, match=message):
            call()


def test_heads_that_do_not_fit_are_named():
    eye = np.eye(9, dtype="float32")
    for arguments, message in (
        ((X, eye, W[:4], eye), "must have the same tokens"),
        ((X, eye, W, eye[:, :5]), "must have the same classes"),
        ((X, eye, W[:, :5], eye), r"teacher_hidden is .*the teacher_kernel must be \[5, C\]"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxent.linear_distillation(*arguments)
    with pytest.raises(ValueError, match=r"logits are .*teacher_logits .*the same shape"):
        jaxent.distillation(X, W[:, :5])
    with pytest.raises(ValueError, match=r"teacher_bias is .*it must be"):
        jaxent.linear_distillation(X, eye, W, eye, teacher_bias=np.zeros(3))
    with pytest.raises(TypeError, match=r"jaxent.reference.distillation"):
        jax.jvp(lambda x: jaxent.distillation(x, W), (X,), (X,))


def test_a_traced_number_out_of_range_is_nan():
    for keywords in ({"beta": 0.0}, {"beta": 1.0}, {"beta": -0.1}, {"temperature": 0.0}):
        traced = {k: jnp.float32(v) for k, v in keywords.items()}
        assert np.isnan(jaxent.distillation(X, W, **traced))
    assert np.isnan(jaxent.linear_distillation(X, T, W, T, **traced))


@pytest.mark.parametrize("name", ["distillation", "linear_distillation"])
@pytest.mark.parametrize("keywords", [{"temperature": -1.0}, {"temperature": 0.0}, {"beta": 2.0}])
def test_a_number_out_of_range_leaves_an_uncounted_row_0(name, keywords):
    heads = (X, W) if name == "distillation" else (X, T, W, T)
    traced = {k: jnp.float32(v) for k, v in keywords.items()}
    counted = np.arange(6) % 2 == 0
    loss, stats = jit(
        functools.partial(getattr(jaxent, name), return_stats=True, reduction="none")
    )(*heads, sample_weight=counted.astype("float32"), **traced)
    assert np.all(np.isnan(loss[counted]))
    for value in (loss, stats.log_prob, stats.log_normalizer, stats.entropy):
        np.testing.assert_array_equal(value[~counted], 0)


CAPPED = {"softcap": 30.0, "teacher_softcap": 30.0}


def test_a_cap_costs_a_nearly_certain_row_none_of_its_digits():
    logits = 3 * np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    logits[:, 0] = np.linspace(36, 46, 64)
    teacher = logits + np.array([1, 0, 0], "float32")

    def gradient(module, dtype):
        def total(z):
            return module.distillation(z, teacher.astype(dtype), reduction="sum", **CAPPED)

        return np.asarray(jax.jit(jax.grad(total))(logits.astype(dtype)))

    actual = gradient(jaxent, "float32")
    with jax.enable_x64(True):
        expected = gradient(reference, "float64")
    # A logit near 30 is rounded by 2e-6, and so is the logarithm of a ratio.
    scale = np.abs(expected).max(-1, keepdims=True)
    assert np.all(np.abs(actual - expected) <= 1e-4 * scale)


def test_a_scale_leaves_distributions_that_sum_to_1():
    logits, teacher = np.array([[1e6 + 3, 0]], "float32"), np.array([[0, 1234567]], "float32")
    scales = {"logit_scale": 0.7, "teacher_logit_scale": 0.7}
    between = jaxent.distillation(logits, teacher, beta=0.5, **scales)
    np.testing.assert_allclose(between, np.log(2), rtol=1e-6)
    head = [np.full((1, 1), 1e3, "float32"), logits / 1e3, np.full((1, 1), 1e3), teacher / 1e3]
    between = jaxent.linear_distillation(*head, beta=0.5, **scales)
    np.testing.assert_allclose(between, np.log(2), rtol=1e-6)
