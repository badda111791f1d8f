"""Class weights and label smoothing, on digits of which three are rare.

A small network learns scikit-learn's 8x8 digits from 120 images of each, but from only 4, 6
and 8 images of the digits 3, 8 and 9. It does so with and without class weights (inverse
frequency) and with and without label smoothing. Every seed draws its own images, initial
parameters and mini-batches; `nnx.vmap` trains all seeds at once. The test set is balanced, and
its loss is exact over however many devices share it. From the repository:

    python examples/digits.py
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/digits.py

prints a table and what follows from it, and draws digits.png here, or where `--out` says.

Expect weights to find more of the rare digits, and smoothing to make the overconfident network
better calibrated. Expect the two together to be the most accurate and yet to doubt themselves:
a weight multiplies its class's share of the smoothing, too (as in PyTorch), and the rarest
digit's share is 30 times that of a common one.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from matplotlib.ticker import PercentFormatter
from sklearn.datasets import load_digits
from tqdm import tqdm

import jaxent

TRAIN_COUNTS = np.array([120, 120, 120, 4, 120, 120, 120, 120, 6, 8])  # images of each digit
RARE = TRAIN_COUNTS < 100
TEST_COUNT = 50  # images of each digit
SMOOTHING = 0.02  # 0.1 would make these networks, right 9 times in 10, underconfident
BATCH = 128
SETTINGS = ("plain", "weights", "smoothing", "weights + smoothing")
GREY, BLUE, ORANGE = "#6b6b6b", "#0072b2", "#d55e00"  # apart for colour-blind eyes, too


def split_digits(seed):
    """Unbalanced training images and labels, balanced test images and labels by class."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    train, test = [], []
    for digit, count in enumerate(TRAIN_COUNTS):
        rows = order[labels[order] == digit]
        test.append(rows[:TEST_COUNT])
        train.append(rows[TEST_COUNT : TEST_COUNT + count])
    train, test = np.concatenate(train), np.concatenate(test)
    return images[train] / 16, labels[train], images[test] / 16, labels[test]


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden1 = nnx.Linear(64, 128, rngs=rngs)
        self.hidden2 = nnx.Linear(128, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images):
        return self.out(nnx.relu(self.hidden2(nnx.relu(self.hidden1(images)))))


@nnx.jit
@nnx.vmap
def create(key):
    model = Network(nnx.Rngs(key))
    return model, nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
@nnx.vmap(in_axes=(0, 0, None, 0, 0, 0))
def train_step(model, optimizer, loss, images, labels, key):
    """One seed's step on a mini-batch of its own; under vmap, a step of every seed."""
    key = jax.random.fold_in(key, optimizer.step[...])
    rows = jax.random.randint(key, (BATCH,), 0, len(labels))
    value, grads = nnx.value_and_grad(lambda model: loss(model(images[rows]), labels[rows]))(model)
    optimizer.update(model, grads)
    return value


@nnx.jit
def evaluate(model, images, labels):
    """Every seed's mean loss and probabilities, its test set split over all devices.

    Where their number does not divide the examples, ignored ones fill up the last shard:
    given `axis_name`, the mean is that of the counted examples of all shards.
    """
    devices, examples = jax.device_count(), labels.shape[1]
    images = jnp.pad(images, ((0, 0), (0, -examples % devices), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, -examples % devices)), constant_values=-100)
    graph, state = nnx.split(model)
    split = P(None, "batch")  # (seeds, examples, ...)

    @partial(
        jax.shard_map,
        mesh=Mesh(jax.devices(), ("batch",)),
        in_specs=(P(), split, split),
        out_specs=(P(), split),
    )
    @jax.vmap
    def evaluate_shard(state, images, labels):
        logits = nnx.merge(graph, state)(images)
        return jaxent.cross_entropy(logits, labels, axis_name="batch"), jax.nn.softmax(logits)

    loss, probabilities = evaluate_shard(state, images, labels)
    return loss, probabilities[:, :examples]


