"""The head and the loss in one: time, memory and error of jaxent and of others, as tables.

    python benchmarks/linear.py [speed | memory | error] [--reps 5] [--only TEXT]

Every number comes from running or compiling the code here; `--only` keeps the rows whose name
contains TEXT. Shapes are (tokens, width, classes). Each library gets the kernel in the layout
it documents, unless the caption says otherwise. One that is not installed leaves its column
empty, one that fails the name of its exception.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # where all of them run

import argparse
import functools
import importlib
import importlib.metadata
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import targets as accelerators
from tables import header, line

import jaxent

SHAPES = ((2048, 512, 32768), (1024, 256, 131072), (2048, 2048, 16384))
DTYPES = ("float32", "bfloat16")
ERROR_SHAPE = (512, 256, 32768)
HEADS = {  # shape, and whether the kernel is a table, (C, D)
    "Gemma 2 2B": ((8192, 2304, 256000), False),
    "the same, kernel (C, D)": ((8192, 2304, 256000), True),
    "the same, 255989 classes": ((8192, 2304, 255989), False),
    "Llama 3 8B": ((8192, 4096, 128256), False),
}


def find(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


tokamax, jax_cce, torch = map(find, ("tokamax", "jax_cce", "torch"))


def naive(hidden, kernel, targets):
    logits = (hidden @ kernel).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def tokamax_chunked(hidden, kernel, targets):
    return tokamax.linear_softmax_cross_entropy_loss(
        hidden, targets, kernel, reduction="mean", implementation="chunked_xla"
    )


def cce(hidden, table, targets):
    return jax_cce.linear_cross_entropy(hidden, table, targets)


def pytorch(hidden, table, targets):
    options = torch.nn.LinearCrossEntropyOptions()  # without them it is the naive form
    return torch.nn.functional.linear_cross_entropy(hidden, table, targets, options=options)


LOSSES = {
    "naive": naive,
    "jaxent": jaxent.linear_cross_entropy,
    "tokamax chunked": tokamax_chunked,
    "jax-cce": cce,
    "PyTorch": pytorch,
}
TAKES_TABLE = ("jax-cce", "PyTorch")
NAMES = tuple(LOSSES)
JAX_NAMES = NAMES[:-1]  # PyTorch does not count its memory on a CPU
OPTIONAL = {"tokamax chunked": tokamax, "jax-cce": jax_cce, "PyTorch": torch}
MISSING = [name for name, module in OPTIONAL.items() if module is None]


def loss_of(name, table):
    """The loss of a kernel of this layout, transposed where the library wants the other."""
    loss = LOSSES[name]
    if name == "jaxent":
        return functools.partial(loss, class_axis=0 if table else -1)
    if table == (name in TAKES_TABLE):
        return loss
    return lambda hidden, kernel, targets: loss(hidden, kernel.T, targets)


def jvp_of_grad(loss):
    def product(hidden, kernel, targets, *direction):
        gradients = jax.grad(lambda h, k: loss(h, k, targets), (0, 1))
        return jax.jvp(gradients, (hidden, kernel), direction)[1]

    return product


def grad_of_grad(loss):
    def product(hidden, kernel, targets, *direction):
        def slope(h, k):
            gradients = jax.grad(loss, (0, 1))(h, k, targets)
            return sum(jnp.vdot(g, d) for g, d in zip(gradients, direction))

        return jax.grad(slope, (0, 1))(hidden, kernel)

    return product


ORDERS = {
    "gradients": functools.partial(jax.value_and_grad, argnums=(0, 1)),
    "`jvp` of `grad`": jvp_of_grad,
    "`grad` of `grad`": grad_of_grad,
}


def scratch(name, order, shape, dtype, table, sharding=None) -> float:
    """MB beyond inputs and outputs, by XLA's count."""
    tokens, width, classes = shape
    kernel = (classes, width) if table else (width, classes)
    hidden, kernel, targets = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype in (((tokens, width), dtype), (kernel, dtype), ((tokens,), "int32"))
    )
    direction = () if order == "gradients" else (hidden, kernel)
    function = jax.jit(ORDERS[order](loss_of(name, table)))
    compiled = function.lower(hidden, kernel, targets, *direction).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def draw(shape):
    """Hidden states, kernel and targets, for logits of variance 1."""
    tokens, width, classes = shape
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((tokens, width), "float32")
    kernel = rng.standard_normal((width, classes), "float32") / np.float32(width**0.5)
    return hidden, kernel, rng.integers(0, classes, tokens)


def runner(name, arrays, dtype, gradients=True):
    """A function of nothing: the loss and, in the library's layout, its gradients."""
    hidden, kernel, targets = arrays
    kernel = np.ascontiguousarray(kernel.T) if name in TAKES_TABLE else kernel
    if name == "PyTorch":
        floats = [torch.tensor(x).to(getattr(torch, dtype)) for x in (hidden, kernel)]
        leaves = [x.requires_grad_() for x in floats]
        loss = functools.partial(pytorch, targets=torch.tensor(targets))
        return lambda: (value := loss(*leaves), torch.autograd.grad(value, leaves))
    function = jax.jit(ORDERS["gradients"](LOSSES[name]) if gradients else LOSSES[name])
    arguments = jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype), jnp.asarray(targets)
    return lambda: jax.block_until_ready(function(*arguments))


def outcome(function, *arguments):
    """Its result, or the name of its exception."""
    try:
        return function(*arguments)
    except Exception as error:
        return type(error).__name__


