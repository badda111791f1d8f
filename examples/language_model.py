"""A language model with GPT-4's vocabulary, trained with and without its logits.

A small causal transformer reads Python's standard library, the source of the Python that runs
it, in the 100,277 tokens of GPT-4. The embedding is tied: the same table is the classifier
head, and a batch's logits are by far the largest array of a training step. The model is trained
twice from the same parameters on the same batches: once through its logits, and once with
`jaxent.linear_cross_entropy`, which never holds them. From the repository:

    python examples/language_model.py
    python examples/language_model.py --loss linear --checkpoint checkpoints --resume

The first prints a table and what follows from it, and draws language_model.png here, or where
`--out` says, in some three minutes on two CPU cores. The second trains one model, saves it as it
goes, and continues after an interruption with the same batches, to the same parameters.

Expect the two loss curves to coincide up to rounding, and the scratch memory of a step not to.
Expect little of the model, which sees 64 batches: how frequent a token is, and what often
follows it. Its rows are packed: where one holds several files, no token attends to another
file, and the last token of a file, whose target would begin the next, is ignored.
"""

import argparse
from functools import partial
from pathlib import Path
from random import Random
from sysconfig import get_paths

import bpe_openai
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

import jaxent

TOKENIZER = bpe_openai.get_encoding("cl100k_base")
VOCABULARY = TOKENIZER.n_vocab  # 100277, the special tokens among them
END = TOKENIZER.eot_token  # <|endoftext|>, which closes every file
IGNORED = -100
WIDTH, HEADS, LAYERS = 64, 4, 2
ROWS, LENGTH = 4, 256  # of a batch
HELD_OUT_ROWS = 32
STEPS, WARMUP, PEAK = 64, 8, 1e-2
SAVE_EVERY = 10
TOLERANCE = 0.01  # nats, between the two loss curves
LONGEST_FILE = 20_000  # bytes, so that a short run reads many files
GREY, BLUE = "#6b6b6b", "#0072b2"  # apart for colour-blind eyes, too


def read_files():
    """The tokens of each file of the standard library, in an order that is always the same."""
    library = Path(get_paths()["stdlib"])
    paths = sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts)
    Random(0).shuffle(paths)
    for path in paths:
        if 0 < path.stat().st_size <= LONGEST_FILE:
            yield [*TOKENIZER.encode_ordinary(path.read_bytes().decode(errors="ignore")), END]


def pack(files, rows):
    """The next files end to end, in rows of a token more than the model reads."""
    tokens = []
    while len(tokens) < rows * (LENGTH + 1):
        tokens += next(files)
    return np.array(tokens[: rows * (LENGTH + 1)], np.int32).reshape(rows, LENGTH + 1)


def inputs_and_targets(rows):
    inputs, targets = rows[:, :-1], rows[:, 1:]
    return inputs, jnp.where(inputs == END, IGNORED, targets)


