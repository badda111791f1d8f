"""Generated calls of the losses, how to evaluate them, and how to compare what comes out."""

import contextlib
import dataclasses
import os
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings

# CI draws fewer examples of each law for the second of its two JAX versions.
EXAMPLES = float(os.environ.get("JAXENT_EXAMPLES", "1"))


def examples(count):
    """Settings of a property: this many examples, of any duration."""
    return settings(max_examples=max(3, round(EXAMPLES * count)), deadline=None)


# (shape of the logits, class axis)
SHAPES = [
    ((5,), 0),
    ((4, 5), 1),
    ((7, 3), 0),
    ((3, 5, 2), 1),
    ((2, 3, 6), 2),
    ((3, 4, 2, 2), 1),
    ((0, 4), 1),
    ((6, 1), 1),
]
DTYPES = ["float32", "bfloat16", "float16", "float64"]
INDEX_DTYPES = ["int8", "uint8", "int16", "int32", "int64"]


@dataclasses.dataclass
class Call:
    """Arguments of a loss: float arrays, differentiated, and the others."""

    axis: int
    floats: dict[str, Any]  # logits, and those of targets, weight, ... that are floats
    others: dict[str, Any]
    cotangent: np.ndarray  # of the per-example shape

    @property
    def shape(self):
        return self.floats["logits"].shape

    @property
    def dtype(self):
        return self.floats["logits"].dtype

    @property
    def targets(self):
        return self.floats.get("targets", self.others.get("targets"))

    def get(self, name, default=None):
        return self.floats.get(name, self.others.get(name, default))

    def replace(self, **changes):
        """The call with some arguments changed; None leaves one out."""
        floats, others = dict(self.floats), dict(self.others)
        for name, value in changes.items():
            floats.pop(name, None)
            others.pop(name, None)
            if value is not None:
                is_float = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)
                (floats if is_float else others)[name] = value
        return dataclasses.replace(self, floats=floats, others=others)


@st.composite
def calls(draw, options=(), shapes=None, dtypes=DTYPES, targets=("indices", "probabilities")):
    """A call of `cross_entropy` with finite logits; `options` names the keywords to draw."""
    shape, axis = draw(st.sampled_from(shapes or SHAPES))
    dtype = jnp.dtype(draw(st.sampled_from(dtypes)))
    kind = draw(st.sampled_from(targets))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_classes = shape[axis]
    rows = shape[:axis] + shape[axis + 1 :]
    floats = {"logits": (3 * random.normal(size=shape)).astype(dtype)}
    others: dict[str, Any] = {"axis": axis}
    if kind == "probabilities":
        probabilities = random.dirichlet(np.ones(num_classes), rows)
        probabilities *= random.uniform(size=probabilities.shape) < 0.8  # some are 0
        floats["targets"] = np.moveaxis(probabilities, -1, axis).astype(dtype)
    else:
        index_dtype = draw(st.sampled_from(INDEX_DTYPES))
        others["targets"] = random.integers(0, num_classes, rows).astype(index_dtype)

    def drawn(name, *values):
        if name in options:
            return draw(st.sampled_from(values))
        return None

    if drawn("weight", False, True):
        weight = random.uniform(0.2, 2, num_classes).astype(_wide(dtype))
        weight[0] = draw(st.sampled_from([0, 1]))
        floats["weight"] = weight
    if kind == "indices" and "ignore_index" in options:
        ignored = drawn("ignore_index", -100, None, 0, -1)
        others["ignore_index"] = ignored
        if ignored is not None and others["targets"].dtype != np.uint8:
            hit = random.uniform(size=rows) < 0.3
            others["targets"] = np.where(hit, ignored, others["targets"]).astype(index_dtype)
    sample = drawn("sample_weight", None, "mask", "weights", "broadcast")
    if sample == "mask":
        others["sample_weight"] = random.uniform(size=rows) < 0.7
    elif sample is not None:
        sample_shape = rows if sample == "weights" else tuple(1 for _ in rows)
        sample_weight = random.uniform(0.2, 2, sample_shape)
        zero = random.uniform(size=sample_shape) < 0.3
        floats["sample_weight"] = np.where(zero, 0, sample_weight).astype(_wide(dtype))
    if num_classes > 1:
        mask = drawn("class_mask", None, "classes", "full")
        if mask == "classes":
            others["class_mask"] = random.uniform(size=num_classes) < 0.8
        elif mask == "full":
            others["class_mask"] = random.uniform(size=shape) < 0.8
        if mask is not None:
            move_targets_to_existing(others, floats, axis)
    if (smoothing := drawn("label_smoothing", None, 0.1, 1.0, "traced")) is not None:
        value = 0.3 if smoothing == "traced" else smoothing
        kind_of = floats if smoothing == "traced" else others
        kind_of["label_smoothing"] = np.asarray(value, _wide(dtype)) if kind_of is floats else value
    if (z_loss := drawn("z_loss", None, 0.01, "traced")) is not None:
        kind_of = floats if z_loss == "traced" else others
        kind_of["z_loss"] = np.asarray(0.02, _wide(dtype)) if kind_of is floats else z_loss
    if (scale := drawn("logit_scale", None, 0.5, "traced")) is not None:
        kind_of = floats if scale == "traced" else others
        kind_of["logit_scale"] = np.asarray(0.7, _wide(dtype)) if kind_of is floats else scale
    if (softcap := drawn("softcap", None, 4.0)) is not None:
        others["softcap"] = softcap
    if "reduction" in options:
        others["reduction"] = drawn("reduction", "mean", "sum", "none")
    return Call(axis, floats, others, random.normal(size=rows).astype(_wide(dtype)))


