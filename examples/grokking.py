"""Softmax collapse: a network that float32 stops training, and one that it does not.

A two-layer network learns addition modulo 53 from half of all pairs, with Adam and no weight decay.
It soon fits them, and then only its logits grow. In float32, a loss on logits is exactly 0 from a
gap of about 17 on, and so is the gradient of the target: the rows leave the training one by one
(Prieto et al., "Grokking at the Edge of Numerical Stability", 2025). jaxent's loss adds the
largest class's 1 to nothing, and keeps the digits of the rest. Both train the same network here,
and optax's a third time in float64. From the repository:

    python examples/grokking.py

prints a table, and draws grokking.png here, or where `--out` says, in about two minutes.

Expect optax's loss to reach 0, with no gradient in a third of the rows, and jaxent's to follow
float64. Test accuracy is printed too, and is 0 in all three: rows that are nearly certain train on,
but that alone does not make this network generalize.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

import jaxent

MODULUS, WIDTH, RATE = 53, 128, 0.05
EVERY = 500  # steps between two looks


def all_pairs(seed):
    """Both numbers of each pair as one-hot vectors, and their sums; shuffled."""
    a, b = np.divmod(np.random.default_rng(seed).permutation(MODULUS**2), MODULUS)
    return np.concatenate([np.eye(MODULUS)[a], np.eye(MODULUS)[b]], 1), (a + b) % MODULUS


def initial_parameters(seed, dtype):
    random = np.random.default_rng(seed)

    def layer(rows, columns):
        return jnp.asarray(random.normal(size=(rows, columns)) / rows**0.5, dtype)

    return {"first": layer(2 * MODULUS, WIDTH), "second": layer(WIDTH, MODULUS)}


def logits_of(parameters, x):
    return jax.nn.relu(x @ parameters["first"]) @ parameters["second"]


def optax_loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(loss, dtype, steps, seed):
    """Loss, share of rows whose target has no gradient and test accuracy, at every look."""
    x, y = all_pairs(seed)
    x, y = jnp.asarray(x, dtype), jnp.asarray(y, jnp.int32)
    half = len(y) // 2
    optimizer = optax.adam(RATE)

    def step(state, _):
        parameters, moments = state
        gradients = jax.grad(lambda p: loss(logits_of(p, x[:half]), y[:half]))(parameters)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(parameters, updates), moments), None

    @partial(jax.jit, donate_argnums=0)
    def some_steps(state):
        return jax.lax.scan(step, state, length=EVERY)[0]

    @jax.jit
    def look(parameters):
        logits = logits_of(parameters, x)
        value, gradient = jax.value_and_grad(loss)(logits[:half], y[:half])
        of_target = jnp.take_along_axis(gradient, y[:half, None], 1)
        right = logits[half:].argmax(1) == y[half:]
        return value, (of_target == 0).mean(), right.mean()

    parameters = initial_parameters(seed, dtype)
    state = parameters, optimizer.init(parameters)
    looks = []
    for _ in tqdm(range(steps // EVERY), leave=False):
        state = some_steps(state)
        looks.append([float(x) for x in look(state[0])])
    return np.array(looks)


def draw(results, steps, path):
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(6, 5), layout="constrained")
    styles = {"optax": ("#d55e00", "-"), "jaxent": ("#0072b2", "-"), "float64": ("#6b6b6b", ":")}
    at = np.arange(1, steps // EVERY + 1) * EVERY
    for name, looks in results.items():
        colour, line = styles[name]
        loss = np.where(looks[:, 0] > 0, looks[:, 0], np.nan)  # 0 is not on a logarithmic axis
        above.plot(at, loss, line, color=colour, label=name, linewidth=2)
        below.plot(at, looks[:, 1], line, color=colour, linewidth=2)
    above.set(yscale="log", ylabel="training loss")
    above.legend(frameon=False)
    below.set(xlabel="step", ylabel="rows whose target\nhas no gradient", ylim=(-0.05, 1.05))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default="grokking.png", help="the picture")
    options = parser.parse_args()
    steps = max(1, options.steps // EVERY) * EVERY
    run = partial(train, steps=steps, seed=options.seed)
    results = {
        "optax": run(optax_loss, jnp.float32),
        "jaxent": run(jaxent.cross_entropy, jnp.float32),
    }
    with jax.enable_x64(True):
        results["float64"] = run(optax_loss, jnp.float64)
    print("| loss | training loss | rows whose target has no gradient | test accuracy |")
    print("| --- | --- | --- | --- |")
    for name, looks in results.items():
        loss, lost, accuracy = looks[-1]
        print(f"| {name} | {loss:.2g} | {lost:.0%} | {accuracy:.0%} |")
    draw(results, steps, options.out)
    print(f"\nThe picture is {options.out.resolve()}")


if __name__ == "__main__":
    main()
