"""Axis names: which are mapped here, sums over them, and the classes of a shard.

A name means an axis of `jax.shard_map`, `jax.pmap` or `jax.vmap`, over which a call sees its
own shard; or one of a mesh that `jit` splits arrays over, where a call sees whole arrays and
there is nothing to add up.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from ._arguments import describe

AxisName = str | Sequence[str | Sequence[str] | None] | PartitionSpec | None
Names = tuple[str, ...]

Tree = TypeVar("Tree")


def flat_names(axis_name: AxisName) -> Names:
    if axis_name is None:
        return ()
    if isinstance(axis_name, str):
        return (axis_name,)
    if not isinstance(axis_name, (tuple, list, PartitionSpec)):
        raise TypeError
    return tuple(name for entry in axis_name for name in flat_names(entry))


def check_axis_name(argument: str, axis_name: Any) -> None:
    try:
        flat_names(axis_name)
    except TypeError:
        raise TypeError(
            f"{argument} must be a string, a tuple of them, a PartitionSpec or None, got "
            f"{describe(axis_name)}"
        ) from None


def meshes(*arrays: Array) -> list[Any]:
    """Return the meshes known while tracing: the ambient one, and those of the arrays' types."""
    known = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)]
    return [mesh for mesh in known if not mesh.empty]


def read_axis_names(*arrays: Array, **given: AxisName) -> tuple[Names, ...]:
    """Return each argument's mapped names; one that is neither mapped nor of a mesh raises."""
    if not any(name is not None for name in given.values()):
        return ((),) * len(given)
    on_mesh = {name for mesh in meshes(*arrays) for name in mesh.axis_names}
    seen: dict[str, set[str]] = {}
    mapped = []
    for argument, axis_name in given.items():
        check_axis_name(argument, axis_name)
        names = flat_names(axis_name)
        for name in names:
            if not _is_mapped(name) and name not in on_mesh:
                raise ValueError(
                    f"{argument}={axis_name!r}: {name!r} is no axis here. It must be one that "
                    "jax.shard_map, jax.pmap or jax.vmap maps, or one of the mesh of "
                    f"`with jax.set_mesh(mesh):`, {_listed(on_mesh)}"
                )
        if len({*names}) < len(names):
            raise ValueError(f"{argument}={axis_name!r} names an axis twice")
        seen[argument] = {*names}
        mapped.append(tuple(name for name in names if _is_mapped(name)))
    for other in ("axis_name", "width_axis_name"):
        if both := seen.get("class_axis_name", set()) & seen.get(other, set()):
            raise ValueError(
                f"{sorted(both)} are in class_axis_name and in {other}: an axis splits the classes "
                f"or the {'width' if other == 'width_axis_name' else 'examples'}, not both"
            )
    return tuple(mapped)


def in_shard_map(names: Names) -> bool:
    """Return whether it is `shard_map` that maps them, not `vmap` or `pmap`."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = zip(mesh.axis_names, mesh.axis_types)
    return set(names) <= {name for name, kind in manual if kind == AxisType.Manual}


def _is_mapped(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def _listed(names: Iterable[str]) -> str:
    return f"which has {', '.join(map(repr, sorted(names)))}" if names else "of which there is none"


def psum(values: Tree, names: Names) -> Tree:
    """Return the sums over mapped axes, of what varies over all, some or none of them."""
    of_mesh = tuple(name for name in names if in_shard_map((name,)))
    others = tuple(name for name in names if name not in of_mesh)
    if of_mesh:
        # JAX takes what varies over all of them, or is the same on all devices.
        if any(_varying_axes(leaf) & {*of_mesh} for leaf in jax.tree.leaves(values)):
            values = jax.tree.map(lambda leaf: _vary(leaf, frozenset(of_mesh)), values)
        values = jax.lax.psum(values, of_mesh)
    return jax.lax.psum(values, others) if others else values


def num_shards(names: Names) -> int:
    return jax.lax.axis_size(names) if names else 1


def first_class(num_classes: int, names: Names) -> Array | int:
    """Return the number of this shard's first class, each shard having `num_classes`."""
    return jax.lax.axis_index(names) * num_classes if names else 0


def local_index(index: Array, num_classes: int, names: Names) -> Array:
    """Return indices relative to this shard's classes; -1 for none, and for other shards'."""
    index = index - first_class(num_classes, names)
    return jnp.where((index >= 0) & (index < num_classes), index, -1) if names else index


def vary_alike(*trees: Any) -> Any:
    """Give all arrays the union of their varying axes, for use inside `jax.shard_map`.

    A custom_vjp returns cotangents that vary as its arguments do; marking the arguments
    outside of it lets JAX sum over devices what belongs to a replicated one.
    """
    leaves, structure = jax.tree.flatten(trees)
    union = frozenset().union(*map(_varying_axes, leaves))
    return jax.tree.unflatten(structure, [_vary(leaf, union) for leaf in leaves])


def vary_like(x: Array, tree: Tree) -> Tree:
    """Return the tree, varying as x does: what a scan begins with, beside what it goes over."""
    axes = _varying_axes(x)
    varying: Tree = jax.tree.map(lambda leaf: _vary(leaf, axes), tree)
    return varying


def _vary(x: Array, axes: frozenset[str]) -> Array:
    missing = tuple(axes - _varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _varying_axes(x: Array) -> frozenset[str]:
    varying: frozenset[str] = jax.typeof(x).mat.varying
    return varying
