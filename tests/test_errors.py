"""What is refused while tracing, and that the message says the shapes and what to pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxent
from jaxent import reference

LOGITS = jnp.zeros((4, 5))
LABELS = jnp.zeros(4, int)
SQUARE = jnp.zeros((4, 3, 3))


def both(function):
    return pytest.mark.parametrize("function", [getattr(m, function) for m in (jaxent, reference)])


CASES = {
    "swapped arguments": (
        (LABELS, LOGITS),
        {},
        TypeError,
        r"logits must be a float array, got int32\[4\]; the order of arguments is logits, targets",
    ),
    "integer logits": ((jnp.zeros((4, 5), int), LABELS), {}, TypeError, "must be a float array"),
    "complex logits": ((LOGITS + 1j, LABELS), {}, TypeError, "must be a float array"),
    "scalar logits": ((jnp.zeros(()), LABELS), {}, ValueError, "must have a class axis"),
    "bool targets": ((LOGITS, LABELS > 0), {}, TypeError, "integer class indices or float"),
    "a missing batch axis": (
        (jnp.zeros(5), jnp.zeros(1, int)),
        {},
        ValueError,
        r"logits are \[5\], targets int32\[1\]: class indices must be \[\] \(axis=0\)",
    ),
    "a batch axis too many": (
        (LOGITS[None], LABELS),
        {},
        ValueError,
        r"logits are \[1, 4, 5\], targets int32\[4\]: class indices must be "
        r"\[1, 5\] \(axis=1\) or \[1, 4\] \(axis=2\)",
    ),
    "batches of different sizes": (
        (LOGITS, jnp.zeros(3, int)),
        {},
        ValueError,
        r"logits are \[4, 5\], targets int32\[3\]",
    ),
    "one-hot integers": (
        (LOGITS, jnp.zeros((4, 5), int)),
        {},
        ValueError,
        r"one-hot or probabilities, pass floats: targets.astype\(logits.dtype\)",
    ),
    "float class indices": (
        (LOGITS, jnp.zeros(4)),
        {},
        ValueError,
        r"targets float32\[4\]: float targets are class probabilities and need the shape of "
        "the logits; class indices need an integer dtype",
    ),
    "a class axis that could be either": (
        (SQUARE, jnp.zeros((4, 3), int)),
        {},
        ValueError,
        r"logits are \[4, 3, 3\].* pass axis=1 .* or axis=-1",
    ),
    "probabilities of unsaid axis": ((SQUARE, SQUARE), {}, ValueError, "pass axis=1 .* or axis=-1"),
    "an axis that does not fit": (
        (LOGITS, LABELS),
        {"axis": 0},
        ValueError,
        r"class indices must be \[5\] \(axis=0\)",
    ),
    "an axis out of range": ((LOGITS, LABELS), {"axis": 2}, ValueError, "axis=2 is out of range"),
    "an axis that is a name": (
        (LOGITS, LABELS),
        {"axis": "classes"},
        TypeError,
        "axis must be an integer, got 'classes'",
    ),
    "no classes": (
        (jnp.zeros((4, 0)), LABELS),
        {},
        ValueError,
        "there are no classes along axis 1",
    ),
    "a weight of the wrong length": (
        (LOGITS, LABELS),
        {"weight": jnp.ones(4)},
        ValueError,
        r"weight is \[4\]: it must be \[5\], one number a class",
    ),
    "a weight by name": (
        (LOGITS, LABELS),
        {"weight": "balanced"},
        TypeError,
        "weight must be an array or a number, got 'balanced'",
    ),
    "targets of None": (
        (LOGITS, None),
        {},
        TypeError,
        "targets must be an array or a number, got None",
    ),
    "a weight an example": (
        (LOGITS, LABELS),
        {"weight": jnp.ones((4, 5))},
        ValueError,
        r"weight is \[4, 5\]",
    ),
    "a complex weight": (
        (LOGITS, LABELS),
        {"weight": jnp.ones(5) * 1j},
        TypeError,
        "weight must be",
    ),
    "a sample_weight that does not broadcast": (
        (LOGITS, LABELS),
        {"sample_weight": jnp.ones(5)},
        ValueError,
        r"sample_weight is \[5\]: it must broadcast to \[4\]",
    ),
    "a sample_weight that broadcasts the examples": (
        (LOGITS, LABELS),
        {"sample_weight": jnp.ones((2, 4))},
        ValueError,
        "it must broadcast to",
    ),
    "an unknown reduction": (
        (LOGITS, LABELS),
        {"reduction": "batchmean"},
        ValueError,
        r"reduction must be one of \('mean', 'sum', 'none'\), got 'batchmean'",
    ),
    "an ignore_index that is computed": (
        (LOGITS, LABELS),
        {"ignore_index": 1.5},
        TypeError,
        "ignore_index must be a Python integer or None.* pass sample_weight",
    ),
    "an ignored class among probabilities": (
        (LOGITS, LOGITS),
        {"ignore_index": 0},
        ValueError,
        "ignore_index=0 has no meaning for class probabilities: .* sample_weight of 0",
    ),
}
ONLY_CROSS_ENTROPY = {
    "smoothing 1.5": ({"label_smoothing": 1.5}, ValueError, r"must be in \[0, 1\], got 1.5"),
    "smoothing an array": (
        {"label_smoothing": jnp.zeros(4)},
        ValueError,
        r"label_smoothing must be a scalar, got float32\[4\]",
    ),
    "smoothing a NumPy 1.5": ({"label_smoothing": np.array(1.5)}, ValueError, "must be in"),
    "smoothing nan": ({"label_smoothing": float("nan")}, ValueError, r"\[0, 1\], got nan"),
    "z_loss inf": ({"z_loss": float("inf")}, ValueError, "z_loss must be finite, got inf"),
    "z_loss 1e300": ({"z_loss": 1e300}, ValueError, "z_loss must be finite, got 1e"),
    "z_loss an array": ({"z_loss": jnp.zeros(4)}, ValueError, "z_loss must be a scalar"),
    "a z_loss of None": (
        {"z_loss": None},
        TypeError,
        "z_loss must be an array or a number, got None",
    ),
    "softcap 0": ({"softcap": 0.0}, ValueError, "softcap must be a positive Python number"),
    "softcap an array": ({"softcap": jnp.ones(1)}, ValueError, "softcap must be a positive"),
    "a class_mask of numbers": (
        {"class_mask": jnp.ones(5)},
        TypeError,
        r"class_mask is float32\[5\]: it must be bool, True for the classes that exist",
    ),
    "a class_mask of the wrong length": (
        {"class_mask": jnp.ones(4, bool)},
        ValueError,
        r"class_mask is bool\[4\], logits \[4, 5\]: it must be \[5\], one value a class, or have "
        "2 dimensions",
    ),
}


@both("cross_entropy")
@pytest.mark.parametrize("case", CASES)
def test_cross_entropy_refuses(function, case):
    arguments, keywords, error, message = CASES[case]
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: function(*arguments, **keywords))


@both("nll")
@pytest.mark.parametrize("case", CASES)
def test_nll_refuses_and_names_its_own_argument(function, case):
    arguments, keywords, error, message = CASES[case]
    with pytest.raises(error, match=message.replace("logits", "log_probs")):
        jax.eval_shape(lambda: function(*arguments, **keywords))


@both("cross_entropy")
@pytest.mark.parametrize("case", ONLY_CROSS_ENTROPY)
def test_cross_entropy_refuses_what_nll_lacks(function, case):
    keywords, error, message = ONLY_CROSS_ENTROPY[case]
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: function(LOGITS, LABELS, **keywords))


@both("log_softmax")
def test_log_softmax_refuses(function):
    with pytest.raises(TypeError, match="must be a float array"):
        function(LABELS)
    with pytest.raises(ValueError, match="axis=2 is out of range for logits of 2 dimensions"):
        function(LOGITS, 2)
    with pytest.raises(TypeError, match="axis must be an integer, got None"):
        function(LOGITS, None)
    with pytest.raises(ValueError, match=r"class_mask is bool\[4\]"):
        function(LOGITS, class_mask=jnp.ones(4, bool))


@both("total_weight")
def test_total_weight_refuses(function):
    with pytest.raises(TypeError, match="total_weight counts class indices"):
        function(LOGITS)
    with pytest.raises(ValueError, match=r"weight is \[4, 5\]"):
        function(LABELS, weight=LOGITS)
    with pytest.raises(ValueError, match=r"sample_weight is \[3\]"):
        function(LABELS, sample_weight=jnp.ones(3))


def test_traced_ignore_index_is_refused():
    with pytest.raises(TypeError, match="ignore_index must be a Python integer"):
        jax.jit(lambda i: jaxent.cross_entropy(LOGITS, LABELS, ignore_index=i))(0)


def test_unbound_axis_name_is_an_error():
    with pytest.raises(ValueError, match="of which there is none"):
        jaxent.cross_entropy(LOGITS, LABELS, axis_name="batch")


def test_axis_of_one_is_accepted_for_one_example():
    one = jaxent.cross_entropy(LOGITS[0], 2, axis=1)
    np.testing.assert_allclose(one, np.log(5), rtol=1e-6)


def test_a_class_axis_is_read_where_only_one_fits():
    labels = jnp.zeros((4, 2), int)
    first = jaxent.cross_entropy(jnp.zeros((4, 5, 2)), labels)
    last = jaxent.cross_entropy(jnp.zeros((4, 2, 5)), labels)
    np.testing.assert_allclose([first, last], np.log(5), rtol=1e-6)


def test_lists_are_accepted():
    loss = jaxent.cross_entropy(
        [[0.0, 0.0], [0.0, 0.0]], [0, 1], weight=[1, 3], sample_weight=[True, False]
    )
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