EXTREMES = ("uncounted", "excluded", "minus infinity", "out of range", "weight", "scalars of 0")


@st.composite
def extreme_calls(draw, options=(), extremes=EXTREMES, **keywords):
    """A call with what is infinite, NaN or out of range: where it counts, and where it does not."""
    call = draw(calls(options, **keywords))
    extremes = draw(st.sets(st.sampled_from(extremes), min_size=1))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    axis, num_classes = call.axis, call.shape[call.axis]
    logits = np.moveaxis(call.floats["logits"], axis, -1).copy()
    exists, targets = np.ones(logits.shape, bool), np.array(call.targets)
    if (mask := call.get("class_mask")) is not None:
        exists = np.moveaxis(full_mask(mask, call.shape, axis), axis, -1)
    counted = exists.any(-1) & (call.get("sample_weight", np.ones(())) != 0)
    changes = {}
    if "targets" in call.floats:
        mass = np.moveaxis(targets, axis, -1).copy()
    else:
        if "out of range" in extremes:
            outside = num_classes if targets.dtype == "uint8" else random.choice([num_classes, -7])
            targets = np.where(random.uniform(size=targets.shape) < 0.2, outside, targets)
            changes["targets"] = targets.astype(call.targets.dtype)
        if (ignored := call.get("ignore_index", -100)) is not None:
            counted &= targets != ignored
        mass = targets[..., None] == np.arange(num_classes)
    if "minus infinity" in extremes:
        hit = random.uniform(size=logits.shape) < 0.2
        logits[hit & (exists & ~hit).any(-1, keepdims=True)] = -np.inf  # a class stays finite
    if "weight" in extremes and "weight" in call.floats:
        # Smoothing gives each class a share of every example, and with it its weight.
        free = ~mass[counted].any(0)
        bad = draw(st.sampled_from([np.inf, np.nan]))
        weight = np.where(free & (random.uniform(size=num_classes) < 0.7), bad, call.get("weight"))
        changes |= {"weight": weight.astype(call.get("weight").dtype), "label_smoothing": None}
    if "scalars of 0" in extremes:
        scalars = {"label_smoothing", "z_loss"} & call.floats.keys() - changes.keys()
        changes |= {name: np.zeros_like(call.floats[name]) for name in scalars}
    if "NaN" in extremes:
        logits[random.uniform(size=logits.shape) < 0.1] = np.nan
    if "excluded" in extremes:
        logits[~exists] = np.nan
    if "uncounted" in extremes:
        bad = random.choice([np.nan, np.inf, -np.inf, 1e4], logits.shape)
        spoilt = ~counted[..., None] & (random.uniform(size=logits.shape) < 0.7)
        logits = np.where(spoilt, bad, logits).astype(call.dtype)
        if "targets" in call.floats:
            mass[~counted] = random.choice([np.nan, 0.5])
            changes["targets"] = np.moveaxis(mass, -1, axis)
    return call.replace(logits=np.moveaxis(logits, -1, axis), **changes)


@dataclasses.dataclass
class HeadCall(Call):
    """Arguments of a head's loss: hidden and kernel in place of logits."""

    @property
    def shape(self):
        kernel = self.floats["kernel"]
        return (*self.cotangent.shape, kernel.shape[self.others.get("class_axis", -1)])

    @property
    def dtype(self):
        # NumPy's: JAX's knows no float64 here, outside of `precision`.
        return np.result_type(self.floats["hidden"], self.floats["kernel"])


HEAD_SHAPES = [((5,), 0), ((4, 5), 1), ((7, 13), 1), ((2, 3, 6), 2), ((3, 2), 1), ((0, 4), 1)]