def run(name, loss, data, keys, steps):
    """Train a network for each key with this loss; its metrics, their first axis the seeds."""
    train_images, train_labels, test_images, test_labels = data
    model, optimizer = create(keys)
    bar = tqdm(range(steps), desc=f"{name:<19}", unit="step")
    for _ in bar:
        value = train_step(model, optimizer, loss, train_images, train_labels, keys)
        bar.set_postfix(loss=f"{value.mean():.4f}", refresh=False)

    test_loss, probabilities = map(np.asarray, evaluate(model, test_images, test_labels))
    confidence = probabilities.max(-1)  # (seeds, examples)
    correct = probabilities.argmax(-1) == np.asarray(test_labels)
    recall = correct.reshape(-1, 10, TEST_COUNT).mean(-1)
    return {
        "accuracy": correct.mean(-1),
        "rare recall": recall[:, RARE].mean(-1),
        "common recall": recall[:, ~RARE].mean(-1),
        "ECE": np.array([calibration_error(*seed) for seed in zip(confidence, correct)]),
        "test loss": test_loss,
        "recall": recall,
        "predictions": (confidence.ravel(), correct.ravel()),
    }


def by_confidence(confidence, correct, bins=10):
    """Mean confidence, accuracy and share of the predictions in each bin that has any."""
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    sums = [np.bincount(index, v, bins) for v in (np.ones(len(index)), confidence, correct)]
    count, confidence, correct = (v[sums[0] > 0] for v in sums)
    return confidence / count, correct / count, count / count.sum()


def calibration_error(confidence, correct):
    """Expected calibration error (ECE): |confidence - accuracy| of the bins, averaged."""
    confidence, accuracy, share = by_confidence(confidence, correct)
    return np.sum(share * abs(confidence - accuracy))


def change(metric, before, after):
    return f"from {before[metric].mean():.1%} to {after[metric].mean():.1%}"


def count_lifted(before, after):
    """In how many seeds the rare digits' recall rose, of how many."""
    rose = after["rare recall"] > before["rare recall"]
    return rose.sum(), rose.size


def report(plain, weights, smoothing, both):
    """Print the table, mean and standard deviation over seeds, and what follows from it."""
    percentages = ("accuracy", "rare recall", "common recall", "ECE")
    print(f"\n{'':<19}", *(f"{name:>16}" for name in (*percentages, "test loss, nats")))
    for name, result in zip(SETTINGS, (plain, weights, smoothing, both)):
        values = [100 * result[metric] for metric in percentages]
        cells = [f"{v.mean():.1f} ± {v.std():.1f} %" for v in values]
        cells.append(f"{result['test loss'].mean():.4f} ± {result['test loss'].std():.4f}")
        print(f"{name:<19}", *(f"{cell:>16}" for cell in cells))

    (k, n), (k_smooth, _) = count_lifted(plain, weights), count_lifted(smoothing, both)
    verb = "lift" if min(k, k_smooth) > n / 2 else "do not lift"
    print(
        f"\nLabel smoothing takes the calibration error {change('ECE', plain, smoothing)} without"
        f" class weights,\nand {change('ECE', weights, both)} with them."
        f"\nClass weights {verb} the rare digits' recall: in {k} of {n} seeds without smoothing,"
        f"\n{change('rare recall', plain, weights)}, and in {k_smooth} of {n} with it,"
        f" {change('rare recall', smoothing, both)}."
    )