def rotate(x):
    """Rotary positions; being relative, they need not restart with a file."""
    frequencies = 10_000.0 ** -jnp.linspace(0, 1, x.shape[-1] // 2, endpoint=False)
    angles = jnp.arange(x.shape[1])[:, None, None] * frequencies  # (length, 1, features / 2)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = (nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.qkv = nnx.LinearGeneral(WIDTH, (3, HEADS, WIDTH // HEADS), rngs=rngs)
        self.mix = nnx.LinearGeneral((HEADS, WIDTH // HEADS), WIDTH, axis=(-2, -1), rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        q, k, v = jnp.moveaxis(self.qkv(self.norm1(x)), -3, 0)
        x += self.mix(jax.nn.dot_product_attention(rotate(q), rotate(k), v, mask=mask))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class LanguageModel(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(VOCABULARY, WIDTH, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):
        """Hidden states, (rows, length, width); the head is left to the loss."""
        ends = tokens == END
        file = jnp.cumsum(ends, axis=1) - ends  # its end belongs to a file
        mask = (file[:, :, None] == file[:, None, :]) & jnp.tri(tokens.shape[1], dtype=bool)
        x = self.embed(tokens) * WIDTH**0.5
        for block in self.blocks:
            x = block(x, mask[:, None])
        return self.norm(x)


def naive_loss(hidden, table, targets):
    counted = targets != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(
        hidden @ table.T, jnp.where(counted, targets, 0)
    )
    return jnp.mean(losses, where=counted)


LOSSES = {
    "naive": naive_loss,
    # In chunks it holds the least; by itself it would spend a quarter of the logits on speed.
    "linear": partial(
        jaxent.linear_cross_entropy, class_axis=0, ignore_index=IGNORED, chunk_size=2048
    ),
}


def create():
    # The schedule is that of STEPS whatever --steps says, so that a run cut short and
    # continued follows the one that never stopped.
    schedule = optax.warmup_cosine_decay_schedule(0, PEAK, WARMUP, STEPS, end_value=PEAK / 10)
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    model = LanguageModel(nnx.Rngs(0))
    return model, nnx.Optimizer(model, transform, wrt=nnx.Param)


def train_step(loss, model, optimizer, rows):
    inputs, targets = inputs_and_targets(rows)
    value, grads = nnx.value_and_grad(
        lambda model: loss(model(inputs), model.embed.embedding[...], targets)
    )(model)
    optimizer.update(model, grads)
    return value


@nnx.jit
def evaluate(model, rows):
    """Loss, accuracy and entropy, means over the tokens that are not ignored."""
    inputs, targets = inputs_and_targets(rows)
    stats = jaxent.linear_token_stats(
        model(inputs), model.embed.embedding[...], targets, class_axis=0, ignore_index=IGNORED
    )
    means = -stats.log_prob, stats.correct, stats.entropy
    return [jnp.mean(values, where=targets != IGNORED) for values in means]


def open_checkpoints(folder):
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, save_interval_steps=SAVE_EVERY, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(folder.resolve(), options=options)


def save(checkpoints, model, optimizer, losses, last):
    state = ocp.args.StandardSave(nnx.state((model, optimizer)))
    args = ocp.args.Composite(state=state, losses=ocp.args.JsonSave(losses))
    checkpoints.save(len(losses), args=args, force=last)


def restore(checkpoints, model, optimizer):
    """Set model and optimizer to the latest checkpoint, and return the losses until then."""
    state = ocp.args.StandardRestore(nnx.state((model, optimizer)))
    args = ocp.args.Composite(state=state, losses=ocp.args.JsonRestore())
    restored = checkpoints.restore(checkpoints.latest_step(), args=args)
    nnx.update((model, optimizer), restored["state"])
    return restored["losses"]


def run(name, batches, held_out, folder):
    """Train a model with this loss, from its latest checkpoint on; losses and metrics."""
    model, optimizer = create()
    losses, checkpoints = [], folder and open_checkpoints(folder / name)
    if checkpoints and checkpoints.latest_step() is not None:
        losses = restore(checkpoints, model, optimizer)
    step = nnx.jit(partial(train_step, LOSSES[name]), donate_argnums=(0, 1))
    step = step.lower(model, optimizer, batches[0]).compile()

    done, total = len(losses), len(batches)
    bar = tqdm(batches[done:], desc=name, unit="step", initial=done, total=total)
    for rows in bar:
        losses.append(float(step(model, optimizer, rows)))
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
        if checkpoints:
            save(checkpoints, model, optimizer, losses, last=len(losses) == total)
    tqdm.write(f"{name}: evaluating on held-out files")
    loss, accuracy, entropy = map(float, evaluate(model, held_out))
    return {
        "losses": np.array(losses),
        "held-out loss": loss,
        "accuracy": accuracy,
        "entropy": entropy,
        "memory": step.memory_analysis().temp_size_in_bytes,
    }


def report(results):
    """Print the table, and of both losses what follows from it."""
    columns = ("final loss", "held-out loss", "perplexity", "accuracy", "entropy", "scratch memory")
    print(f"\n{'':<7}", *(f"{column:>14}" for column in columns))
    for name, result in results.items():
        loss, accuracy, entropy = (result[k] for k in ("held-out loss", "accuracy", "entropy"))
        cells = [f"{v:.4f}" for v in (result["losses"][-1], loss, np.exp(loss))]
        cells += [f"{accuracy:.2%}", f"{entropy:.4f}", f"{result['memory'] / 1e6:.0f} MB"]
        print(f"{name:<7}", *(f"{cell:>14}" for cell in cells))
    if len(results) < 2:
        return

    naive, linear = results["naive"], results["linear"]
    difference = np.max(abs(naive["losses"] - linear["losses"]))
    logits = 4 * ROWS * LENGTH * VOCABULARY
    print(
        f"\nThe loss curves differ by at most {difference:.1e} nats in {len(linear['losses'])}"
        f" steps, of losses from {max(linear['losses']):.1f} to {min(linear['losses']):.1f}."
        f"\nA step through the logits, {logits / 1e6:.0f} MB each time they or their gradient are"
        f" held, takes {naive['memory'] / linear['memory']:.1f} times the memory."
        f"\nOn held-out files the model's entropy is {entropy:.2f} nats and its loss {loss:.2f}:"
        f" it is {'over' if entropy < loss else 'under'}confident by {abs(loss - entropy):.2f}."
    )
    if not difference <= TOLERANCE:
        raise SystemExit(f"The loss curves do not coincide, to a tolerance of {TOLERANCE} nats.")


def draw(naive, linear, path):
    plt.switch_backend("agg")
    plt.rc("axes", edgecolor="0.7", grid=True, titlelocation="left", titlepad=12)
    plt.rc("axes", titlesize=11.5, titleweight="bold", axisbelow=True)
    plt.rc("axes.spines", right=False, top=False)
    plt.rc("font", size=10.5)
    plt.rc("grid", color="0.92")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    styles = (
        ("through the logits", naive, GREY, {"lw": 7, "alpha": 0.35}),
        ("linear_cross_entropy", linear, BLUE, {"lw": 1.8}),
    )
    count, uniform = len(linear["losses"]), np.log(VOCABULARY)
    left.axhline(uniform, color="0.75", lw=1.5)
    left.text(count, uniform + 0.1, "uniform guess", color="0.45", ha="right", style="italic")
    for row, (label, result, colour, style) in enumerate(styles):
        left.plot(np.arange(1, count + 1), result["losses"], color=colour, **style)
        left.text(count, uniform - 0.5 - 0.45 * row, label, color=colour, ha="right", weight="bold")
        right.barh(row, result["memory"] / 1e6, color=colour, height=0.5)
        right.text(0, row - 0.32, label, color=colour, weight="bold")
        right.text(result["memory"] / 1e6, row, f"  {result['memory'] / 1e6:.0f} MB", va="center")
    lowest = min(linear["losses"].min() - 0.3, uniform - 1.5)  # the labels have room, too
    left.set(xlabel="step", ylabel="training loss, nats per token", ylim=(lowest, uniform + 0.6))
    difference = np.max(abs(naive["losses"] - linear["losses"]))
    digits = np.format_float_positional(difference, precision=2, fractional=False)
    left.set_title(f"The two loss curves are one\nto within {digits} nats")
    right.set(yticks=[], ylim=(1.5, -0.7), xlabel="scratch memory of a training step, MB")
    right.spines["left"].set_visible(False)
    times = f"{naive['memory'] / linear['memory']:.1f} times"
    right.set_title(f"Without the logits, a step needs\n{times} less memory")
    for axes in (left, right):
        axes.tick_params(color="0.7")
    figure.savefig(path, dpi=180)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--loss", choices=("linear", "naive", "both"), default="both")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="save the training here")
    parser.add_argument("--resume", action="store_true", help="continue from --checkpoint")
    parser.add_argument(
        "--out", type=Path, default="language_model.png", help="the picture, of both losses"
    )
    args = parser.parse_args()
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint")
    names = list(LOSSES) if args.loss == "both" else [args.loss]
    folders = [args.checkpoint / name for name in names] if args.checkpoint else []
    if any(folder.exists() for folder in folders) and not args.resume:
        parser.error(f"{args.checkpoint} has checkpoints: continue them with --resume")

    files = read_files()
    held_out, rows = pack(files, HELD_OUT_ROWS), pack(files, STEPS * ROWS)
    # A shuffle, or a batch would be of one file or two; every STEPS batches are an epoch.
    epoch = np.random.default_rng(0).permutation(rows).reshape(STEPS, ROWS, -1)
    batches = [epoch[step % STEPS] for step in range(args.steps)]
    results = {name: run(name, batches, held_out, args.checkpoint) for name in names}
    report(results)
    if args.loss == "both":
        draw(**results, path=args.out)
        print(f"\nThe picture is {args.out.resolve()}")


if __name__ == "__main__":
    main()
