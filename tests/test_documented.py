"""The examples in the documentation of OneFlow, PyTorch, R torch and torch.js, in JAX.

Where a library prints numbers, they are these numbers; where it prints none, the formula
in float64 numpy is. Random tensors are drawn from a numpy seed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxent
from jaxent.porting import legacy_reduction


def randn(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def log_probabilities(logits, axis=1):
    """Return log softmax, float64."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def formula(log_probs, targets, weight=None, ignore_index=-100):
    """Mean of -w_y log p_y over the targets that are not ignored, classes on axis 1, float64."""
    rows = np.moveaxis(np.asarray(log_probs, np.float64), 1, -1)
    rows = rows.reshape(-1, rows.shape[-1])
    weight = np.ones(rows.shape[1]) if weight is None else np.asarray(weight, np.float64)
    total = total_weight = 0.0
    for row, target in zip(rows, np.ravel(targets)):
        if target != ignore_index:
            total -= weight[target] * row[target]
            total_weight += weight[target]
    return total / total_weight


def check_mean(loss, expected, inputs):
    """The scalar `loss(inputs)` is the expected one, and its gradient finite and not zero."""
    value, gradient = jax.jit(jax.value_and_grad(loss))(inputs)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    assert gradient.shape == inputs.shape
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient != 0)
    return gradient


# OneFlow: nn.CrossEntropyLoss

ONEFLOW_INPUT = np.float32(
    [
        [-0.1664078, -1.7256707, -0.14690138],
        [-0.21474946, 0.53737473, 0.99684894],
        [-1.135804, -0.50371903, 0.7645404],
    ]
)
ONEFLOW_TARGET = np.int32([0, 1, 2])
ONEFLOW_PROBABILITIES = np.float32(
    [
        [0.99495536, 0.28255007, -0.2775054],
        [0.42397153, 0.01075112, 0.56527734],
        [0.72356546, -0.1304398, 0.4068744],
    ]
)


def check_printed(loss, targets, printed):
    """`loss` is what was printed, to its four digits, and its gradient is finite."""
    np.testing.assert_allclose(loss(ONEFLOW_INPUT, targets), printed, rtol=0, atol=5.1e-5)
    gradient = jax.jit(jax.grad(lambda x: loss(x, targets).sum()))(ONEFLOW_INPUT)
    assert gradient.shape == ONEFLOW_INPUT.shape
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient != 0)
    return gradient


def test_oneflow_reduction_none():
    loss = jaxent.CrossEntropyLoss(reduction="none")
    check_printed(loss, ONEFLOW_TARGET, [0.8020, 1.1167, 0.3583])


def test_oneflow_reduction_sum():
    check_printed(jaxent.CrossEntropyLoss(reduction="sum"), ONEFLOW_TARGET, 2.2769)


def test_oneflow_reduction_mean():
    check_printed(jaxent.CrossEntropyLoss(reduction="mean"), ONEFLOW_TARGET, 0.7590)


def test_oneflow_class_0_ignored():
    loss = jaxent.CrossEntropyLoss(reduction="none", ignore_index=0)
    gradient = check_printed(loss, ONEFLOW_TARGET, [0.0, 1.1167, 0.3583])
    np.testing.assert_array_equal(gradient[0], 0)
    assert loss(ONEFLOW_INPUT, ONEFLOW_TARGET)[0] == 0


def test_oneflow_label_smoothing_of_a_half():
    loss = jaxent.CrossEntropyLoss(reduction="none", label_smoothing=0.5)
    check_printed(loss, ONEFLOW_TARGET, [1.0586, 1.1654, 0.8864])


def test_oneflow_probabilities_are_taken_as_given():
    assert ONEFLOW_PROBABILITIES.min() < 0  # its own example has negative ones
    check_printed(jaxent.CrossEntropyLoss(), ONEFLOW_PROBABILITIES, 1.3305)


# PyTorch: nn.CrossEntropyLoss


def test_pytorch_cross_entropy_of_a_batch():
    targets = np.random.default_rng(0).integers(0, 5, 3)
    loss = jaxent.CrossEntropyLoss()
    expected = formula(log_probabilities(randn(3, 5)), targets)
    check_mean(lambda x: loss(x, targets), expected, randn(3, 5))


