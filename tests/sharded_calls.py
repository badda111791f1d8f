"""Calls of every function, each array with the axes that split it, and the ways to split them.

A call is a function of its arrays and of `names`, which says what a split call is told and how
it adds up over shards. Of eight devices, "data" has two and "model" four. Shard 2 of the classes
has a class that does not exist and shard 3, padding, none that does; a row of padding and the
excluded classes hold NaN.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from sharded import floats, jit

import jaxent

N, C, D, K = 16, 24, 4, 3
SIZES = {"data": 2, "model": 4}

# The axis that splits each dimension; a kernel's width is split where the case says so.
AXES = {
    "x": ("data", "model"),
    "clean": ("data", "model"),
    "x_k": ("data", "model", None),
    "y": ("data",),
    "y_k": ("data", None),
    "y_b": ("data", None),
    "t": ("data", "model"),
    "t_b": ("data", None, "model"),
    "s": ("data",),
    "w": ("model",),
    "m": ("model",),
    "m2": ("data", "model"),
    "e": (),
    "z": (),
    "l": (),
    "h": ("data", None),
    "h_b": ("data", None, None),
    "k": (None, "model"),
    "table": ("model", None),
    "wide_k": ("data", "model"),
    "wide_table": ("model", "data"),
    "b": ("model",),
}


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    exists = np.arange(C) < 17
    labels = rng.integers(0, 17, N)
    labels[[1, 2, 5, 11]] = -100
    x = rng.normal(size=(N, C))
    full = rng.uniform(size=(N, C)) < 0.8
    full[np.arange(N), np.maximum(labels, 0)] = True
    t = rng.dirichlet(np.ones(C), N) * exists * full
    full[3] = False  # no class is left
    kernel = rng.normal(size=(D, C))
    hidden = rng.normal(size=(N, D))
    sample_weight = rng.uniform(0.5, 2, N)
    sample_weight[[5, 9]] = 0
    clean = x.copy()
    x[:, ~exists] = np.nan
    x[5] = hidden[5] = np.nan
    drawn = {
        "x": x,
        "clean": clean,
        "x_k": rng.normal(size=(N, C, K)),
        "y": labels.astype(np.int32),
        "y_k": rng.integers(0, C, (N, K)).astype(np.int32),
        "y_b": np.stack([labels, np.minimum(labels, 4)], 1).astype(np.int32),
        "t": t,
        "t_b": np.stack([t, 0.5 * t], 1),
        "s": sample_weight,
        "w": rng.uniform(0.5, 2, C),
        "m": exists,
        "m2": full & exists,
        "e": np.float32(0.1),
        "z": np.float32(0.02),
        "l": np.float32(0.7),
        "h": hidden,
        "h_b": np.nan_to_num(np.stack([hidden, -hidden], 1)),
        "k": kernel,
        "table": kernel.T,
        "b": rng.normal(size=C),
    }
    drawn |= {"wide_k": kernel, "wide_table": kernel.T}
    # Of NumPy: an array of JAX belongs to the mesh under which it was made.
    return {name: np.float32(v) if v.dtype == np.float64 else v for name, v in drawn.items()}


def given(case):
    return {name: arrays()[name] for name in CASES[case][1].split()}


# What a call is told: nothing where arrays are whole; on an automatic mesh, of the head; and
# everything where axes are mapped. `add` is for what returns a value for each example.
WHOLE = types.SimpleNamespace(
    loss={}, rows={}, head={}, wide={}, add=lambda values, *axes: jnp.sum(values)
)
_BOTH = {"axis_name": "data", "class_axis_name": "model"}
AUTO = types.SimpleNamespace(
    loss={}, rows={}, head=_BOTH, wide=_BOTH | {"width_axis_name": "data"}, add=WHOLE.add
)
MAPPED = types.SimpleNamespace(
    loss=_BOTH,
    rows={"class_axis_name": "model"},
    head=_BOTH,
    wide=_BOTH | {"width_axis_name": "data"},
    add=lambda values, *axes: jax.lax.psum(jnp.sum(values), axes),
)


def options(a, *letters):
    names = {
        "w": "weight",
        "s": "sample_weight",
        "m": "class_mask",
        "m2": "class_mask",
        "e": "label_smoothing",
        "z": "z_loss",
        "l": "logit_scale",
        "b": "bias",
    }
    return {names[letter]: a[letter] for letter in letters}


def statistics(stats, s):
    """Something of every statistic; nothing where one is infinite."""
    values = stats.log_prob + 0.3 * stats.log_normalizer + stats.entropy * stats.log_prob
    return s * (values + 0.1 * stats.prediction + stats.correct)


def head(a, names, hidden="h", kernel="k", targets="y", m=jaxent, **keywords):
    told = names.wide if kernel.startswith("wide") else names.head
    class_axis = 0 if kernel.endswith("table") else -1
    return m.linear_cross_entropy(
        a[hidden], a[kernel], a[targets], class_axis=class_axis, **told, **keywords
    )


EVERY = ("w", "s", "m", "e", "z", "l")

# name: (function of the module, arrays and names; the arrays)
CASES = {
    "log_softmax": (
        lambda m, a, n: n.add(
            a["t"] * jnp.maximum(m.log_softmax(a["clean"], class_mask=a["m"], **n.rows), -99),
            "data",
            "model",
        ),
        "clean t m",
    ),
    "nll": (
        lambda m, a, n: m.nll(a["clean"], a["y"], **options(a, "w", "s"), **n.loss),
        "clean y w s",
    ),
    "nll, probabilities": (
        lambda m, a, n: m.nll(
            a["clean"], a["t"], reduction="sum", axis=-1, **options(a, "w"), **n.loss
        ),
        "clean t w",
    ),
    "cross_entropy": (lambda m, a, n: m.cross_entropy(a["clean"], a["y"], **n.loss), "clean y"),
    "cross_entropy, every option": (
        lambda m, a, n: m.cross_entropy(
            a["x"], a["y"], softcap=3.0, **options(a, *EVERY), **n.loss
        ),
        "x y w s m e z l",
    ),
    "cross_entropy, K dimensions": (
        lambda m, a, n: m.cross_entropy(
            a["x_k"], a["y_k"], axis=1, **options(a, "w", "e", "z"), **n.loss
        ),
        "x_k y_k w e z",
    ),
    "cross_entropy, probabilities": (
        lambda m, a, n: m.cross_entropy(
            a["clean"],
            a["t"],
            axis=-1,
            softcap=3.0,
            **options(a, "w", "s", "m2", "e", "z", "l"),
            **n.loss,
        ),
        "clean t w s m2 e z l",
    ),
    "token_stats": (
        lambda m, a, n: n.add(
            statistics(
                m.token_stats(a["x"], a["y"], softcap=3.0, class_mask=a["m"], **n.rows), a["s"]
            ),
            "data",
        ),
        "x y m s",
    ),
    "total_weight": (
        lambda m, a, n: m.total_weight(a["y"], **options(a, "w", "s"), **n.loss),
        "y w s",
    ),
    "linear": (lambda m, a, n: head(a, n, "h_b", targets="y_b", m=m), "h_b k y_b"),
    "linear, every option": (
        lambda m, a, n: head(a, n, m=m, softcap=3.0, chunk_size=4, **options(a, "b", *EVERY)),
        "h k y b w s m e z l",
    ),
    "linear, (C, D), probabilities": (
        lambda m, a, n: head(
            a, n, "h_b", "table", "t_b", m=m, chunk_size=4, **options(a, "b", "w", "e")
        ),
        "h_b table t_b b w e",
    ),
    "linear, width split": (
        lambda m, a, n: head(
            a, n, kernel="wide_k", m=m, chunk_size=4, **options(a, "b", "w", "s", "e", "z")
        ),
        "h wide_k y b w s e z",
    ),
    "linear, (C, D), width split": (
        lambda m, a, n: head(a, n, "h_b", "wide_table", "y_b", m=m, chunk_size=4),
        "h_b wide_table y_b",
    ),
    "linear_token_stats": (
        lambda m, a, n: n.add(
            statistics(
                m.linear_token_stats(
                    a["h"],
                    a["wide_k"],
                    a["y"],
                    bias=a["b"],
                    class_mask=a["m"],
                    chunk_size=4,
                    **n.wide,
                ),
                a["s"],
            ),
            "data",
        ),
        "h wide_k y b m s",
    ),
}


def specs(tree):
    return {name: P(*AXES[name]) for name in tree}


def call(case, names, module=jaxent):
    return lambda tree: CASES[case][0](module, tree, names)


def with_gradients(f):
    def evaluated(tree):
        return jax.value_and_grad(lambda some: f(tree | some))(floats(tree))

    return evaluated


@functools.cache
def whole(case):
    return jit(with_gradients(call(case, WHOLE)))(given(case))


# ---- Nested vmaps and pmaps, over the shards of one array dimension each -----------------


def _split(name, array):
    shape = []
    for axis, size in zip(AXES[name], array.shape):
        shape += [size] if axis is None else [SIZES[axis], size // SIZES[axis]]
    return array.reshape(shape)


def _place(name, axis, inner=False):
    """Where the shards of an axis are in a split array; `inner`: once the other's are gone."""
    place = 0
    for dimension in AXES[name]:
        if dimension == axis:
            return place
        place += 1 if dimension is None or inner else 2
    return None


def nested(outer, inner):
    """A way to map f(arrays) over "model", the outer axis, and "data", whose axis it does first.

    `out` names arrays whose gradients f returns beside a value; None if the value is all.
    """

    def way(f, out=None):
        def axes(names, axis, is_inner):
            return {name: _place(name, axis, is_inner) for name in names}

        def call(tree):
            results = [None if out is None else (None, axes(out, a, i)) for a, i in order]
            mapped = inner(
                f, in_axes=(axes(tree, "data", True),), out_axes=results[1], axis_name="data"
            )
            mapped = outer(
                mapped,
                in_axes=(axes(tree, "model", False),),
                out_axes=results[0],
                axis_name="model",
            )
            value = mapped({name: _split(name, v) for name, v in tree.items()})
            if out is None:
                return value
            return value[0], {n: g.reshape(tree[n].shape) for n, g in value[1].items()}

        order = (("model", False), ("data", True))
        return call

    return way


def over_mesh(mesh, check_vma=True):
    def way(f, out=None):
        def call(tree):
            results = P() if out is None else (P(), specs(out))
            return jax.shard_map(
                f, mesh=mesh, in_specs=(specs(tree),), out_specs=results, check_vma=check_vma
            )(tree)

        return call

    return way
