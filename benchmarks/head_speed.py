"""The head and the loss in one: time on JAX's default device, and what choosing chunks costs.

Loss and gradients over tokens, width and classes. jaxent chooses a chunk of classes, and whether
it goes over chunks of classes ("by classes", four matmuls) or over blocks of tokens, making its
gradients forward ("by tokens", three matmuls). The other columns are the same with the chunk
given by `chunk_size`, or with the other order, which no keyword forces: it is put in place of the
choice here, where the float32 gradient of the kernel that it needs is one that jaxent allows
itself. The peers are timed for three shapes, and there the loss alone too.
"""

import functools
import itertools

import jaxent
from jaxent import _linear
from jaxent._forms import forced
from jaxent._head import sizes

from .engine import Row, interleaved, number
from .heads import DTYPES, INSTALLED, PEERS, SHAPES, case_of, draw, runner, runner_of
from .heads import SIDES as LIBRARIES

UNIT = "ms"
CHUNKS = {f"chunk {size}": size for size in (1024, 2048, 4096, 8192)}
ALL = "all classes"
ORDERS = {"by classes": False, "by tokens": True}  # whether gradients are made forward
SIDES = (*LIBRARIES, *CHUNKS, ALL, *ORDERS)
BOUND = "Score: the time of jaxent's own choice divided by that of the best other; at most 1.10."

# What a CPU does in seconds, and holds.
TOKENS = (1024, 4096, 16384, 65536)
WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
CLASSES = (32768, 65536, 131072, 262144)
PRODUCTS, KERNEL, LOGITS = 3.5e10, 2.2e9, 4.5e9


def feasible(tokens, width, classes):
    return (
        tokens * width * classes <= PRODUCTS
        and 4 * width * classes <= KERNEL
        and 4 * tokens * classes <= LOGITS
    )


def surface():
    """The shapes, small ones first."""
    shapes = {s for s in itertools.product(TOKENS, WIDTHS, CLASSES) if feasible(*s)} | {*SHAPES}
    return sorted(shapes, key=lambda shape: (shape[0] * shape[1] * shape[2], shape))


def in_order(forward, hidden, kernel, targets):
    with forced(made_forward=forward):
        return jaxent.linear_cross_entropy(hidden, kernel, targets)


def chosen_order(arrays):
    """Whether jaxent would make the gradients forward."""
    hidden, kernel, targets = arrays
    plan, layout, h, k, _, _ = _linear.read_head(
        hidden,
        kernel,
        targets,
        bias=None,
        class_axis=-1,
        dtype=None,
        precision=None,
        dot_general=None,
        chunk_size=None,
        axis_name=None,
        class_axis_name=None,
        width_axis_name=None,
        ignore_index=-100,
    )
    return sizes.is_made_forward(plan, h, k, layout)


def alternatives(arrays, forward):
    """The losses with what jaxent did not choose, or not by itself."""
    _, kernel, _ = arrays
    chunks = CHUNKS | {ALL: kernel.shape[1]}
    losses = {
        side: functools.partial(jaxent.linear_cross_entropy, chunk_size=size)
        for side, size in chunks.items()
    }
    if forward or 4 * kernel.size <= sizes.MAX_ACCUMULATOR_BYTES:
        (other,) = (side for side, made in ORDERS.items() if made != forward)
        losses[other] = functools.partial(in_order, not forward)
    return {side: runner(loss, arrays) for side, loss in losses.items()}


def best(values, sides):
    """The fastest of these sides that have a time, and it."""
    times = {side: number(values.get(side)) for side in sides}
    return min(((time, side) for side, time in times.items() if time), default=(None, ""))


def of_gradients(row, shape, reps):
    arrays = draw(shape, row.case["dtype"])
    forward = chosen_order(arrays)
    libraries = INSTALLED if shape in SHAPES else ("jaxent",)
    runs = {side: runner_of(side, arrays) for side in libraries} | alternatives(arrays, forward)
    row.values = interleaved(runs, reps)
    mine = number(row.values["jaxent"])
    time, side = best(row.values, (*CHUNKS, ALL, *ORDERS))
    if mine and time:
        row.score, row.bound = mine / time, 1.10
        row.notes = f"chose {'by tokens' if forward else 'by classes'}; best: {side}"
    return against_peers(row, mine)


def of_loss(row, shape, reps):
    arrays = draw(shape, row.case["dtype"])
    row.values = interleaved({s: runner_of(s, arrays, False) for s in INSTALLED}, reps)
    return against_peers(row, number(row.values["jaxent"]))


def against_peers(row, mine):
    time, peer = best(row.values, PEERS)
    if mine and time:
        row.notes = "; ".join(filter(None, [row.notes, f"{mine / time:.2f} of {peer}"]))
    return row


def rows(options):
    for (shape, dtype), gradients in itertools.product(
        itertools.product(surface(), DTYPES), (False, True)
    ):
        row = Row(case_of(shape, dtype) | {"pass": "with backward" if gradients else "forward"}, {})
        if options.only in row.name and (gradients or shape in SHAPES):
            yield (of_gradients if gradients else of_loss)(row, shape, options.reps)
