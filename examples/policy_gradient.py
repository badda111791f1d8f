"""A policy gradient with illegal moves.

A small network learns tic-tac-toe by REINFORCE against an opponent that wins where it can, else
blocks where it can, else moves at random. The network moves first in half of the games, and its
reward is 1 for a win, 0 otherwise. Three ways to treat illegal moves start from the same seeds:

* `class_mask` leaves them out, of the policy that moves and of its loss;
* `class_mask` leaves them out of the policy that moves, but the loss forgets it;
* nothing is masked, and an illegal move loses the game.

`nnx.vmap` trains all ways and seeds at once, on thousands of games a step. From the repository:

    python examples/policy_gradient.py

prints a table, and draws policy_gradient.png here, or where `--out` says.

Expect the masked network to win half of its games after about half as many steps as the one that
pays for illegal moves. In the end both win about 60%. A loss that forgets the mask is that of a
policy which does not move: expect it to win fewer than a third of its games in the end.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.ticker import PercentFormatter
from tqdm import tqdm

import jaxent

GAMES = 512  # of each way and seed, at each step
SEEDS = 4
ENTROPY_BONUS = 0.05
LAST = 20  # steps at the end, of which the table has the mean
ROWS = np.arange(9).reshape(3, 3)
LINES = [*ROWS, *ROWS.T, np.diag(ROWS), np.diag(ROWS[:, ::-1])]
LINES = np.array([np.isin(np.arange(9), line) for line in LINES], np.int32)  # (lines, squares)
GREY, BLUE, ORANGE = "#6b6b6b", "#0072b2", "#d55e00"  # apart for colour-blind eyes, too
WAYS = {"masked": BLUE, "only moves masked": ORANGE, "illegal move loses": GREY}
MASK_MOVES, MASK_LOSS = np.array([True, True, False]), np.array([True, False, False])


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden1 = nnx.Linear(18, 64, rngs=rngs)
        self.hidden2 = nnx.Linear(64, 64, rngs=rngs)
        self.out = nnx.Linear(64, 9, rngs=rngs, kernel_init=nnx.initializers.zeros)

    def __call__(self, boards):
        """The logits of moves to the 9 squares; boards have 1 for own marks, -1 for others."""
        squares = jnp.concatenate([boards == 1, boards == -1], -1).astype(jnp.float32)
        return self.out(nnx.relu(self.hidden2(nnx.relu(self.hidden1(squares)))))


def place(boards, moves, player, where):
    return jnp.where(jax.nn.one_hot(moves, 9, dtype=bool) & where[:, None], player, boards)


def opponent_moves(boards, key):
    lines = boards @ LINES.T  # -2 where the opponent lacks one square, 2 where the network does
    urgency = 200.0 * ((lines == -2) @ LINES > 0) + 100.0 * ((lines == 2) @ LINES > 0)
    return jax.random.categorical(key, jaxent.log_softmax(urgency, class_mask=boards == 0))


def play(model, key, mask_moves):
    """Boards and moves (-100 after the end) of 5 turns; whether games were won, were illegal."""
    key, start_key = jax.random.split(key)
    boards = jnp.zeros((GAMES, 9), jnp.int32)
    boards = place(boards, opponent_moves(boards, start_key), -1, jnp.arange(GAMES) >= GAMES // 2)

    def take_turn(state, keys):
        boards, running, won, illegal = state
        legal = boards == 0
        log_probs = jaxent.log_softmax(model(boards), class_mask=legal | ~mask_moves)
        moves = jax.random.categorical(keys[0], log_probs)
        turn = boards, jnp.where(running, moves, -100)
        is_legal = jnp.take_along_axis(legal, moves[:, None], 1)[:, 0]
        illegal |= running & ~is_legal
        running &= is_legal
        boards = place(boards, moves, 1, running)
        won |= running & jnp.any(boards @ LINES.T == 3, -1)
        running &= ~won & jnp.any(boards == 0, -1)
        boards = place(boards, opponent_moves(boards, keys[1]), -1, running)
        running &= jnp.all(boards @ LINES.T > -3, -1) & jnp.any(boards == 0, -1)
        return (boards, running, won, illegal), turn

    no = jnp.zeros(GAMES, bool)
    state, turns = jax.lax.scan(take_turn, (boards, ~no, no, no), jax.random.split(key, (5, 2)))
    return *turns, *state[2:]


@nnx.jit
@nnx.vmap
def create(key):
    model = Network(nnx.Rngs(key))
    return model, nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
@nnx.vmap
def train_step(model, optimizer, key, mask_moves, mask_loss):
    """One step of one way and seed; under vmap, of all of them."""
    key = jax.random.fold_in(key, optimizer.step[...])
    boards, moves, won, illegal = play(model, key, mask_moves)
    reward = won.reshape(2, -1).astype(jnp.float32)  # moving first, moving second
    advantage = (reward - reward.mean(1, keepdims=True)).ravel()

    def objective(model):
        logits, mask = model(boards), (boards == 0) | ~mask_loss
        # Advantages add up to about 0, so a mean, which divides by that sum, would be no use.
        policy_loss = jaxent.cross_entropy(
            logits, moves, sample_weight=advantage[None], class_mask=mask, reduction="sum"
        )
        # A move of advantage 0 is not counted in that loss, but its entropy is here.
        stats = jaxent.token_stats(logits, moves, class_mask=mask)
        return (policy_loss - ENTROPY_BONUS * stats.entropy.sum()) / GAMES, stats

    grads, stats = nnx.grad(objective, has_aux=True)(model)
    optimizer.update(model, grads)
    count = stats.counted.sum()
    return won.mean(), illegal.sum() / count, stats.entropy.sum() / count


def train(key, steps):
    """Shares of games won and of illegal moves, and entropy; each (steps, ways, seeds)."""
    keys = jnp.tile(jax.random.split(key, SEEDS), len(WAYS))
    masks = [jnp.repeat(mask, SEEDS) for mask in (MASK_MOVES, MASK_LOSS)]
    model, optimizer = create(keys)
    history = []
    bar = tqdm(range(steps), unit="step")
    for _ in bar:
        history.append(np.stack(train_step(model, optimizer, keys, *masks)))
        wins = history[-1][0].reshape(len(WAYS), -1).mean(1)
        bar.set_postfix_str("won " + ", ".join(f"{share:.0%}" for share in wins), refresh=False)
    return np.moveaxis(np.stack(history), 1, 0).reshape(3, steps, len(WAYS), SEEDS)


def smooth(values, width=10):
    """The mean of the last `width` steps, or of fewer at the start."""
    ends = range(1, len(values) + 1)
    return np.stack([values[max(0, end - width) : end].mean(0) for end in ends])


def steps_to_half(wins):
    """The step at which each way and seed wins half of its games, infinity if it never does."""
    enough = smooth(wins) >= 0.5
    return np.where(enough.any(0), enough.argmax(0) + 1.0, np.inf)


def report(wins, illegal, entropy):
    """Print ranges over seeds: how soon half of the games are won, and how the last steps went."""
    results = {
        "half won at step": (steps_to_half(wins), ".0f"),
        "games won": (wins[-LAST:].mean(0), ".1%"),
        "illegal moves": (illegal[-LAST:].mean(0), ".1%"),
        "entropy, nats": (entropy[-LAST:].mean(0), ".2f"),
    }
    print(f"\n{SEEDS} seeds{'':<13}", *(f"{column:>16}" for column in results))
    for way, name in enumerate(WAYS):
        cells = []
        for values, form in results.values():
            low, high = (format(find(values[way]), form) for find in (np.min, np.max))
            cells.append((low if low == high else f"{low} to {high}").replace("inf", "never"))
        print(f"{name:<20}", *(f"{cell:>16}" for cell in cells))


def draw_curves(axes, values, title):
    """The mean over seeds of each way, and their range."""
    values = smooth(values)
    steps = np.arange(1, len(values) + 1)
    for way, colour in enumerate(WAYS.values()):
        low, high, mean = (
            over_seeds(values[:, way], 1) for over_seeds in (np.min, np.max, np.mean)
        )
        axes.fill_between(steps, low, high, color=colour, alpha=0.25, lw=0)
        axes.plot(steps, mean, color=colour, lw=2)
    axes.set(xlim=(0, len(values)), ylim=(0, None), title=title)
    axes.tick_params(color="0.7")


def draw_wins(axes, wins):
    masked, moves_only, penalty = np.median(steps_to_half(wins), 1)
    title = "Games won with illegal moves masked or not"
    if masked < penalty < np.inf and moves_only == np.inf:
        when = f"{masked:.0f} steps, not {penalty:.0f}"
        title = f"Half of the games are won in {when},\nif moves and loss are masked"
    draw_curves(axes, wins, title)
    low, high = wins[-LAST:].mean(0).min(1), wins[-LAST:].mean(0).max(1)
    for name, y in zip(WAYS, (high[0] + 0.04, high[1] + 0.09, max(low[2] - 0.07, 0.01))):
        axes.text(0.98 * len(wins), y, name, color=WAYS[name], ha="right", weight="bold")
    axes.set(ylim=(0, 0.72), ylabel=f"tic-tac-toe games won (range of {SEEDS} seeds)")


def draw(wins, illegal, entropy, path):
    plt.switch_backend("agg")
    plt.rc("axes", edgecolor="0.7", grid=True, titlelocation="left", titleweight="bold")
    plt.rc("axes.spines", right=False, top=False)
    plt.rc("grid", color="0.92")
    plt.rc("figure.constrained_layout", use=True, w_pad=0.12, h_pad=0.1)
    layout = [["wins", "illegal"], ["wins", "entropy"]]
    figure, axes = plt.subplot_mosaic(layout, figsize=(9.6, 4.8), width_ratios=(1.5, 1))
    draw_wins(axes["wins"], wins)
    draw_curves(axes["illegal"], illegal, "Illegal moves: none where masked")
    draw_curves(axes["entropy"], entropy, "Entropy in the loss, nats")
    for name in ("wins", "illegal"):
        axes[name].yaxis.set_major_formatter(PercentFormatter(1, 0))
    figure.supxlabel(f"step ({GAMES} games of each way and seed)", size=10)
    figure.savefig(path, dpi=140)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default="policy_gradient.png", help="the picture")
    args = parser.parse_args()
    history = train(jax.random.key(args.seed), args.steps)
    report(*history)
    draw(*history, args.out)
    print(f"\nThe picture is {args.out.resolve()}")


if __name__ == "__main__":
    main()
