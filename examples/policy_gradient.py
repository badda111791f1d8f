"""A policy gradient with illegal moves.

A small network learns tic-tac-toe by REINFORCE against an opponent that wins where it can, blocks
where it must and else moves at random. The network moves first in half of the games, and its
reward is 1 for a win and 0 otherwise. Three ways to treat illegal moves, with the same seeds:

* `class_mask` leaves them out, of the policy that moves and of its loss;
* `class_mask` leaves them out of the policy that moves, but the loss forgets it;
* nothing is masked, and an illegal move loses the game.

One `jax.vmap` plays and learns all ways and seeds at once, thousands of games. From the repository:

    python examples/policy_gradient.py

prints a table and what follows from it, and draws policy_gradient.png here, or where `--out` says.

DOC
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
TURNS = 5  # of the network in one game, at most
ENTROPY_BONUS = 0.05
LAST = 20  # The table is the mean over this many steps, the last ones.
ROWS = np.arange(9).reshape(3, 3)
LINES = [*ROWS, *ROWS.T, np.diag(ROWS), np.diag(ROWS[:, ::-1])]
LINES = np.array([np.isin(np.arange(9), line) for line in LINES], np.int32)  # (lines, squares)
GREY, BLUE, ORANGE = "#6b6b6b", "#0072b2", "#d55e00"  # apart for colour-blind eyes, too
WAYS = {"masked": BLUE, "masked in moves only": ORANGE, "illegal move loses": GREY}
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
    """The boards after these moves, which are made in the games `where` only."""
    return jnp.where(jax.nn.one_hot(moves, 9, dtype=bool) & where[:, None], player, boards)


def has_won(boards, player):
    return jnp.any(boards @ LINES.T == 3 * player, -1)


def opponent_moves(boards, key):
    lines = boards @ LINES.T  # -2 where the opponent lacks one square, 2 where the network does
    urgency = 200.0 * ((lines == -2) @ LINES > 0) + 100.0 * ((lines == 2) @ LINES > 0)
    return jax.random.categorical(key, jaxent.log_softmax(urgency, class_mask=boards == 0))


def play(model, key, mask_moves):
    """Play all games to their end.

    Returns boards and moves of each turn, the moves -100 where the game is over, and for each
    game whether it was won and whether it ended by an illegal move.
    """
    key, start_key = jax.random.split(key)
    boards = jnp.zeros((GAMES, 9), jnp.int32)
    is_second = jnp.arange(GAMES) >= GAMES // 2
    boards = place(boards, opponent_moves(boards, start_key), -1, is_second)

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
        won |= running & has_won(boards, 1)
        running &= ~won & jnp.any(boards == 0, -1)
        boards = place(boards, opponent_moves(boards, keys[1]), -1, running)
        running &= ~has_won(boards, -1) & jnp.any(boards == 0, -1)
        return (boards, running, won, illegal), turn

    no = jnp.zeros(GAMES, bool)
    state, turns = jax.lax.scan(take_turn, (boards, ~no, no, no), jax.random.split(key, (TURNS, 2)))
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
        # Advantages add up to about 0, so a mean, which divides by that sum, would be no use.
        policy_loss, stats = jaxent.cross_entropy(
            model(boards),
            moves,
            sample_weight=advantage[None],
            class_mask=(boards == 0) | ~mask_loss,
            reduction="sum",
            return_stats=True,
        )
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
    """The mean of this many steps, or of fewer at the start."""
    return np.stack(
        [values[max(0, end - width) : end].mean(0) for end in range(1, len(values) + 1)]
    )


def steps_to_half(wins):
    """The step at which each way and seed wins half of its games, infinity if it never does."""
    enough = smooth(wins) >= 0.5
    return np.where(enough.any(0), enough.argmax(0) + 1.0, np.inf)


def show_range(values, form):
    low, high = (format(value, form) for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def report(wins, illegal, entropy):
    """Print a table of ranges over seeds: how soon they win, and what the last games were like."""
    columns = ("half won at step", "games won", "illegal moves", "entropy, nats")
    print(f"\n{'':<20}", *(f"{column:>16}" for column in columns))
    for way, name in enumerate(WAYS):
        cells = [show_range(steps_to_half(wins)[way], ".0f").replace("inf", "never")]
        for values, form in ((wins, ".1%"), (illegal, ".1%"), (entropy, ".2f")):
            cells.append(show_range(values[-LAST:, way].mean(0), form))
        print(f"{name:<20}", *(f"{cell:>16}" for cell in cells))


def draw_curves(axes, values, title):
    """The mean over seeds of each way, and their range."""
    values = smooth(values)
    steps = np.arange(1, len(values) + 1)
    for way, colour in enumerate(WAYS.values()):
        axes.fill_between(
            steps, values[:, way].min(1), values[:, way].max(1), color=colour, alpha=0.25, lw=0
        )
        axes.plot(steps, values[:, way].mean(1), color=colour, lw=2)
    axes.set(xlim=(0, len(values)), ylim=(0, None))
    axes.set_title(title)
    axes.tick_params(color="0.7")


def label_curves(axes, wins):
    """Name each curve beside it, at a share of the steps where the others are far."""
    values = smooth(wins).mean(-1)
    places = ((0.02, 0.08, "left"), (0.97, -0.06, "right"), (0.45, -0.08, "left"))
    for way, (name, (x, shift, side)) in enumerate(zip(WAYS, places)):
        step = int(x * (len(values) - 1))
        y = values[step, way] + shift
        axes.text(step, y, name, color=WAYS[name], ha=side, weight="bold")


def make_title(wins):
    masked, _, penalty = np.median(steps_to_half(wins), 1)
    if max(masked, penalty) == np.inf:
        return "Games won"
    return (
        f"With illegal moves masked, half of the games are\n"
        f"won after {masked:.0f} steps; with a penalty, after {penalty:.0f}"
    )


def draw(wins, illegal, entropy, path):
    plt.switch_backend("agg")
    plt.rc("axes", edgecolor="0.7", grid=True, titlelocation="left", titlepad=10)
    plt.rc("axes", titlesize=11.5, titleweight="bold")
    plt.rc("axes.spines", right=False, top=False)
    plt.rc("font", size=10.5)
    plt.rc("grid", color="0.92")
    figure, axes = plt.subplot_mosaic(
        [["wins", "illegal"], ["wins", "entropy"]],
        figsize=(9.6, 4.8),
        width_ratios=(1.5, 1),
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    draw_curves(axes["wins"], wins, make_title(wins))
    draw_curves(axes["illegal"], illegal, "Illegal moves")
    draw_curves(axes["entropy"], entropy, "Entropy of the policy, nats")
    label_curves(axes["wins"], wins)
    axes["wins"].set_ylabel("games won")
    for name in ("wins", "illegal"):
        axes[name].yaxis.set_major_formatter(PercentFormatter(1, 0))
    for name in ("wins", "entropy"):
        axes[name].set_xlabel(f"step ({GAMES} games of each seed)")
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