@pytest.mark.parametrize("dims", [(), (4,), (4, 2), (2, 3, 4)])
def test_pytorch_cross_entropy_and_nll_of_k_dimensions(dims):
    shape = (3, 5, *dims)
    targets = np.random.default_rng(1).integers(0, 5, (3, *dims))
    expected = formula(log_probabilities(randn(*shape)), targets)
    check_mean(lambda x: jaxent.cross_entropy(x, targets), expected, randn(*shape))
    log_probs = jaxent.log_softmax(randn(*shape), axis=1)
    check_mean(lambda x: jaxent.nll(x, targets), expected, log_probs)


def test_pytorch_cross_entropy_and_nll_of_one_example():
    expected = formula(log_probabilities(randn(1, 5)), [3])
    check_mean(lambda x: jaxent.cross_entropy(x, 3), expected, randn(1, 5)[0])
    check_mean(lambda x: jaxent.nll(jaxent.log_softmax(x), 3), expected, randn(1, 5)[0])


def test_pytorch_weighted_mean_divides_by_the_weights_of_the_targets():
    targets, weight = np.array([0, 4, 4]), np.float32([1, 1, 1, 1, 3])
    losses = -log_probabilities(randn(3, 5))[np.arange(3), targets]
    expected = (losses[0] + 3 * losses[1] + 3 * losses[2]) / 7
    loss = jaxent.CrossEntropyLoss(weight=weight)
    check_mean(lambda x: loss(x, targets), expected, randn(3, 5))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"size_average": True}, np.mean),
        ({"size_average": False}, np.sum),
        ({"reduce": False}, np.array),
        ({"size_average": True, "reduce": False}, np.array),
    ],
)
def test_pytorch_deprecated_size_average_and_reduce(flags, expected):
    targets = np.array([1, 0, 4])
    losses = -log_probabilities(randn(3, 5))[np.arange(3), targets]
    with pytest.warns(DeprecationWarning, match="pass reduction="):
        loss = jaxent.CrossEntropyLoss(reduction=legacy_reduction(**flags))
    result = loss(randn(3, 5), targets)
    assert result.shape == expected(losses).shape
    np.testing.assert_allclose(result, expected(losses), rtol=2e-6)


# R torch: nn_cross_entropy_loss, nn_nll_loss; classes count from 1 there


def test_r_torch_cross_entropy_with_classes_counted_from_1():
    classes = np.random.default_rng(2).integers(1, 5, 3)  # low is in, high is not
    loss = jaxent.CrossEntropyLoss()
    expected = formula(log_probabilities(randn(3, 5)), [c - 1 for c in classes])
    check_mean(lambda x: loss(x, classes - 1), expected, randn(3, 5))


def test_r_torch_nll_with_classes_counted_from_1():
    classes = np.array([2, 1, 5])
    expected = -log_probabilities(randn(3, 5))[[0, 1, 2], [1, 0, 4]].mean()
    loss = jaxent.NLLLoss()
    check_mean(lambda x: loss(jaxent.log_softmax(x, axis=1), classes - 1), expected, randn(3, 5))


def test_r_torch_last_class_not_shifted_is_loud():
    losses = jaxent.cross_entropy(randn(3, 5), np.array([2, 1, 5]), reduction="none")
    np.testing.assert_array_equal(np.isnan(losses), [False, False, True])


def test_r_torch_nll_of_an_image_takes_log_probabilities_as_given():
    # The example normalizes over dimension 1 counted from 1: the batch, not the classes.
    images, kernel, bias = randn(5, 16, 10, 10), 0.1 * randn(4, 16, 3, 3), randn(4)
    classes = np.random.default_rng(3).integers(1, 4, (5, 8, 8))

    def network(images):
        conv = jax.lax.conv_general_dilated(images, kernel, (1, 1), "VALID")  # NCHW, OIHW
        return conv + bias[:, None, None]

    scores = network(images)
    assert scores.shape == (5, 4, 8, 8)
    loss = jaxent.NLLLoss()
    for axis in (0, 1):  # as it stands, and as it was meant
        expected = formula(log_probabilities(scores, axis), classes - 1)
        check_mean(
            lambda x, axis=axis: loss(jaxent.log_softmax(network(x), axis=axis), classes - 1),
            expected,
            images,
        )


# torch.js: nn.CrossEntropyLoss


def extended(targets, size=32):
    """The few targets of an example, "extended to 32 in real use"."""
    return np.resize(np.int32(targets), size)


def test_torch_js_image_classes():
    targets = extended([0, 5, 3, 7, 2, 1, 4, 9, 3, 2])
    loss = jaxent.CrossEntropyLoss()
    expected = formula(log_probabilities(randn(32, 10)), targets)
    check_mean(lambda x: loss(x, targets), expected, randn(32, 10))


