"""Law 14: a call of ours costs what any other does.

Programs have no effects, are exported and cached; a second call like the first traces and compiles
nothing.
"""

import contextlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxent
from jaxent import reference

ROOT = pathlib.Path(__file__).parent.parent
X, Y = jax.random.normal(jax.random.key(0), (8, 6)), jnp.arange(8) % 6
H, K = jax.random.normal(jax.random.key(1), (8, 5)), jax.random.normal(jax.random.key(2), (5, 6))
WIDE = jax.random.normal(jax.random.key(3), (8, 1024)), jnp.ones((1024, 6)) / 1024
ONE_HOT = jax.nn.one_hot(Y, 6)
W, MASK, S = jnp.linspace(0.5, 2, 6), jnp.arange(6) < 5, jnp.linspace(0, 1, 8)
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"weight": W, "sample_weight": S},
    "every option": {
        "weight": W,
        "sample_weight": S,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "logit_scale": 0.5,
        "softcap": 5.0,
        "ignore_index": 3,
        "class_mask": MASK,
    },
}

# Scalar functions of one float array, by name.
LOSSES = {
    f"cross_entropy, {name}": (lambda x, kw=kw: jaxent.cross_entropy(x, Y % 5, **kw), X)
    for name, kw in OPTIONS.items()
}
LOSSES |= {
    "cross_entropy of probabilities": (lambda x: jaxent.cross_entropy(x, ONE_HOT), X),
    "nll": (lambda x: jaxent.nll(x, Y), X),
    "log_softmax": (lambda x: jaxent.log_softmax(x)[0, 0], X),
    "token_stats": (lambda x: jaxent.token_stats(x, Y).entropy.sum(), X),
    "linear_cross_entropy": (lambda h: jaxent.linear_cross_entropy(h, K, Y), H),
    "linear_cross_entropy, every option": (
        lambda h: jaxent.linear_cross_entropy(h, K, Y % 5, **OPTIONS["every option"]),
        H,
    ),
    "linear_cross_entropy, wide": (
        lambda h: jaxent.linear_cross_entropy(h, WIDE[1], Y),
        WIDE[0],
    ),
    "linear_token_stats": (lambda h: jaxent.linear_token_stats(h, K, Y).entropy.sum(), H),
    "CrossEntropyLoss": (lambda x: jaxent.CrossEntropyLoss(label_smoothing=0.1)(x, Y), X),
    "CrossEntropyLoss of weights": (lambda x: WEIGHTED(x, Y), X),
    "reference": (lambda x: reference.cross_entropy(x, Y), X),
}
WEIGHTED = jaxent.CrossEntropyLoss(weight=W, label_smoothing=0.1)

COUNTED = {
    "/jax/core/compile/jaxpr_trace_duration": "traced",
    "/jax/core/compile/backend_compile_duration": "compiled",
}
_seen: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: _seen.append(event) if event in COUNTED else None
)


@contextlib.contextmanager
def counting(traced=0, compiled=0):
    """That as many functions are traced and compiled, and no more."""
    _seen.clear()
    yield
    found = [COUNTED[event] for event in _seen]
    assert (found.count("traced"), found.count("compiled")) == (traced, compiled)


def test_counting_counts():
    function = jax.jit(lambda x: jnp.sin(x) + 1)
    with counting(traced=1, compiled=1):
        function(X)


@pytest.mark.parametrize("name", LOSSES)
def test_law_14_a_program_has_no_effects(name):
    function, x = LOSSES[name]
    for f in (function, jax.grad(function), jax.hessian(function)):
        jaxpr = jax.make_jaxpr(f)(x)
        assert not jaxpr.effects
        assert "callback" not in str(jaxpr)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "reference"])
@pytest.mark.parametrize(
    "transform",
    [lambda f: f, jax.grad, jax.value_and_grad, lambda f: lambda x: jax.vmap(f)(x[None])],
    ids=["value", "gradient", "both", "vmap"],
)
def test_law_14_a_second_eager_call_traces_and_compiles_nothing(name, transform):
    function, x = LOSSES[name]
    for _ in range(2):
        jax.block_until_ready(transform(function)(x))
    with counting():
        jax.block_until_ready(transform(function)(x))


