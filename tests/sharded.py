"""Eight devices on the host: meshes, comparison, and what a compiled program sends."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

SHARDS, EXAMPLES = 8, 32
MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def assert_equal(actual, whole):
    """Equal to as many roundings as there are examples, all finite, and not all zero.

    Two ways to add N numbers differ by up to N roundings of their magnitudes' sum. That is
    about 1 here, also where the sum is small because they cancel (label smoothing's). Then
    a result of half precision is rounded once.
    """
    roundings = EXAMPLES * float(jnp.finfo(jnp.float32).eps)
    assert jax.tree.structure(actual) == jax.tree.structure(whole)
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(whole), strict=True):
        assert a.shape == w.shape
        assert a.dtype == w.dtype
        last = float(jnp.finfo(a.dtype).eps)
        a, w = np.asarray(a, np.float64), np.asarray(w, np.float64)
        assert np.all(np.isfinite(w))
        assert np.any(w != 0)
        np.testing.assert_allclose(a, w, rtol=roundings + last, atol=roundings)


def floats(tree):
    return {k: v for k, v in tree.items() if jnp.issubdtype(v.dtype, jnp.floating)}


# What is tested of `axis_name` is what JAX traces, not how well XLA compiles it.
jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def make_mesh(kind, **sizes):
    types = (MESHES[kind],) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


def auto_mesh(shape=(SHARDS,), names=("data",)):
    return make_mesh("auto", **dict(zip(names, shape)))


COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter"
    r"|collective-permute|collective-broadcast)(-start)?\("
)


def collectives(compiled):
    """[(kind, elements)] of a compiled program, one for each array that is sent.

    The elements are those of the result: of what is gathered, not of its parts.
    """
    found = []
    for line in compiled.as_text().splitlines():
        match = COLLECTIVE.search(line)
        if match:
            shapes = re.findall(r"[a-z]+\d*\[([\d,]*)\]", match["result"])
            assert shapes, line
            found += [
                (match["kind"], math.prod(map(int, filter(None, s.split(","))))) for s in shapes
            ]
    return found  # fmt: skip


def laid_out(given, mesh, spec_of):
    return {k: jax.device_put(v, NamedSharding(mesh, spec_of(k, v))) for k, v in given.items()}
