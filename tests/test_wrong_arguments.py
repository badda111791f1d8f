"""Whatever is passed for whichever argument: it is taken, or refused by name in a few words.

Each value is given to each argument of each public function and object. What is raised must be a
TypeError or ValueError of jaxent's own (its innermost frame lies there) that names the argument.
"""

import inspect
import pathlib
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxent
from jaxent import reference

HOME = str(pathlib.Path(jaxent.__file__).parent)
N, D, C = 4, 3, 5
LOGITS, TARGETS = jnp.zeros((N, C)), jnp.arange(N)
HIDDEN, KERNEL = jnp.ones((N, D)), jnp.ones((D, C))

VALUES = {
    "None": None,
    "a string": "abc",
    "bytes": b"abc",
    "a dict": {},
    "a large dict": {f"layer{i}": np.zeros((100, 100)) for i in range(100)},
    "a set": {1},
    "an object": object(),
    "a function": len,
    "a class": list,
    "a slice": slice(None),
    "a ragged list": [[1], [1, 2]],
    "a list of None": [None],
    "a list of strings": ["a", "b"],
    "an empty list": [],
    "True": True,
    "-7": -7,
    "0": 0,
    "1.5": 1.5,
    "10**30": 10**30,
    "nan": float("nan"),
    "inf": float("inf"),
    "1j": 1j,
    "a NumPy string": np.array("abc"),
    "a NumPy object": np.array(None),
    "a date": np.datetime64("2026-01-01"),
    "dates": np.zeros(N, "datetime64[s]"),
    "a key": jax.random.key(0),
    "keys": jax.random.split(jax.random.key(0), N),
    "a scalar": jnp.zeros(()),
    "an integer scalar": jnp.array(3),
    "a vector": jnp.zeros(7),
    "integers": jnp.zeros(N, int),
    "bools": jnp.zeros(N, bool),
    "a matrix": jnp.zeros((N, N)),
    "an integer matrix": jnp.zeros((N, C), int),
    "four dimensions": jnp.zeros((2, 3, 4, 5)),
    "complex numbers": jnp.zeros((N, C)) * 1j,
    "no examples": jnp.zeros((0, C)),
    "no classes": jnp.zeros((N, 0)),
    "float8": jnp.zeros((N, C), jnp.float8_e4m3fn),
    "float8 of the kernel's shape": jnp.zeros((D, C), jnp.float8_e5m2),
    "a large array": np.zeros((300, 300)),
    "masked": np.ma.masked_array([1.0, 2.0], [True, False]),
    "a shape": jax.ShapeDtypeStruct((N, C), jnp.float32),
    "a dtype": jnp.float16,
    "a narrow dtype": jnp.float8_e4m3fn,
}

CALLS = {
    "log_softmax": (jaxent.log_softmax, {"logits": LOGITS}),
    "nll": (jaxent.nll, {"log_probs": LOGITS, "targets": TARGETS}),
    "cross_entropy": (jaxent.cross_entropy, {"logits": LOGITS, "targets": TARGETS}),
    "linear_cross_entropy": (
        jaxent.linear_cross_entropy,
        {"hidden": HIDDEN, "kernel": KERNEL, "targets": TARGETS},
    ),
    "token_stats": (jaxent.token_stats, {"logits": LOGITS, "targets": TARGETS}),
    "linear_token_stats": (
        jaxent.linear_token_stats,
        {"hidden": HIDDEN, "kernel": KERNEL, "targets": TARGETS},
    ),
    "total_weight": (jaxent.total_weight, {"targets": TARGETS, "weight": jnp.ones(C)}),
    "check_targets": (jaxent.check_targets, {"targets": TARGETS, "num_classes": C}),
    "next_token_targets": (jaxent.next_token_targets, {"tokens": TARGETS}),
    "NLLLoss": (jaxent.NLLLoss, {}),
    "CrossEntropyLoss": (jaxent.CrossEntropyLoss, {}),
    "LinearCrossEntropyLoss": (jaxent.LinearCrossEntropyLoss, {}),
}
TWINS = [name for name in CALLS if hasattr(reference, name)]
CALLS |= {f"reference.{name}": (getattr(reference, name), CALLS[name][1]) for name in TWINS}


