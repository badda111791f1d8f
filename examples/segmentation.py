"""Segmentation with a void label: pixels that have no target, as in Pascal VOC.

Three of scikit-learn's handwritten digits are enlarged and placed at random in each noisy scene of
32x32 pixels. The target of a pixel is its digit, or 10 for the background, and is 255 (void) in a
digit's blurred edge, where one cannot say: uint8 (N, H, W), next to logits (N, C, H, W). A small
U-Net learns from 1500 scenes with void pixels ignored, and with void pixels taken for background,
as one does without `ignore_index`; each without and with class weights, of which the background's
is 0.3. It is tested on digits that it never saw, at the pixels that are not void: all sums over
batches are exact, however many void pixels each has. From the repository:

    python examples/segmentation.py

prints a table and what follows from it, and draws segmentation.png here, or where `--out` says.

EXPECT
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.colors import ListedColormap
from matplotlib.ticker import PercentFormatter
from scipy.ndimage import zoom
from sklearn.datasets import load_digits
from tqdm import tqdm

import jaxent

SIZE, CELL = 32, 16  # pixels; a scene has 2x2 cells, and three of them have a digit
BACKGROUND, VOID, CLASSES = 10, 255, 11
FAINT, CLEAR = 0.25, 0.6  # less ink is background, more is the digit, and between them is void
NOISE = 0.2  # standard deviation; full ink is 1
BATCH, FEW_STEPS = 16, 150
WEIGHT = np.array([1.0] * BACKGROUND + [0.3], np.float32)
SETTINGS = (
    "void as background",
    "void as background, weights",
    "void ignored",
    "void ignored, weights",
)
GREY, BLUE, ORANGE = "#6b6b6b", "#0072b2", "#d55e00"  # apart for colour-blind eyes, too
PALETTE = "#332288 #e69f00 #44aa99 #cc3311 #88ccee #882255 #117733 #ee99aa #0077bb #aaaa00".split()
PAPER, VOID_COLOUR = "#f1f1f1", "#8a8a8a"


def compose(random, digits, labels, count):
    """Noisy scenes (N, H, W) of three digits each, and their targets, uint8 (N, H, W)."""
    ink = np.zeros((count, SIZE, SIZE), np.float32)
    targets = np.full(ink.shape, BACKGROUND, np.uint8)
    for scene, target in zip(ink, targets):
        for cell in random.permutation(4)[:3]:
            which, size = random.integers(len(labels)), random.integers(12, CELL + 1)
            y, x = CELL * np.array(divmod(cell, 2)) + random.integers(0, CELL - size + 1, 2)
            place = slice(y, y + size), slice(x, x + size)
            scene[place] = zoom(digits[which], size / 8, order=1, mode="nearest", grid_mode=True)
            target[place][scene[place] > CLEAR] = labels[which]
    targets[(ink > FAINT) & (ink <= CLEAR)] = VOID
    return ink + NOISE * random.normal(size=ink.shape).astype(np.float32), targets


def load_scenes(seed):
    """Scenes and targets for training and for the test, which share no digit."""
    digits, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    digits, labels = digits[order].reshape(-1, 8, 8) / 16, labels[order]
    train = compose(random, digits[:1200], labels[:1200], 1500)
    return train, compose(random, digits[1200:], labels[1200:], 256)


class Block(nnx.Module):
    def __init__(self, channels, features, size, strides, rngs):
        kernel = (size, size)
        self.conv = nnx.Conv(channels, features, kernel, strides, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


def enlarge(x):
    """Twice the height and width, from a quarter of the channels."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height, width, 2, 2, channels // 4).swapaxes(2, 3)
    return x.reshape(n, 2 * height, 2 * width, channels // 4)


class Network(nnx.Module):
    """A U-Net: a half, a quarter and an eighth of the resolution, and back."""

    def __init__(self, rngs):
        self.half = Block(1, 32, 4, 2, rngs)
        self.quarter = nnx.Sequential(Block(32, 64, 3, 2, rngs), Block(64, 64, 3, 1, rngs))
        self.eighth = nnx.Sequential(Block(64, 128, 3, 2, rngs), Block(128, 128, 3, 1, rngs))
        self.to_quarter = nnx.Linear(128, 4 * 64, rngs=rngs)
        self.mixed = Block(64, 64, 3, 1, rngs)
        self.to_half = nnx.Linear(64, 4 * 32, rngs=rngs)
        self.last = Block(32, 32, 3, 1, rngs)
        self.out = nnx.Conv(32, 4 * CLASSES, (3, 3), rngs=rngs)

    def __call__(self, images):
        half = self.half(images[..., None])
        quarter = self.quarter(half)
        quarter = self.mixed(quarter + enlarge(self.to_quarter(self.eighth(quarter))))
        logits = enlarge(self.out(self.last(half + enlarge(self.to_half(quarter)))))
        return jnp.moveaxis(logits, -1, 1)  # (N, C, H, W), as in PyTorch


@nnx.jit
def train_step(model, optimizer, images, targets, weight, key):
    rows = jax.random.randint(
        jax.random.fold_in(key, optimizer.step[...]), (BATCH,), 0, len(images)
    )

    def loss_of(model):
        logits = model(images[rows])
        return jaxent.cross_entropy(logits, targets[rows], ignore_index=VOID, weight=weight)

    value, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return value


@nnx.jit
def evaluate(model, images, targets):
    """Pixels of each class by what they are taken for, loss and accuracy, and the predictions."""
    logits = model(images)
    predictions = logits.argmax(1)
    # Void is outside of the table, and so is dropped.
    counts = jnp.zeros((CLASSES, CLASSES), jnp.int32).at[targets, predictions].add(1, mode="drop")
    sums = jaxent.metrics.TokenSums.from_logits(logits, targets, ignore_index=VOID)
    return counts, sums, predictions


def run(name, transform, train, test, weight, steps, seed):
    """Train a network and return its metrics over all test scenes."""
    model, key = Network(nnx.Rngs(seed)), jax.random.key(seed)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    bar = tqdm(range(steps), desc=f"{name:<27}", unit="step")
    for _ in bar:
        value = train_step(model, optimizer, *train, weight, key)
        bar.set_postfix(loss=f"{value:.4f}", refresh=False)

    model.eval()
    batches = zip(*(np.split(part, 4) for part in test))
    counts, sums, predictions = zip(*(evaluate(model, *batch) for batch in batches))
    counts = sum(np.asarray(count, np.int64) for count in counts)
    sums = jax.device_get(sum(sums, jaxent.metrics.TokenSums.empty()))
    assert sums.count == counts.sum() == (test[1] != VOID).sum()
    both = counts.diagonal()
    return {
        "mIoU": np.mean(both / np.maximum(counts.sum(0) + counts.sum(1) - both, 1)),
        "accuracy": sums.accuracy,
        "lost ink": counts[:BACKGROUND, BACKGROUND].sum() / counts[:BACKGROUND].sum(),
        "false ink": counts[BACKGROUND, :BACKGROUND].sum() / counts[BACKGROUND].sum(),
        "loss": sums.loss,
        "predictions": predictions[0],
    }


def change(metric, before, after):
    return f"from {before[metric]:.1%} to {after[metric]:.1%}"


def verb(before, after):
    return "lifts" if after["mIoU"] > before["mIoU"] else "lowers"


def report(results, steps):
    """Print the table and what follows from it."""
    percentages = ("mIoU", "accuracy", "lost ink", "false ink")
    print(f"\n{'':<27}", *(f"{name:>10}" for name in (*percentages, "loss, nats")))
    for name, result in zip(SETTINGS, results):
        cells = [f"{result[metric]:.1%}" for metric in percentages] + [f"{result['loss']:.4f}"]
        print(f"{name:<27}", *(f"{cell:>10}" for cell in cells))
    filled, filled_weights, ignored, ignored_weights = results
    print(
        "\nLost ink is pixels of digits taken for background, and false ink the reverse."
        f"\nIgnoring void {verb(filled, ignored)} the mIoU {change('mIoU', filled, ignored)} without"
        f" weights,\nand {verb(filled_weights, ignored_weights)} it"
        f" {change('mIoU', filled_weights, ignored_weights)} with them."
        f"\nIt takes the lost ink {change('lost ink', filled, ignored)} without weights,"
        f"\nand {change('lost ink', filled_weights, ignored_weights)} with them."
    )
    if steps < FEW_STEPS:
        print(f"In {steps} steps the networks learn little, and the numbers mean as little.")


def draw_legend(axes):
    """A square of its colour for each class, and for void."""
    names = [*map(str, range(BACKGROUND)), "background", "void"]
    for x, (name, colour) in enumerate(zip(names, [*PALETTE, PAPER, VOID_COLOUR])):
        x += 2.2 * (x > BACKGROUND)
        axes.add_patch(plt.Rectangle((x, 0), 0.45, 1, fc=colour, ec="0.7", lw=0.6))
        axes.text(x + 0.58, 0.47, name, va="center")
    axes.set(xlim=(0, 14.6), ylim=(-0.2, 1.2))
    axes.axis("off")


def draw_scores(axes, results):
    """The mIoU of each setting: a row for each way with void, a colour for weights."""
    for y, (plain, weights) in enumerate((results[2:], results[:2])):
        pair = [100 * plain["mIoU"], 100 * weights["mIoU"]]
        axes.plot(pair, [y, y], color=BLUE, lw=3, alpha=0.4, zorder=1)
        for x, colour, name in zip(pair, (GREY, BLUE), ("no weights", "class weights")):
            axes.plot(x, y, "o", color=colour, ms=10, mec="white")
            side = "left" if x == max(pair) else "right"
            label = f"  {name} {x:.1f}%  "
            axes.text(x, y, label, color=colour, ha=side, va="center", weight="bold")
    axes.set_yticks([0, 1], ["void ignored", "void as background"])
    scores = [100 * result["mIoU"] for result in results]
    margin = 0.5 * (max(scores) - min(scores)) + 1
    axes.set(ylim=(1.6, -0.6), xlim=(min(scores) - margin, max(scores) + margin))
    axes.xaxis.set_major_formatter(PercentFormatter(100, 0))
    axes.set_xlabel("mean intersection over union (mIoU) of the 11 classes, void pixels left out")
    axes.spines[["right", "top"]].set_visible(False)
    axes.grid(axis="x", color="0.92")


def draw(test, results, steps, path):
    plt.switch_backend("agg")
    plt.rc("font", size=10.5)
    plt.rc("axes", edgecolor="0.7", axisbelow=True)
    figure = plt.figure(figsize=(9.6, 6.9), layout="constrained")
    maps, strip, chart = figure.subfigures(3, 1, height_ratios=(4.4, 0.4, 1.7))
    colours = ListedColormap([*PALETTE, PAPER, VOID_COLOUR])
    images, targets = test
    shown = [np.where(targets == VOID, BACKGROUND + 1, targets)]
    shown += [results[index]["predictions"] for index in (0, 2, 3)]
    titles = ("image", "target", *(SETTINGS[index].replace(", ", ",\n") for index in (0, 2, 3)))
    for row, axes in enumerate(maps.subplots(2, 5)):
        axes[0].imshow(images[row], cmap="gray_r", vmin=-0.4, vmax=1.2)
        for ax, classes in zip(axes[1:], shown):
            ax.imshow(classes[row], cmap=colours, vmin=0, vmax=CLASSES, interpolation="nearest")
        for ax, title in zip(axes, titles):
            ax.set(xticks=[], yticks=[])
            if row == 0:
                ax.set_title(title, fontsize=10.5)
    draw_legend(strip.subplots())
    draw_scores(chart.subplots(), results)
    before, after = results[0], results[2]
    few = f", in only {steps} steps" if steps < FEW_STEPS else ""
    figure.suptitle(
        f"Ignoring void pixels {verb(before, after)} mIoU {change('mIoU', before, after)}{few}:\n"
        f"the ink taken for background goes {change('lost ink', before, after)}",
        x=0.01,
        ha="left",
        weight="bold",
        fontsize=12,
    )
    figure.savefig(path, dpi=160)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default="segmentation.png", help="the picture")
    args = parser.parse_args()

    (images, targets), test = load_scenes(args.seed)
    filled = np.where(targets == VOID, np.uint8(BACKGROUND), targets)
    transform = optax.adam(optax.cosine_decay_schedule(1e-2, args.steps))
    results = []
    for index, name in enumerate(SETTINGS):
        train = jnp.asarray(images), jnp.asarray(filled if index < 2 else targets)
        weight = jnp.asarray(WEIGHT if index % 2 else np.ones_like(WEIGHT))
        results.append(run(name, transform, train, test, weight, args.steps, args.seed))
    report(results, args.steps)
    draw(test, results, args.steps, args.out)
    print(f"\nThe picture is {args.out.resolve()}")


if __name__ == "__main__":
    main()