def draw_recall(axes, plain, weights):
    """Each digit's recall without and with class weights, the rarest on top."""
    order, rows = np.argsort(TRAIN_COUNTS, kind="stable"), np.arange(10)
    before, after = (result["recall"].mean(0)[order] for result in (plain, weights))
    axes.hlines(rows, before, after, color=BLUE, lw=3, alpha=0.4)
    axes.plot(before, rows, "o", color=GREY, ms=12, mec="white")
    axes.plot(after, rows, "o", color=BLUE, ms=8, mec="white")
    sides = ("right", "left") if before[0] < after[0] else ("left", "right")
    axes.text(before[0], -0.6, "without weights", color=GREY, ha=sides[0], weight="bold")
    axes.text(after[0], -0.6, "with weights", color=BLUE, ha=sides[1], weight="bold")
    axes.set_yticks(rows, [f"{digit}  ({TRAIN_COUNTS[digit]} images)" for digit in order])
    for tick in axes.get_yticklabels()[: RARE.sum()]:
        tick.set_weight("bold")
    axes.set(ylim=(9.6, -1.3), xlim=(min(*before, *after) - 0.12, 1.02))
    axes.set_xlabel("recall of each digit (its training images)")
    k, n = count_lifted(plain, weights)
    axes.set_title(
        f"Class weights {'lift' if k > n / 2 else 'do not lift'} the rare digits' recall\n"
        f"{change('rare recall', plain, weights)}, in {k} of {n} seeds"
    )


def draw_calibration(axes, plain, weights, smoothing, both):
    """Accuracy at each confidence, over all seeds; bins of few predictions are left out."""
    axes.plot([0, 1], [0, 1], color="0.75", lw=1.5)
    for result, colour, side, label in (
        (plain, GREY, "left", "   plain labels"),
        (smoothing, ORANGE, "right", "smoothed labels   "),
    ):
        bins = by_confidence(*result["predictions"])
        confidence, accuracy, share = (values[bins[2] > 0.002] for values in bins)
        axes.plot(confidence, accuracy, color=colour, lw=2)
        axes.scatter(confidence, accuracy, 30 + 250 * share, color=colour, ec="white", zorder=2)
        x, y = (values[len(values) // 2] for values in (confidence, accuracy))
        axes.text(x, y, label, color=colour, ha=side, va="center", weight="bold")
    for x, y, label in ((0.35, 0.9, "underconfident"), (0.8, 0.34, "overconfident")):
        axes.text(x, y, label, color="0.45", ha="center", style="italic")
    note = f"with class weights, it goes\n{change('ECE', weights, both)}"
    axes.text(1.02, 0.13, note, color="0.45", ha="right")
    axes.set(xlim=(0.2, 1.03), ylim=(0.1, 1.03), ylabel="accuracy")
    axes.set_xlabel("confidence (larger dots: more predictions)")
    axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
    verb = "cuts" if smoothing["ECE"].mean() < plain["ECE"].mean() else "raises"
    axes.set_title(f"Label smoothing {verb} calibration error\n{change('ECE', plain, smoothing)}")


def draw(plain, weights, smoothing, both, path):
    plt.switch_backend("agg")
    plt.rc("axes", edgecolor="0.7", grid=True, titlelocation="left", titlepad=12)
    plt.rc("axes", titlesize=11.5, titleweight="bold")
    plt.rc("axes.spines", right=False, top=False)
    plt.rc("font", size=10.5)
    plt.rc("grid", color="0.92")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    draw_recall(left, plain, weights)
    draw_calibration(right, plain, weights, smoothing, both)
    for axes in (left, right):
        axes.tick_params(color="0.7")
        axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
    figure.savefig(path, dpi=180)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default="digits.png", help="the picture")
    args = parser.parse_args()

    data = [jnp.stack(part) for part in zip(*map(split_digits, range(args.seeds)))]
    keys = jax.random.split(jax.random.key(0), args.seeds)
    equal, inverse_frequency = jnp.ones(10), jnp.asarray(TRAIN_COUNTS.mean() / TRAIN_COUNTS)
    # Arrays are data to a loss object, so that train_step is compiled once for all four.
    losses = [
        jaxent.CrossEntropyLoss(weight=weight, label_smoothing=jnp.asarray(smoothing))
        for smoothing in (0.0, SMOOTHING)
        for weight in (equal, inverse_frequency)
    ]
    results = [run(name, loss, data, keys, args.steps) for name, loss in zip(SETTINGS, losses)]
    report(*results)
    draw(*results, args.out)
    print(f"\nThe picture is {args.out.resolve()}")


if __name__ == "__main__":
    main()