class ImageClassifier(nnx.Module):
    def __init__(self, num_classes, rngs):
        self.conv1 = nnx.Conv(3, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.fc1 = nnx.Linear(64 * 8 * 8, 128, rngs=rngs)
        self.fc2 = nnx.Linear(128, num_classes, rngs=rngs)
        self.loss = jaxent.CrossEntropyLoss()

    def __call__(self, images):
        x = nnx.max_pool(nnx.relu(self.conv1(images)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        return self.fc2(nnx.relu(self.fc1(x.reshape(x.shape[0], -1))))


def test_torch_js_image_classifier_forward_and_backward():
    model = ImageClassifier(10, nnx.Rngs(0))
    images, labels = randn(32, 32, 32, 3), np.random.default_rng(4).integers(0, 10, 32)

    @nnx.jit
    def step(model, images, labels):
        def loss(model):
            logits = model(images)
            return model.loss(logits, labels), logits

        return nnx.value_and_grad(loss, has_aux=True)(model)

    (loss, logits), gradients = step(model, images, labels)
    assert logits.shape == (32, 10)
    np.testing.assert_allclose(loss, formula(log_probabilities(logits), labels), rtol=2e-6)
    gradients, parameters = jax.tree.leaves(gradients), jax.tree.leaves(nnx.state(model, nnx.Param))
    assert len(parameters) == 8
    assert [g.shape for g in gradients] == [p.shape for p in parameters]
    assert all(np.all(np.isfinite(g)) and np.any(g != 0) for g in gradients)


def test_torch_js_class_weights():
    weight = np.float32([1.0, 2.0, 0.5, 1.5, 1.0])
    targets = extended([2, 0, 4, 1, 3])
    loss = jaxent.CrossEntropyLoss(weight=weight)
    expected = formula(log_probabilities(randn(32, 5)), targets, weight)
    unweighted = formula(log_probabilities(randn(32, 5)), targets)
    assert abs(expected - unweighted) > 1e-3
    check_mean(lambda x: loss(x, targets), expected, randn(32, 5))


@pytest.mark.parametrize(
    ("smoothing", "off", "on"),
    [
        (0.1, 0.02, 0.92),  # spread over all five classes: PyTorch's reading, and ours
        (0.1 * 5 / 4, 0.025, 0.9),  # over the four wrong ones: what torch.js's comment expects
    ],
)
def test_torch_js_label_smoothing_in_both_readings(smoothing, off, on):
    targets = extended([2, 0, 4, 1, 3])
    logits = randn(32, 5)
    target = np.where(np.arange(5) == targets[:, None], on, off)
    expected = -(target * log_probabilities(logits)).sum(1).mean()
    loss = jaxent.CrossEntropyLoss(label_smoothing=smoothing)
    gradient = check_mean(lambda x: loss(x, targets), expected, logits)
    # The gradient of one example is softmax(x) - target: so this is the target trained on.
    effective = np.exp(log_probabilities(logits)) - 32 * gradient
    np.testing.assert_allclose(effective, target, rtol=0, atol=2e-6)
    np.testing.assert_allclose(effective[0], [off, off, on, off, off], rtol=0, atol=2e-6)


def test_torch_js_padding_with_a_vocabulary_of_1000():
    padding = -1
    targets = extended([5, 23, padding, 102, 54, padding])
    logits = randn(32, 1000)
    loss = jaxent.CrossEntropyLoss(ignore_index=padding)
    expected = formula(log_probabilities(logits), targets, ignore_index=padding)
    gradient = check_mean(lambda x: loss(x, targets), expected, logits)
    padded = targets == padding
    assert padded.sum() == 10
    np.testing.assert_array_equal(gradient[padded], 0)
    assert np.all(np.any(gradient[~padded] != 0, axis=1))
    deleted = loss(logits[~padded], targets[~padded])
    np.testing.assert_allclose(loss(logits, targets), deleted, rtol=1e-6)


def test_torch_js_probabilities_prediction_and_loss():
    logits = np.float32([[2.0, 1.0, 0.1]])
    probs = jnp.exp(jaxent.log_softmax(logits))
    np.testing.assert_allclose(probs, [[0.66, 0.24, 0.10]], rtol=0, atol=5.1e-3)
    assert jnp.argmax(probs, axis=-1) == 0
    expected = np.log(np.exp([2.0, 1.0, 0.1]).sum()) - 2.0
    loss = jaxent.CrossEntropyLoss()
    check_mean(lambda x: loss(x, np.int32([0])), expected, logits)