NUMBERS = {  # values of a number that the same program takes
    "label_smoothing": (0.1, 0.2, np.float32(0.3), 1),
    "z_loss": (0.1, 1e-4, 2),
    "logit_scale": (0.5, 2, np.float32(3.0)),
    "softcap": (5.0, 30, np.float32(9.0)),
    "ignore_index": (-100, 0, 3, -(2**31)),
}


@pytest.mark.parametrize("argument", NUMBERS)
@pytest.mark.parametrize("function", ["cross_entropy", "linear_cross_entropy"])
def test_law_14_another_number_is_no_other_program(function, argument):
    arrays = (X,) if function == "cross_entropy" else (H, K)
    first, *others = NUMBERS[argument]

    def call(value):
        run = getattr(jaxent, function)
        loss = lambda x: run(x, *arrays[1:], Y, **{argument: value})  # noqa: E731
        return jax.block_until_ready((loss(arrays[0]), jax.grad(loss)(arrays[0])))

    call(first)
    call(first)
    with counting():
        for value in others:
            call(value)


def test_law_14_another_weight_is_no_other_program():
    weighted = jaxent.CrossEntropyLoss(weight=W)
    jitted = jax.jit(lambda loss, x: loss(x, Y))
    weighted.weight = np.ones(6, "float32")
    for _ in range(2):
        jaxent.cross_entropy(X, Y, weight=[1, 2, 3, 4, 5, 6], sample_weight=np.ones(8))
        jax.block_until_ready((weighted(X, Y), jitted(weighted, X)))
    with counting():
        jaxent.cross_entropy(X, Y, weight=[6, 5, 4, 3, 2, 1], sample_weight=np.zeros(8))
        weighted.weight = np.full(6, 2, "float32")
        weighted(X, Y)
        jitted(weighted, X)
        jaxent.cross_entropy(np.asarray(X), np.asarray(Y, "int64"), weight=W, sample_weight=S)


def test_law_14_a_loop_of_new_objects_compiles_once():
    for step in range(3):
        loss = jaxent.CrossEntropyLoss(label_smoothing=0.1 + step / 100)
        if step < 2:
            loss(X, Y)
            continue
        with counting():
            loss(X, Y)


@pytest.mark.parametrize("name", LOSSES)
def test_law_14_a_program_is_exported_and_serialized(name):
    pytest.importorskip("flatbuffers")
    function, x = LOSSES[name]
    for f in (function, jax.grad(function)):
        jitted = jax.jit(f)
        exported = jax.export.export(jitted, platforms=("cpu", "tpu", "cuda"))(x)
        again = jax.export.deserialize(exported.serialize())
        jax.tree.map(assert_same_bits, again.call(x), jitted(x))


def assert_same_bits(found, wanted):
    """Of one compiler. jax 0.10 fuses the operations of a program of many platforms otherwise."""
    rounding = 0 if jax.__version_info__ >= (0, 12) else 1e-6
    np.testing.assert_allclose(found, wanted, rtol=rounding, atol=rounding)


LOAD = """
import sys, jax, jax.export, numpy as np
saved = np.load(sys.argv[1])
exported = jax.export.deserialize(bytearray(saved["program"].tobytes()))
for found, wanted in zip(exported.call(saved["x"]), (saved["loss"], saved["gradient"])):
    np.testing.assert_array_equal(found, wanted)
assert "jaxent" not in sys.modules
"""