def times(runs, reps):
    """Naive's seconds, and each other's ratio to them: medians, the runs interleaved."""
    first = {name: outcome(run) for name, run in runs.items()}  # compiles
    seconds = {name: [] for name in runs if not isinstance(first[name], str)}
    for _, name in itertools.product(range(reps), seconds):
        start = time.perf_counter()
        runs[name]()
        seconds[name].append(time.perf_counter() - start)
    ratios = {
        name: statistics.median(mine / naive for mine, naive in zip(own, seconds["naive"]))
        for name, own in seconds.items()
    }
    return first | ratios | {"naive": statistics.median(seconds["naive"])}


def footer():
    print(f"\nNot installed: {', '.join(MISSING)}.\n" if MISSING else "")


def installed(names):
    return [name for name in names if name not in MISSING]


def written(row, names, form):
    values = [row.get(name, "") for name in names]
    return [value if isinstance(value, str) else format(value, form) for value in values]


def speed(reps, only):
    caption = "Loss and gradients on the CPU: naive's time, and each other's divided by it."
    header(caption, "shape", "dtype", *NAMES, "jaxent, the loss alone")
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        if only in f"{shape} {dtype}":
            arrays = draw(shape)
            row = times({name: runner(name, arrays, dtype) for name in installed(NAMES)}, reps)
            forward = {name: runner(name, arrays, dtype, False) for name in ("naive", "jaxent")}
            row["forward"] = times(forward, reps)["jaxent"]
            ratios = written(row, (*NAMES[1:], "forward"), ".2f")
            line(shape, dtype, f"{1000 * row['naive']:.0f} ms", *ratios)
    footer()


def memory(only):
    caption = "Scratch memory on the CPU: MB beyond inputs and outputs."
    header(caption, "shape", "dtype", "of", *JAX_NAMES, "jaxent of naive")
    for shape, dtype, order in itertools.product(SHAPES, DTYPES, ORDERS):
        if only in f"{shape} {dtype} {order}":
            row = {
                name: outcome(scratch, name, order, shape, dtype, name in TAKES_TABLE)
                for name in installed(JAX_NAMES)
            }
            share = outcome(lambda row: f"{row['jaxent'] / row['naive']:.1%}", row)
            line(shape, dtype, order, *written(row, JAX_NAMES, ".0f"), share)
    footer()
    caption = "The same of the gradients, bfloat16, compiled ahead of time; kernels are (D, C)."
    header(caption, "head", "device", *JAX_NAMES)
    without = []
    for device in accelerators.NAMES:
        sharding = outcome(accelerators.sharding, device)
        if isinstance(sharding, str):
            without.append(f"\n{device}: {sharding}; it needs {accelerators.needs(device)}.")
            continue
        for head, (shape, table) in HEADS.items():
            if only in f"{head} {device}":
                row = {
                    name: outcome(scratch, name, "gradients", shape, "bfloat16", table, sharding)
                    for name in installed(JAX_NAMES)
                }
                line(head, device, *written(row, JAX_NAMES, ".0f"))
    print("\n".join(without))
    footer()


def exact(hidden, kernel, targets):
    """The mean loss and its gradients in float64, by their formulas."""
    hidden, kernel = np.asarray(hidden, "float64"), np.asarray(kernel, "float64")
    logits, rows = hidden @ kernel, np.arange(len(hidden))
    logits -= logits.max(-1, keepdims=True)
    p = np.exp(logits)
    loss = np.mean(np.log(p.sum(-1)) - logits[rows, targets])
    p /= p.sum(-1, keepdims=True)
    p[rows, targets] -= 1
    return loss, p @ kernel.T / len(hidden), hidden.T @ p / len(hidden)


def errors(name, arrays, dtype, right):
    loss, (hidden, kernel) = runner(name, arrays, dtype)()
    found = loss, hidden, kernel.T if name in TAKES_TABLE else kernel
    if name == "PyTorch":
        found = [x.detach().double() for x in found]
    scales = max(1, right[0]), *(np.abs(gradient).max() for gradient in right[1:])
    return [np.abs(np.asarray(f, "float64") - r).max() / s for f, r, s in zip(found, right, scales)]


def error(only):
    caption = f"Largest error against float64 on the same inputs, {ERROR_SHAPE}, relative."
    header(caption, "dtype", "of", *NAMES)
    for dtype in (dtype for dtype in DTYPES if only in dtype):
        *floats, targets = draw(ERROR_SHAPE)
        arrays = *(np.asarray(jnp.asarray(x, dtype), "float32") for x in floats), targets
        right = exact(*arrays)
        rows = {name: outcome(errors, name, arrays, dtype, right) for name in installed(NAMES)}
        for i, of in enumerate(("mean loss", "gradient of hidden", "gradient of kernel")):
            row = {name: x if isinstance(x, str) else x[i] for name, x in rows.items()}
            line(dtype, of, *written(row, NAMES, ".0e"))
    footer()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", nargs="?", choices=("speed", "memory", "error"))
    parser.add_argument("--reps", type=int, default=5, help="of the timings")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    packages = ["jax", "optax", *(p for p in ("tokamax", "jax_cce", "torch") if find(p))]
    print(f"With {', '.join(f'{p} {importlib.metadata.version(p)}' for p in packages)}.\n")
    tables = {"speed": functools.partial(speed, arguments.reps), "memory": memory, "error": error}
    for name in [arguments.table] if arguments.table else tables:
        tables[name](arguments.only)


if __name__ == "__main__":
    main()
