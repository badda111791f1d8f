"""The head and the loss in one on a GPU: time of loss and gradients, by chunk.

In bfloat16, of heads of the size of Gemma 2 2B and Llama 3 8B. naive is optax on the logits; "made
forward" is jaxent with gradients from all classes of a block of tokens at once, which it does not
choose where the float32 gradient of the kernel is as large as here; the chunks are `chunk_size`.
Notes have each side's scratch by XLA's count, in MB, and the TFLOP/s of the three products that the
loss and its gradients need, 6 N D C operations, whatever a side computes beside them. It takes
some minutes, most of them to compile; with fewer tokens where the logits do not fit.
"""

import functools

import jax

import jaxent

from .engine import Row, interleaved, number, outcome
from .head_speed import best, in_order
from .heads import case_of, draw, naive, of_tokamax, tokamax

UNIT = "ms"
CHUNKS = {f"chunk {size}": size for size in (1024, 2048, 4096, 8192, 16384, 32768)}
SIDES = ("jaxent", "made forward", *CHUNKS, "naive", "tokamax chunked")
BOUND = "Score: jaxent's time divided by that of the fastest other library; at most 1.0."
SHAPES = (  # tokens, width, classes
    (8192, 2304, 256000),
    (8192, 4096, 128256),
    (16384, 4096, 128256),
)
REPS = 3  # of a second each


def losses():
    chunked = {
        side: functools.partial(jaxent.linear_cross_entropy, chunk_size=size)
        for side, size in CHUNKS.items()
    }
    sides = {
        "jaxent": jaxent.linear_cross_entropy,
        "made forward": functools.partial(in_order, True),
        **chunked,
        "naive": naive,
    }
    if tokamax:
        sides["tokamax chunked"] = functools.partial(of_tokamax, "chunked_xla")
    return sides


def compiled(loss, arrays):
    """The program of loss and gradients, ready to run."""
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()


def notes_of(side, seconds, program, shape):
    tokens, width, classes = shape
    rate = 6 * tokens * width * classes / seconds / 1e12
    scratch = program.memory_analysis().temp_size_in_bytes / 1e6
    return f"{side}: {rate:.3g} TFLOP/s, {scratch:.0f} MB"


def named(shape):
    return Row(case_of(shape, "bfloat16"), {})


def filled(row, shape, reps):
    arrays = draw(shape, "bfloat16")
    programs = {side: outcome(compiled, loss, arrays) for side, loss in losses().items()}
    failed = {side: name for side, name in programs.items() if isinstance(name, str)}

    def run(program):
        return jax.block_until_ready(program(*arrays))

    runs = {s: functools.partial(run, p) for s, p in programs.items() if s not in failed}
    row.values = interleaved(runs, min(reps, REPS)) | failed
    seconds = {side: number(row.values[side]) for side in programs}
    row.notes = "; ".join(
        notes_of(side, time, programs[side], shape) for side, time in seconds.items() if time
    )
    time, _ = best(row.values, ("naive", "tokamax chunked"))
    if seconds["jaxent"] and time:
        row.score, row.bound = seconds["jaxent"] / time, 1.0
    return row


def rows(options):
    if jax.default_backend() == "cpu":
        print("head_gpu is for an accelerator; on a CPU, ask head_speed and head_ignored")
        raise SystemExit(0)
    for shape in SHAPES:
        row = named(shape)
        if options.only in row.name:
            yield filled(row, shape, options.reps)