@st.composite
def head_calls(draw, options=(), shapes=HEAD_SHAPES, dtypes=DTYPES, **keywords):
    """A call of `linear_cross_entropy`, its chunks of any size."""
    call = draw(calls(options, shapes, dtypes, **keywords))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, num_classes = call.cotangent.shape, call.shape[call.axis]
    width, class_axis = draw(st.sampled_from([1, 3, num_classes])), draw(st.sampled_from([-1, 0]))
    kernel = 2 * random.normal(size=(width, num_classes))
    floats = {
        "hidden": random.normal(size=(*rows, width)).astype(call.dtype),
        "kernel": (kernel if class_axis == -1 else kernel.T).astype(call.dtype),
    }
    if draw(st.booleans()):
        floats["bias"] = random.normal(size=num_classes).astype(_wide(call.dtype))
    others = {
        "class_axis": class_axis,
        "chunk_size": draw(st.sampled_from([None, 1, 2, 3, 5, num_classes])),
    }
    floats |= {k: v for k, v in call.floats.items() if k != "logits"}
    others |= {k: v for k, v in call.others.items() if k != "axis"}
    return HeadCall(call.axis, floats, others, call.cotangent)


EVERY_OPTION = (
    "weight",
    "ignore_index",
    "sample_weight",
    "class_mask",
    "label_smoothing",
    "z_loss",
    "logit_scale",
    "softcap",
    "reduction",
)
NLL_OPTIONS = ("weight", "ignore_index", "sample_weight", "reduction")


def move_targets_to_existing(others, floats, axis):
    """No target mass on an excluded class, where another one is left."""
    logits = floats["logits"]
    exists = np.moveaxis(full_mask(others["class_mask"], logits.shape, axis), axis, -1)
    if "targets" in floats:
        floats["targets"] = floats["targets"] * np.moveaxis(exists, -1, axis).astype(logits.dtype)
        return
    targets = others["targets"]
    valid = (targets >= 0) & (targets < exists.shape[-1])
    index = np.where(valid, targets, 0).astype(int)
    alive = np.take_along_axis(exists, index[..., None], -1)[..., 0]
    moved = np.where(valid & ~alive, exists.argmax(-1), targets)
    others["targets"] = moved.astype(targets.dtype)


def full_mask(class_mask, shape, axis):
    if class_mask.ndim == 1:
        class_mask = class_mask.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return np.broadcast_to(class_mask, shape)


def _wide(dtype):
    return "float64" if dtype == jnp.float64 else "float32"


def precision(call: Call):
    """The context in which float64 and int64 exist, if the call has either."""
    wide = call.dtype == jnp.float64 or call.targets.dtype in ("float64", "int64")
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


def evaluate(function, call: Call, jit: bool = True):
    """The loss of a call, and the gradients of its floats against the call's cotangent."""

    def scalar(floats):
        arguments = {**call.others, **floats}
        first = ("hidden", "kernel") if isinstance(call, HeadCall) else ("logits",)
        positional = [arguments.pop(name) for name in (*first, "targets")]
        loss = function(*positional, **arguments)
        cotangent = call.cotangent if loss.ndim else call.cotangent.dtype.type(1)
        return jnp.sum(loss * cotangent), loss

    with precision(call):
        run = jax.value_and_grad(scalar, has_aux=True)
        (_, loss), gradients = (jax.jit(run) if jit else run)(call.floats)
        return jax.tree.map(np.asarray, (loss, gradients))


def eps(dtype) -> float:
    return float(jnp.finfo(dtype).eps)


def assert_close(actual, expected, ulps, dtype=None, scale=None):
    """Equal to some ulps of the largest expected value (or `scale`); NaN and inf exactly."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    unit = eps(dtype or expected.dtype)
    actual, expected = actual.astype("float64"), expected.astype("float64")
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    if scale is None:
        scale = max(1.0, np.abs(expected[finite]).max(initial=0))
    np.testing.assert_allclose(actual[finite], expected[finite], rtol=0, atol=ulps * unit * scale)


def assert_same(actual, expected, ulps):
    """Losses and gradients of two evaluations, each to its own dtype."""
    (loss, gradients), (expected_loss, expected_gradients) = actual, expected
    assert loss.dtype == expected_loss.dtype
    assert_close(loss, expected_loss, ulps)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == expected_gradients[name].dtype, name
        assert_close(gradient, expected_gradients[name], ulps)


FLOAT_STATS = ("log_prob", "log_normalizer", "entropy")


def assert_same_with_stats(actual, expected, ulps):
    """Losses, statistics (or None) and gradients of two evaluations, each to its own dtype."""
    (loss, stats, gradients), (wanted, wanted_stats, wanted_gradients) = actual, expected
    assert_same((loss, gradients), (wanted, wanted_gradients), ulps)
    assert (stats is None) == (wanted_stats is None)
    for name in () if stats is None else stats._fields:
        found, field = getattr(stats, name), getattr(wanted_stats, name)
        assert found.dtype == field.dtype, name
        if name in FLOAT_STATS:
            assert found.dtype == loss.dtype, name
            assert_close(found, field, ulps)
        else:
            np.testing.assert_array_equal(found, field, name)
