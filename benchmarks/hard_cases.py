"""What optax, t5x, PyTorch and jaxent do in the hard cases, as a table of what came out.

    python -m benchmarks.hard_cases

Every cell is the result of running its code here: a number, or the error that was raised.
A library that is not installed leaves its column empty. t5x is not on PyPI: install it from
its repository, or put its `t5x/losses.py` on the path.
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} " + (
    "--xla_force_host_platform_device_count=8"
)

import importlib

import jax
import jax.numpy as jnp
import numpy as np

import jaxent

COLUMNS = ("optax", "t5x", "PyTorch", "jaxent")
INF, NAN = np.inf, np.nan


def find(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


optax, t5x_losses, torch = find("optax"), find("t5x.losses"), find("torch")
INSTALLED = {"optax": optax, "t5x": t5x_losses, "PyTorch": torch, "jaxent": jaxent}


def optax_mean(logits, labels, mask=None):
    """The mean that optax leaves to its users, with its own `where` for the mask."""
    loss = optax.softmax_cross_entropy_with_integer_labels
    if mask is None:
        return loss(jnp.asarray(logits), labels).mean()
    return jnp.sum(loss(jnp.asarray(logits), labels, where=mask[:, None] != 0)) / jnp.sum(mask)


def t5x_mean(logits, labels, mask=None):
    total, _, count = t5x_losses.compute_weighted_cross_entropy(
        jnp.asarray(logits), jnp.asarray(labels), mask
    )
    return total / count


def torch_mean(logits, labels, **keywords):
    logits = logits if isinstance(logits, torch.Tensor) else torch.tensor(logits)
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels), **keywords)


def out_of_range(label, dtype, num_classes):
    """One example of a label that is no class, logits from 0 to 1."""
    logits = np.linspace(0, 1, num_classes, dtype="float32")[None]
    labels = np.array([label], dtype)
    return {
        "optax": lambda: optax_mean(logits, labels),
        "t5x": lambda: t5x_mean(logits, labels),
        "PyTorch": lambda: torch_mean(logits, labels),
        "jaxent": lambda: jaxent.cross_entropy(logits, labels),
    }


def impossible_class():
    """Logits (-inf, 0, 0), one-hot target (0, 1, 0): log 2."""
    logits, targets = np.array([[-INF, 0, 0]], "float32"), np.array([[0, 1, 0]], "float32")
    return {
        "optax": lambda: optax.softmax_cross_entropy(logits, targets).mean(),
        "t5x": lambda: t5x_losses.cross_entropy_with_logits(logits, targets, 0.0)[0].mean(),
        "PyTorch": lambda: torch_mean(logits, targets),
        "jaxent": lambda: jaxent.cross_entropy(logits, targets),
    }


ROWS = np.array([[NAN, 0], [0, 0]], "float32")
MASK = np.array([0, 1], "float32")


def padding_of_nan():
    """Row 0 is padding of NaN, row 1 counts: log 2."""
    labels = np.array([0, 1])
    return {
        "optax": lambda: optax_mean(ROWS, labels, MASK),
        "t5x": lambda: t5x_mean(ROWS, labels, MASK),
        "PyTorch": lambda: torch_mean(ROWS, np.array([-100, 1])),
        "jaxent": lambda: jaxent.cross_entropy(ROWS, labels, sample_weight=MASK),
    }


def gradient_of_padding_of_nan():
    """The gradient of the padding's logits: 0."""
    labels = np.array([0, 1])

    def pytorch():
        logits = torch.tensor(ROWS, requires_grad=True)
        torch_mean(logits, np.array([-100, 1])).backward()
        return logits.grad[0, 0]

    return {
        "optax": lambda: jax.grad(optax_mean)(ROWS, labels, MASK)[0, 0],
        "t5x": lambda: jax.grad(t5x_mean)(ROWS, labels, MASK)[0, 0],
        "PyTorch": pytorch,
        "jaxent": lambda: jax.grad(lambda x: jaxent.cross_entropy(x, labels, sample_weight=MASK))(
            ROWS
        )[0, 0],
    }


def nothing_counted():
    """The mean of a batch that is padding alone: 0."""
    logits, labels, mask = np.zeros((2, 3), "float32"), np.array([0, 1]), np.zeros(2, "float32")
    return {
        "optax": lambda: optax_mean(logits, labels, mask),
        "t5x": lambda: t5x_mean(logits, labels, mask),
        "PyTorch": lambda: torch_mean(logits, np.array([-100, -100])),
        "jaxent": lambda: jaxent.cross_entropy(logits, labels, sample_weight=mask),
    }


def relative_error(logits, dtype):
    """The mean's error against float64 on the same inputs."""
    labels = np.random.default_rng(1).integers(0, logits.shape[1], len(logits))
    logits = np.asarray(jnp.asarray(logits, dtype))
    exact = np.asarray(logits, "float64")
    exact -= exact.max(-1, keepdims=True)
    exact = np.log(np.exp(exact).sum(-1)) - exact[np.arange(len(labels)), labels]

    def error(losses):
        return np.abs(np.asarray(losses, "float64") - exact).max() / exact.mean()

    def pytorch():
        tensor = torch.tensor(np.asarray(logits, "float32")).to(getattr(torch, dtype))
        losses = torch_mean(tensor, labels, reduction="none")
        return error(losses.double().numpy())

    def t5x():
        targets = jax.nn.one_hot(labels, logits.shape[1], dtype=dtype)
        return error(t5x_losses.cross_entropy_with_logits(jnp.asarray(logits), targets, 0.0)[0])

    return {
        "optax": lambda: error(
            optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), labels)
        ),
        "t5x": t5x,
        "PyTorch": pytorch,
        "jaxent": lambda: error(jaxent.cross_entropy(logits, labels, reduction="none")),
    }