@pytest.mark.parametrize("name", ["cross_entropy, every option", "linear_cross_entropy"])
def test_law_14_a_fresh_process_computes_the_same_bits(name, tmp_path):
    pytest.importorskip("flatbuffers")
    function, x = LOSSES[name]
    jitted = jax.jit(jax.value_and_grad(function))
    program = np.frombuffer(jax.export.export(jitted)(x).serialize(), "uint8")
    loss, gradient = jitted(x)
    np.savez(tmp_path / "saved.npz", program=program, x=x, loss=loss, gradient=gradient)
    script = [sys.executable, "-c", LOAD, str(tmp_path / "saved.npz")]
    subprocess.run(script, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


CACHED = """
import jax, jax.numpy as jnp, jaxent
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None)
x, y = jnp.ones((8, 6)), jnp.arange(8) % 6
loss = lambda x: jaxent.cross_entropy(x, y, label_smoothing=0.1, weight=jnp.ones(6))
head = lambda h: jaxent.linear_cross_entropy(h, jnp.ones((6, 50)), y)
for f in (loss, head):
    jax.block_until_ready(jax.jit(jax.value_and_grad(f))(x))
print(len(hits))
"""


def test_law_14_a_second_process_finds_the_program_in_the_compilation_cache(tmp_path):
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    run = [sys.executable, "-c", CACHED]
    hits = [
        int(subprocess.run(run, env=environment, check=True, capture_output=True).stdout)
        for _ in range(2)
    ]
    assert hits[0] < hits[1]
    assert hits[1] >= 2


SYMBOLIC = {
    "cross_entropy": (
        lambda x, y: jaxent.cross_entropy(
            x, y, **OPTIONS["every option"] | {"sample_weight": None}
        ),
        6,
    ),
    "nll": (jaxent.nll, 6),
    "log_softmax": (lambda x, y: jaxent.log_softmax(x), 6),
    "token_stats": (lambda x, y: jaxent.token_stats(x, y).entropy, 6),
    "total_weight": (lambda x, y: jaxent.total_weight(y, weight=W), 6),
    "linear_cross_entropy": (lambda h, y: jaxent.linear_cross_entropy(h, K, y), 5),
    "linear_cross_entropy, chunks of 2": (
        lambda h, y: jaxent.linear_cross_entropy(h, K, y, chunk_size=2, class_mask=MASK),
        5,
    ),
    "linear_cross_entropy, wide": (
        lambda h, y: jaxent.linear_cross_entropy(h, WIDE[1], y),
        1024,
    ),
    "linear_token_stats": (lambda h, y: jaxent.linear_token_stats(h, K, y).log_prob, 5),
}


def test_law_14_the_number_of_classes_may_be_symbolic_where_logits_are():
    b, c = jax.export.symbolic_shape("b, c")
    x, y = jax.ShapeDtypeStruct((b, c), "float32"), jax.ShapeDtypeStruct((b,), "int32")
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1}):
        loss = lambda x, y, options=options: jaxent.cross_entropy(x, y, axis=-1, **options)  # noqa: E731
        exported = jax.export.export(jax.jit(jax.value_and_grad(loss)))(x, y)
        for found, wanted in zip(exported.call(X, Y), jax.value_and_grad(loss)(X, Y)):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SYMBOLIC)
def test_law_14_the_number_of_examples_may_be_symbolic(name):
    function, width = SYMBOLIC[name]
    (b,) = jax.export.symbolic_shape("b")
    x, y = jax.ShapeDtypeStruct((b, width), "float32"), jax.ShapeDtypeStruct((b,), "int32")
    concrete = jax.random.normal(jax.random.key(4), (7, width)), jnp.arange(7) % 4
    forms = [function]
    if name != "total_weight":
        forms.append(jax.grad(lambda x, y: jnp.sum(function(x, y))))
    for f in forms:
        found = jax.export.export(jax.jit(f))(x, y).call(*concrete)
        np.testing.assert_allclose(found, f(*concrete), rtol=1e-5, atol=1e-6)


def test_the_benchmark_of_calls_has_a_row_for_each_bound(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import call_cost

    for name, _, sides in call_cost.calls():
        function, arguments = sides["jaxent"]
        for _ in range(2):
            jax.block_until_ready(function(*arguments))
        with counting():
            jax.block_until_ready(function(*arguments))
        if name.startswith("eager object") or "stat" in name:
            continue
        found, wanted = (jax.tree.leaves(f(*a))[0] for f, a in sides.values())
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=name)
