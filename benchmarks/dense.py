"""Losses on logits, compiled ahead of time: scratch memory and the bytes that a device touches.

    python benchmarks/dense.py [--only TEXT]

Loss and gradient of 8192 x 128256 logits on accelerators that need not be here, by XLA's count:
scratch beyond inputs and outputs, and bytes accessed, as a multiple of three passes (read, read,
write), which is what any loss with a stable gradient has to touch. `--only` keeps the rows whose
name contains TEXT. XLA counts no bytes for GPUs.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # where it all compiles

import argparse
import importlib.metadata

import jax
import jax.numpy as jnp
import optax
import targets as accelerators
from tables import header, line

import jaxent

TOKENS, CLASSES = 8192, 128256


def plain(logits, targets, **_):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def cast(logits, targets, **_):
    return plain(logits.astype(jnp.float32), targets)


# name: (loss, its options; numbers, or the shapes of arrays)
PER_CLASS, PER_TOKEN = (CLASSES,), (TOKENS,)
EVERY = {
    "weight": PER_CLASS,
    "class_mask": PER_CLASS,
    "sample_weight": PER_TOKEN,
    "label_smoothing": (),
    "z_loss": (),
    "softcap": 30.0,
}
LOSSES = {
    "optax (inexact in bfloat16)": (plain, {}),
    "optax, cast to float32": (cast, {}),
    "jaxent": (jaxent.cross_entropy, {}),
    **{f"jaxent, {k}": (jaxent.cross_entropy, {k: v}) for k, v in EVERY.items()},
    "jaxent, all of these": (jaxent.cross_entropy, EVERY),
}


def measure(device, dtype, loss, options):
    """Scratch memory in MB, and bytes accessed in three passes."""
    sharding = accelerators.sharding(device)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    static = {k: v for k, v in options.items() if not isinstance(v, tuple)}
    arrays = {
        k: array(v, "bool" if k == "class_mask" else "float32")
        for k, v in options.items()
        if k not in static
    }

    def evaluated(logits, targets, arrays):
        return loss(logits, targets, **arrays, **static)

    arguments = array((TOKENS, CLASSES), dtype), array((TOKENS,), "int32"), arrays
    compiled = jax.jit(jax.value_and_grad(evaluated)).lower(*arguments).compile()
    scratch = compiled.memory_analysis().temp_size_in_bytes / 1e6
    three_passes = 3 * TOKENS * CLASSES * jnp.dtype(dtype).itemsize
    touched = (compiled.cost_analysis() or {}).get("bytes accessed")
    return scratch, touched and touched / three_passes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    only = parser.parse_args().only
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "optax"))
    columns = "device", "dtype", "loss", "scratch, MB", "bytes touched, of three passes"
    header(f"With {versions}.", *columns)
    missing = []
    for device in accelerators.NAMES:
        try:
            accelerators.sharding(device)
        except Exception as error:
            missing.append(f"{device}: {type(error).__name__}; {accelerators.needs(device)}")
            continue
        for dtype in ("bfloat16", "float32"):
            for name, case in LOSSES.items():
                if only in f"{device} {dtype} {name}":
                    scratch, touched = measure(device, dtype, *case)
                    touched = f"{touched:.3f}" if touched else ""
                    line(device, dtype, name, f"{scratch:.1f}", touched)
    print("\n".join(["", *missing]))


if __name__ == "__main__":
    main()
