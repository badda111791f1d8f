"""The sides of the head: its loss by each library, its derivatives, and how one is run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxent

from .exactness_sides import jax_cce, tokamax, torch

SHAPES = ((1024, 256, 131072), (2048, 512, 32768), (2048, 2048, 16384))  # tokens, width, classes
DTYPES = ("float32", "bfloat16")


def case_of(shape, dtype):
    """What the rows of a head of this shape are named by."""
    tokens, width, classes = shape
    return {"dtype": dtype, "width": width, "classes": classes, "tokens": tokens}


def naive(hidden, kernel, targets):
    logits = (hidden @ kernel).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def of_tokamax(implementation, hidden, kernel, targets):
    return tokamax.linear_softmax_cross_entropy_loss(
        hidden, targets, kernel, reduction="mean", implementation=implementation
    )


def of_jax_cce(hidden, table, targets):
    return jax_cce.linear_cross_entropy(hidden, table, targets)


def of_torch(hidden, table, targets):
    options = torch.nn.LinearCrossEntropyOptions()  # without them it is the naive form
    return torch.nn.functional.linear_cross_entropy(hidden, table, targets, options=options)


LOSSES = {
    "jaxent": jaxent.linear_cross_entropy,
    "naive": naive,
    "tokamax chunked": functools.partial(of_tokamax, "chunked_xla"),
    "tokamax xla": functools.partial(of_tokamax, "xla"),
    "jax-cce": of_jax_cce,
    "torch chunked": of_torch,
    "reference": jaxent.reference.linear_cross_entropy,
}
TAKES_TABLE = ("jax-cce", "torch chunked")  # their kernel is (C, D)
PACKAGES = {
    "tokamax chunked": tokamax,
    "tokamax xla": tokamax,
    "jax-cce": jax_cce,
    "torch chunked": torch,
}
SIDES = tuple(LOSSES)
PEERS = tuple(side for side in SIDES if side not in ("jaxent", "reference"))
INSTALLED = tuple(side for side in SIDES if PACKAGES.get(side, True))


def loss_of(side, table):
    """The loss of a kernel of this layout, transposed where the library wants the other."""
    loss = LOSSES[side]
    if side in ("jaxent", "reference"):
        return functools.partial(loss, class_axis=0 if table else -1)
    if table == (side in TAKES_TABLE):
        return loss
    return lambda hidden, kernel, targets: loss(hidden, kernel.T, targets)


def grad_of_grad(loss):
    def product(hidden, kernel, targets, *direction):
        def slope(h, k):
            gradients = jax.grad(loss, (0, 1))(h, k, targets)
            return sum(jnp.vdot(g, d) for g, d in zip(gradients, direction))

        return jax.grad(slope, (0, 1))(hidden, kernel)

    return product


def jvp_of_grad(loss):
    def product(hidden, kernel, targets, *direction):
        gradients = jax.grad(lambda h, k: loss(h, k, targets), (0, 1))
        return jax.jvp(gradients, (hidden, kernel), direction)[1]

    return product


ORDERS = {
    "gradients": functools.partial(jax.value_and_grad, argnums=(0, 1)),
    "jvp of grad": jvp_of_grad,
    "grad of grad": grad_of_grad,
}


def scratch(side, order, shape, dtype, table, sharding=None) -> float:
    """MB beyond inputs and outputs, by XLA's count; `table` says that the kernel is (C, D)."""
    tokens, width, classes = shape
    kernel = (classes, width) if table else (width, classes)
    hidden, kernel, targets = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype in (((tokens, width), dtype), (kernel, dtype), ((tokens,), "int32"))
    )
    direction = () if order == "gradients" else (hidden, kernel)
    function = jax.jit(ORDERS[order](loss_of(side, table)))
    compiled = function.lower(hidden, kernel, targets, *direction).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def draw(shape, dtype):
    """Hidden states, kernel and targets, for logits of variance 1."""
    tokens, width, classes = shape
    random = np.random.default_rng(0)
    hidden = random.standard_normal((tokens, width), "float32")
    kernel = random.standard_normal((width, classes), "float32") / np.float32(width**0.5)
    targets = random.integers(0, classes, tokens).astype("int32")
    return jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype), jnp.asarray(targets)


def runner(loss, arrays, gradients=True):
    """A function of nothing: a loss of the kernel (D, C) and, if asked for, its gradients."""
    function = jax.jit(ORDERS["gradients"](loss) if gradients else loss)
    return lambda: jax.block_until_ready(function(*arrays))


def runner_of(side, arrays, gradients=True):
    """The same of a side, which gets the kernel in the layout that it documents."""
    hidden, kernel, targets = arrays
    if side in TAKES_TABLE:
        arrays = hidden, jnp.asarray(kernel.T), targets
    if side == "torch chunked":
        return torch_runner(arrays, gradients)
    return runner(LOSSES[side], arrays, gradients)


def torch_runner(arrays, gradients):
    hidden, table, targets = arrays
    dtype = getattr(torch, str(hidden.dtype))
    leaves = [torch.tensor(np.asarray(x, "float32")).to(dtype) for x in (hidden, table)]
    leaves = [x.requires_grad_(gradients) for x in leaves]
    loss = functools.partial(of_torch, targets=torch.tensor(np.asarray(targets, "int64")))
    if not gradients:
        return lambda: loss(*leaves)
    return lambda: (value := loss(*leaves), torch.autograd.grad(value, leaves))