def half_precision():
    return relative_error(np.random.default_rng(0).normal(size=(64, 50257)), "bfloat16")


def large_logits():
    return relative_error(np.random.default_rng(0).normal(size=(64, 1000)) + 1e4, "float32")


def nearly_certain(of_gradient):
    """Logits (20, 0) in float32, of which the first is the target: its loss, or its gradient."""
    logits, labels = np.array([[20, 0]], "float32"), np.array([0], "int64")

    def by_jax(mean):
        def run():
            value, gradient = jax.value_and_grad(lambda x: mean(x, jnp.asarray(labels)))(
                jnp.asarray(logits)
            )
            return gradient[0, 0] if of_gradient else value

        return run

    def pytorch():
        x = torch.tensor(logits, requires_grad=True)
        loss = torch_mean(x, labels)
        loss.backward()
        return (x.grad[0, 0] if of_gradient else loss).item()

    means = {"optax": optax_mean, "t5x": t5x_mean, "jaxent": jaxent.cross_entropy}
    return {name: by_jax(mean) for name, mean in means.items()} | {"PyTorch": pytorch}


def sharded_classes():
    """Uniform logits of 8 classes over 8 devices of an explicit mesh: log 8."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    logits, labels = jax.device_put(jnp.zeros((4, 8)), sharding), jnp.zeros(4, int)
    return {
        "optax": lambda: jax.jit(optax_mean)(logits, labels),
        "t5x": lambda: jax.jit(t5x_mean)(logits, labels),
        "jaxent": lambda: jax.jit(jaxent.cross_entropy)(logits, labels),
    }


def gradient_of_z_loss():
    """The gradient of the z-loss coefficient, uniform logits of 4 classes: (log 4)^2."""
    logits, labels = np.zeros((1, 4), "float32"), np.array([0])

    def t5x(z):
        return t5x_losses.compute_weighted_cross_entropy(
            jnp.asarray(logits), jnp.asarray(labels), z_loss=z
        )[0]

    return {
        "t5x": lambda: jax.grad(t5x)(0.1),
        "jaxent": lambda: jax.grad(lambda z: jaxent.cross_entropy(logits, labels, z_loss=z))(0.1),
    }


def gradient_of_class_weights():
    """The gradient of the weight of the only class that occurs, of the sum: log 4."""
    logits, labels, ones = np.zeros((1, 4), "float32"), np.array([0]), np.ones(4, "float32")

    def pytorch():
        weight = torch.tensor(ones, requires_grad=True)
        torch_mean(logits, labels, weight=weight, reduction="sum").backward()
        return weight.grad[0]

    return {
        "PyTorch": pytorch,
        "jaxent": lambda: jax.grad(
            lambda w: jaxent.cross_entropy(logits, labels, weight=w, reduction="sum")
        )(ones)[0],
    }


def forward_mode():
    """The derivative along logit 0 of uniform logits, label 0 of 4, in forward mode: -3/4."""
    logits, labels = jnp.zeros((1, 4)), np.array([0])
    tangent = jnp.eye(4)[:1]

    def along(function):
        return lambda: jax.jvp(lambda x: function(x, labels), (logits,), (tangent,))[1]

    def pytorch():
        function = torch.func.jvp
        tensors = torch.zeros(1, 4), torch.tensor(np.asarray(tangent))
        return function(lambda x: torch_mean(x, labels), *((t,) for t in tensors))[1]

    return {
        "optax": along(optax_mean),
        "t5x": along(t5x_mean),
        "PyTorch": pytorch,
        "jaxent": along(jaxent.reference.cross_entropy),
    }


CASES = {
    "label -1 of 4 classes": ("loud", out_of_range(-1, "int64", 4)),
    "label 4 of 4 classes": ("loud", out_of_range(4, "int64", 4)),
    "label -56 (200 cut to int8) of 300 classes": ("loud", out_of_range(-56, "int8", 300)),
    "one-hot target, logit -inf at another class": ("0.693", impossible_class()),
    "NaN logits in a row of padding: the loss": ("0.693", padding_of_nan()),
    "the same: that row's gradient": ("0", gradient_of_padding_of_nan()),
    "mean over padding alone": ("0", nothing_counted()),
    "bfloat16 logits, 50257 classes: error of a loss": ("0", half_precision()),
    "float32 logits near 10000: error of a loss": ("0", large_logits()),
    "float32 logits (20, 0), the first the target: the loss": ("2e-09", nearly_certain(False)),
    "the same: its gradient": ("-2e-09", nearly_certain(True)),
    "classes sharded, explicit mesh, under `jit`": ("2.08", sharded_classes()),
    "gradient of the z-loss coefficient": ("1.92", gradient_of_z_loss()),
    "gradient of a class weight": ("1.39", gradient_of_class_weights()),
    "forward mode (jaxent: `jaxent.reference`)": ("-0.75", forward_mode()),
}


def outcome(run) -> str:
    try:
        value = float(run())
    except Exception as error:
        return type(error).__name__
    return "NaN" if np.isnan(value) else f"{value:.3g}" if abs(value) > 0.01 else f"{value:.1g}"


def cells(case: str) -> dict[str, str]:
    """What each library did; a dash where it has no such thing, empty if not installed."""
    _, runs = CASES[case]
    return {
        name: (outcome(runs[name]) if INSTALLED[name] else "") if name in runs else "-"
        for name in COLUMNS
    }


def main():
    print(f"| case | right | {' | '.join(COLUMNS)} |")
    print("| --- | --- |" + " --- |" * len(COLUMNS))
    for case, (right, _) in CASES.items():
        print(f"| {case} | {right} | {' | '.join(cells(case).values())} |", flush=True)


if __name__ == "__main__":
    main()
