"""Arrays split over eight devices: time and error against one device.

Loss and gradients under `jit` on an explicit mesh (data, model) of eight host devices. They share
the machine's cores, so that the ratio of the times is what splitting costs there, and no speedup.
Each array's largest error is against that of one device, in eps of its dtype times the largest
value of the array (or times the loss).
"""

import os

# In this pass XLA's CPU compiler aborts the process for a head in bfloat16 whose classes are split:
# "Invalid binary instruction opcode copy" (jax 0.9.0, 0.10.2 and 0.12.0.1).
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_disable_hlo_passes=all-reduce-promotion"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent

from .engine import Row, interleaved, number, outcome

UNIT = "ms"
SIDES = ("one device", "8 devices")
BOUND = (
    "Score: the largest error, in eps; at most 8. Beside it: the time of eight devices divided by "
    "that of one, and each error."
)
DTYPES = ("float32", "bfloat16")
TOKENS, WIDTH, CLASSES = 2048, 256, 16384
DENSE, LINEAR = jaxent.cross_entropy, jaxent.linear_cross_entropy
CASES = {  # loss, devices by (data, model), and how logits or hidden states and kernel are split
    "cross_entropy, classes": (DENSE, (1, 8), [P(None, "model")]),
    "cross_entropy, examples": (DENSE, (8, 1), [P("data", None)]),
    "cross_entropy, both": (DENSE, (2, 4), [P("data", "model")]),
    "linear_cross_entropy, classes": (LINEAR, (1, 8), [P(None, None), P(None, "model")]),
    "linear_cross_entropy, tokens": (LINEAR, (8, 1), [P("data", None), P(None, None)]),
    "linear_cross_entropy, FSDP": (LINEAR, (8, 1), [P("data", None), P("data", None)]),
    "linear_cross_entropy, all": (LINEAR, (2, 4), [P("data", None), P("data", "model")]),
}


def draw(loss, dtype):
    """What the loss is differentiated by, and targets."""
    random = np.random.default_rng(0)
    if loss is DENSE:
        floats = [random.standard_normal((TOKENS, CLASSES), "float32")]
    else:
        kernel = random.standard_normal((WIDTH, CLASSES), "float32") / np.float32(WIDTH**0.5)
        floats = [random.standard_normal((TOKENS, WIDTH), "float32"), kernel]
    targets = random.integers(0, CLASSES, TOKENS).astype("int32")
    return [jnp.asarray(x, dtype) for x in floats], jnp.asarray(targets)


def runner(loss, floats, targets, mesh=None):
    """A function of nothing: the loss and its gradients, where the arrays are."""
    order = tuple(range(len(floats)))
    function = jax.jit(jax.value_and_grad(lambda *args: loss(*args), order))

    def run():
        if mesh is None:
            return jax.block_until_ready(function(*floats, targets))
        with jax.set_mesh(mesh):
            return jax.block_until_ready(function(*floats, targets))

    return run


def split(floats, targets, devices, specs):
    """A mesh, and the arrays on it; targets are split as the first dimension of the first."""
    mesh = jax.make_mesh(devices, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(floats, specs)]
    return mesh, arrays, jax.device_put(targets, NamedSharding(mesh, P(specs[0][0])))


def errors(one, eight):
    """In eps, by what is compared: the loss, and the gradient of each array."""
    found = {}
    names = "loss", *(f"gradient {i}" for i in range(len(one[1])))
    for name, right, x in zip(names, jax.tree.leaves(one), jax.tree.leaves(eight)):
        eps = float(jnp.finfo(right.dtype).eps)
        right, x = np.asarray(right, "float64"), np.asarray(x, "float64")
        found[name] = float(np.abs(x - right).max() / np.abs(right).max() / eps)
    return found


def measured(row, loss, devices, specs, reps):
    floats, targets = draw(loss, row.case["dtype"])
    mesh, *arrays = split(floats, targets, devices, specs)
    runs = {
        "one device": runner(loss, floats, targets),
        "8 devices": runner(loss, *arrays, mesh),
    }
    row.values = interleaved(runs, reps)
    found = outcome(lambda: errors(*(run() for run in runs.values())))
    if isinstance(found, str):
        row.notes = found
        return row
    ratio = number(row.values["8 devices"]) / number(row.values["one device"])
    each = ", ".join(f"{name} {error:.2g}" for name, error in found.items())
    row.score, row.bound = max(found.values()), 8.0
    row.notes = f"time {ratio:.2f}; {each}"
    return row


def rows(options):
    for name, (loss, devices, specs) in CASES.items():
        for dtype in DTYPES:
            case = {"split": name, "data x model": "x".join(map(str, devices)), "dtype": dtype}
            row = Row(case, {})
            if options.only in row.name:
                yield measured(row, loss, devices, specs, options.reps)
