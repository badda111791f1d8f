"""Distillation: divergences from a teacher, of logits and of two heads whose logits nobody holds."""

import dataclasses
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
    SHAPES,
    assert_close,
    assert_same,
    eps,
    examples,
)
from hypothesis import given
from test_call_cost import counting

import jaxent
from jaxent import reference
from jaxent._forms import forced

BETAS = (0.0, 1.0, 0.3, 0.01, "traced")
OPTIONS = ("targets", "sample_weight", "class_mask", "scales", "caps", "temperature", "reduction")
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
        """The loss, and the gradients of the floats against the cotangent."""

        def scalar(floats):
            loss = function(**{**self.others, **floats, **changes})
            return jnp.sum(loss * (self.cotangent if loss.ndim else 1)), loss

        with jax.enable_x64(self.is_wide):
            (_, loss), gradients = jax.jit(jax.value_and_grad(scalar, has_aux=True))(self.floats)
            return jax.tree.map(np.asarray, (loss, gradients))

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


@examples(60)
@given(calls())
def test_law_2_distillation_equals_its_reference(call):
    assert_same(call.run(jaxent.distillation), call.run(reference.distillation), ULPS)


@pytest.mark.parametrize("skip", [False, True])
@examples(30)
@given(head_calls())
def test_law_15_distillation_of_heads_equals_that_of_their_logits(skip, call):
    with forced(skip=skip, block=3):
        actual = call.run(jaxent.linear_distillation)
    assert_same(actual, call.run(reference.linear_distillation), 2 * ULPS)


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


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
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
    gradient = jax.grad(lambda x: jaxent.cross_entropy(x, p, axis=-1))(X)
    assert_close(jax.grad(jaxent.distillation)(X, W), gradient, 16)


# ---- Exactness -------------------------------------------------------------------------------


@st.composite
def hard_calls(draw):
    """Logits of any size, nearly the same or not, at any temperature, in float32."""
    size = draw(st.sampled_from([0.1, 3.0, 100.0, 1e4]))
    difference = draw(st.sampled_from([1e-5, 1e-3, 0.1, 3.0, 100.0]))
    call = draw(calls((), [((3, 17), 1)], ["float32"], size, (0.0, 1.0, 0.5, 0.02, 0.98)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    teacher = call.floats["logits"] + difference * random.normal(size=(3, 17))
    return call.replace(
        teacher_logits=teacher.astype("float32"),
        temperature=draw(st.sampled_from([0.1, 0.7, 1.0, 10.0])),
    )


@examples(80)
@given(hard_calls())
def test_loss_and_gradient_are_exact_to_a_few_roundings_of_their_own_size(call):
    loss, gradients = call.run(jaxent.distillation)
    wanted, wanted_gradients = call.widened().run(jaxent.distillation)
    unit = eps("float32")
    # A logarithm of a probability as small as exp(-a) is known to a roundings of its size, and so
    # is a ratio of two: that is what a derivative of the divergence times such a rounding makes.
    x, w = (
        np.asarray(v, "float64") / call.others["temperature"]
        for v in (call.floats["logits"], call.others["teacher_logits"])
    )
    spread = np.maximum(*(1 + x.max(-1) - x.min(-1) for x in (x, w)))
    assert np.all(np.abs(loss - wanted) <= 16 * unit * np.maximum(wanted, 0) * spread**0.5 + 1e-37)
    size = np.abs(wanted_gradients["logits"]).max(-1, keepdims=True)
    error = np.abs(gradients["logits"] - wanted_gradients["logits"])
    assert np.all(error <= 32 * unit * size * spread[:, None] ** 0.5 + 1e-37)
