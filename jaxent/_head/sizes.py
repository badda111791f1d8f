"""Which form a head takes, and how large its parts are: a chunk's classes, a block's tokens."""

from typing import Any

from .._axes import num_shards
from .._forms import chosen
from .chunks import Head, Plan
from .mesh import Layout

# A chunk's bytes of float32 logits, and its classes at least. On two CPU cores, 512 to 2048 classes
# took the same time for 2048 tokens (within 5 %), and 4096 more.
LOGITS_CHUNK_BYTES = 2**23
MIN_CHUNK_CLASSES = 1024
# What a chunk's part of the kernel may take in float32, for few tokens: 64 of them, and 32000
# classes, took 800 MB on a TPU.
KERNEL_CHUNK_BYTES = 2**25
# Tokens that are gone over together, and what all their float32 logits may take. A block in which
# few tokens count takes as long as a full one, so it is an eighth of all, 256 at least: on two CPU
# cores and jax 0.12.0.1 these take as long as 512 (within 7 %), and 128 up to 8 % longer.
BLOCK_TOKENS = 512
LOGITS_BLOCK_BYTES = 60 * 2**20
MIN_BLOCK_TOKENS = 256
BLOCKS = 8
# Where fewer than these fit, gradients are not made forward.
MIN_FORWARD_TOKENS = 128
# What a shard of the width gives at least to the gather of a chunk. Of 256 chips of a TPU, XLA
# makes all-reduces of gathers to which each gives 65 kB, twice as much to send, and leaves those
# of 74 kB. (`python -m benchmarks.pod` prints both.)
MIN_GATHER_BYTES = 5 * 2**14
# Where gradients are made forward: what the kernel's may take in float32. (XLA's CPU
# compiler has one such array more than the result.)
MAX_ACCUMULATOR_BYTES = 2**28


def is_made_forward(plan: Plan, hidden: Any, kernel: Any, layout: Layout) -> bool:
    """Return whether gradients are made in the forward pass.

    That is a loop over tokens, which must be this device's own. A symbolic number of them
    (`jax.export`) is not cut into blocks.
    """
    if not all(isinstance(size, int) for size in (*hidden.shape, *kernel.shape)):
        return False
    if plan.chunk is not None or layout.classes or layout.width:
        return False
    num_tokens, num_classes = layout.num_tokens(hidden), kernel.shape[plan.class_axis]
    enough = min(num_tokens, MIN_FORWARD_TOKENS)
    fits = whole_logits_block(num_tokens, num_classes) >= enough
    of_naive = 2 * 4 * num_tokens * num_classes
    small = 4 * kernel.size <= min(MAX_ACCUMULATOR_BYTES, of_naive)
    return fits and small and layout.owns_all_tokens


def choose_chunk(plan: Plan, head: Head) -> int:
    """Return a chunk's number of classes, for a device that has these tokens and classes."""
    num_tokens, width = head.hidden.shape
    if not isinstance(num_tokens, int):  # symbolic: any number of them
        num_tokens = LOGITS_CHUNK_BYTES
    logits = LOGITS_CHUNK_BYTES // 4 // max(num_tokens, 1)
    size = max(MIN_CHUNK_CLASSES, min(logits, KERNEL_CHUNK_BYTES // 4 // max(width, 1)))
    if plan.width:  # up to 16 times the logits
        column = width // num_shards(plan.width) * plan.dtype.itemsize
        size = max(size, min(MIN_GATHER_BYTES // max(column, 1), 16 * logits))
    return balance(head.kernel.shape[plan.class_axis], size, 128)


def choose_block(plan: Plan, head: Head) -> int:
    """Return how many tokens are gone over together; 0 for all, which are no loop."""
    num_tokens = head.hidden.shape[0]
    if not isinstance(num_tokens, int) or not (plan.made_forward or plan.skip):
        return 0
    size = chosen("block", _block_size, plan, num_tokens, head.kernel.shape[plan.class_axis])
    return balance(num_tokens, size) if 0 < size < num_tokens else 0


def _block_size(plan: Plan, num_tokens: int, num_classes: int) -> int:
    if plan.made_forward:
        return whole_logits_block(num_tokens, num_classes)
    if plan.class_axis == 1 and num_classes % 128:
        # A TPU, which keeps such a kernel transposed, would copy it whole for a loop over blocks.
        return 0
    return max(BLOCK_TOKENS, -(-num_tokens // BLOCKS))


def whole_logits_block(num_tokens: int, num_classes: int) -> int:
    """Return how many tokens are gone over together where all their logits are there.

    It is an eighth of them, 256 to 512, as far as two arrays of their logits fit: into a quarter
    of what the naive form holds, or 120 MB if that is more, and into 480 MB.
    """
    row = 4 * num_classes
    fitting = min(max(LOGITS_BLOCK_BYTES // row, num_tokens // 4), 4 * LOGITS_BLOCK_BYTES // row)
    eighth = -(-num_tokens // BLOCKS)
    return min(max(eighth, MIN_BLOCK_TOKENS), BLOCK_TOKENS, max(fitting, 1))


def balance(length: int, size: int, multiple: int = 1) -> int:
    """Return the size of parts that cover a length evenly.

    It is at most `size`, except that it is rounded up to the multiple.
    """
    parts = -(-length // min(size, max(length, 1)))
    return min(-(-length // max(parts, 1) // multiple) * multiple, length)