def refused(argument, function, *args, **keywords):
    """Whether the call raises; if so, what this file's docstring says of it holds."""
    try:
        function(*args, **keywords)
    except (TypeError, ValueError) as error:
        message = str(error).split("\n--------------------")[0]
        frames = traceback.extract_tb(error.__traceback__)
        assert frames[-1].filename.startswith(HOME), f"{frames[-1]}: {message}"
        assert argument in message or (argument == "num_classes" and "targets[" in message), message
        assert len(message) < 400, message
        assert message.count("\n") == 0, message
        return True
    return False


CASES = [
    (name, argument)
    for name, (function, _) in CALLS.items()
    for argument in inspect.signature(function).parameters
]


def test_there_are_at_least_two_thousand_calls():
    assert len(CASES) * len(VALUES) > 2000


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_a_wrong_value_is_refused_by_name(name, argument):
    function, right = CALLS[name]
    outcomes = {
        label: refused(argument, function, **(right | {argument: value}))
        for label, value in VALUES.items()
    }
    # Of what no argument can be.
    for label in ("a large dict", "an object", "a function", "a slice", "a list of strings"):
        assert outcomes[label] or (argument.endswith("axis_name") and "list" in label), label


STATIC = {
    "axis": 1,
    "ignore_index": 3,
    "softcap": 5.0,
    "class_axis": -1,
    "chunk_size": 2,
    "num_classes": 5,
}


@pytest.mark.parametrize(("name", "argument"), [c for c in CASES if c[1] in STATIC])
def test_a_traced_number_that_has_to_be_known_names_static_argnames(name, argument):
    function, right = CALLS[name]
    call = jax.jit(lambda value: function(**(right | {argument: value})) and None)
    with pytest.raises((TypeError, ValueError), match=rf"{argument} must be.*static_argnames"):
        call(STATIC[argument])


@pytest.mark.parametrize(("name", "argument"), [c for c in CASES if c[1] == "softcap"])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array, jnp.asarray])
def test_a_concrete_scalar_is_a_softcap(name, argument, kind):
    function, right = CALLS[name]
    taken = function(**right, softcap=kind(5.0))
    jax.tree.map(np.testing.assert_array_equal, taken, function(**right, softcap=5.0))


@pytest.mark.parametrize("name", ["NLLLoss", "CrossEntropyLoss", "LinearCrossEntropyLoss"])
def test_setting_an_attribute_checks_it_as_construction_does(name):
    kind = CALLS[name][0]
    for argument in inspect.signature(kind).parameters:
        for label, value in VALUES.items():
            loss = kind()
            constructed = refused(argument, kind, **{argument: value})
            assert refused(argument, setattr, loss, argument, value) == constructed, label
    with pytest.raises(AttributeError, match=f"{name} has no gamma; it has .*weight"):
        kind().gamma = 2.0


def test_a_head_refuses_by_name():
    for value in VALUES.values():
        if value is not None:
            build = lambda value=value: jaxent.LinearHead(  # noqa: E731
                3, 5, criterion=value, rngs=nnx.Rngs(0)
            )
            assert refused("criterion", build)
    head = jaxent.LinearHead(3, 5, rngs=nnx.Rngs(0))
    for value in VALUES.values():
        refused("targets", head.loss, HIDDEN, value)
        refused("hidden", head.loss, value, TARGETS)


# What others call it


OTHERS = [
    ({"labels": TARGETS}, "labels is called targets here"),
    ({"target": TARGETS}, "target is called targets here"),
    ({"targets": TARGETS, "where": TARGETS > 0}, "where is called sample_weight"),
    ({"targets": TARGETS, "mask": TARGETS > 0}, "mask is called sample_weight"),
    ({"targets": TARGETS, "dim": 1}, "dim is called axis"),
    ({"targets": TARGETS, "weights": jnp.ones(5)}, "weights is called weight for classes"),
    ({"targets": TARGETS, "size_average": True}, "size_average is called reduction"),
    ({"targets": TARGETS, "no_such": 1}, "its arguments are logits, targets, weight"),
]


@pytest.mark.parametrize(("keywords", "message"), OTHERS)
@pytest.mark.parametrize("function", [jaxent.cross_entropy, reference.cross_entropy])
def test_the_names_of_others_are_errors_that_name_ours(function, keywords, message):
    with pytest.raises(TypeError, match=f"cross_entropy: .*{message}"):
        function(LOGITS, **keywords)


@pytest.mark.parametrize("function", [jaxent.cross_entropy, jaxent.CrossEntropyLoss()])
def test_a_positional_weight_is_an_error_that_says_so(function):
    with pytest.raises(TypeError, match=r"taken by position, and the rest by name \(weight="):
        function(LOGITS, TARGETS, jnp.ones(C))


def test_objects_name_ours_too():
    loss = jaxent.CrossEntropyLoss()
    with pytest.raises(TypeError, match="labels is called targets here"):
        loss(LOGITS, labels=TARGETS)
    with pytest.raises(TypeError, match="where is called sample_weight"):
        loss(LOGITS, TARGETS, where=TARGETS > 0)
    with pytest.raises(TypeError, match="smoothing is called label_smoothing here"):
        jaxent.CrossEntropyLoss(smoothing=0.1)


def test_a_wrong_call_leaves_the_signatures_as_they_are():
    parameters = inspect.signature(jaxent.cross_entropy).parameters
    assert [*parameters][:3] == ["logits", "targets", "weight"]
    assert parameters["weight"].kind == inspect.Parameter.KEYWORD_ONLY
    assert jaxent.cross_entropy.__name__ == "cross_entropy"
    assert inspect.getsource(jaxent.cross_entropy).count('"""') == 2


# Hints


def test_integer_logits_in_the_right_order_are_not_told_to_be_swapped():
    for function in (jaxent.cross_entropy, jaxent.nll, jaxent.token_stats):
        with pytest.raises(TypeError) as error:
            function(jnp.zeros((N, C), int), TARGETS)
        assert "order" not in str(error.value)
        with pytest.raises(TypeError, match="the order of arguments is"):
            function(TARGETS, LOGITS)


def test_a_weight_an_example_is_pointed_to_sample_weight():
    with pytest.raises(ValueError, match=r"weight is \[4\].*pass sample_weight"):
        jaxent.cross_entropy(LOGITS, TARGETS, weight=jnp.ones(N))


@pytest.mark.parametrize("module", [jaxent, reference])
@pytest.mark.parametrize(("batch", "length"), [(2, 3), (3, 3)])
def test_sample_weights_of_the_batch_have_to_say_so(module, batch, length):
    logits, targets = jnp.zeros((batch, length, 7)), jnp.zeros((batch, length), int)
    weight = jnp.arange(batch) == 0
    with pytest.raises(ValueError, match=r"pass sample_weight\[:, None\]"):
        module.cross_entropy(logits, targets, axis=-1, sample_weight=weight)
    losses = module.cross_entropy(
        logits, targets, axis=-1, sample_weight=weight[:, None], reduction="none"
    )
    np.testing.assert_array_equal(losses[1:], 0)
    assert np.all(losses[0] > 1)
    with pytest.raises(ValueError, match="sample_weight is"):
        module.total_weight(targets, sample_weight=weight)


@pytest.mark.parametrize("transform", [jax.jacfwd, lambda f: lambda x: jax.jvp(f, (x,), (x,))])
def test_forward_mode_points_to_the_reference(transform):
    with pytest.raises(TypeError, match=r"take jaxent\.reference\.cross_entropy"):
        transform(lambda x: jaxent.cross_entropy(x, TARGETS))(LOGITS)
    with pytest.raises(TypeError, match=r"take jaxent\.reference\.linear_cross_entropy"):
        transform(lambda h: jaxent.linear_cross_entropy(h, KERNEL, TARGETS))(HIDDEN)
    assert np.all(np.isfinite(transform(lambda x: reference.cross_entropy(x, TARGETS))(LOGITS)[0]))
