"""Axis names: which are mapped here, sums over them, and the classes of a shard.

A name means an axis of `jax.shard_map`, `jax.pmap` or `jax.vmap`, over which a call sees its
own shard; or one of a mesh that `jit` splits arrays over, where a call sees whole arrays and
there is nothing to add up.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, PartitionSpec

AxisName = str | Sequence[Any] | PartitionSpec | None
Names = tuple[str, ...]


def flat_names(axis_name: AxisName) -> Names:
    if axis_name is None:
        return ()
    if isinstance(axis_name, str):
        return (axis_name,)
    return tuple(name for entry in axis_name for name in flat_names(entry))


def check_axis_name(argument: str, axis_name: Any) -> None:
    try:
        flat_names(axis_name)
    except TypeError:
        raise TypeError(
            f"{argument} must be a string, a tuple of them, a PartitionSpec or None, got "
            f"{axis_name!r}"
        ) from None


def meshes(*arrays: Array) -> list[Any]:
    """The meshes known while tracing: those of the arrays' types, and the ambient one."""
    known = [jax.typeof(x).sharding.mesh for x in arrays] + [jax.sharding.get_abstract_mesh()]
    return [mesh for mesh in known if not mesh.empty]


def read_axis_names(*arrays: Array, **given: AxisName) -> tuple[Names, ...]:
    """Of each argument, its names that are mapped. What is neither mapped nor a mesh's raises."""
    on_mesh = {name for mesh in meshes(*arrays) for name in mesh.axis_names}
    seen: dict[str, str] = {}
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
            if argument != "width_axis_name" and seen.setdefault(name, argument) != argument:
                raise ValueError(
                    f"{name!r} is in {seen[name]} and in {argument}: an axis splits either the "
                    "examples or the classes"
                )
        mapped.append(tuple(name for name in names if _is_mapped(name)))
    return tuple(mapped)


def in_shard_map(names: Names) -> bool:
    """Whether it is `shard_map` that maps them, not `vmap` or `pmap`."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = zip(mesh.axis_names, mesh.axis_types)
    return set(names) <= {name for name, kind in manual if kind == AxisType.Manual}


def _is_mapped(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def _listed(names) -> str:
    return f"which has {', '.join(map(repr, sorted(names)))}" if names else "of which there is none"


def psum(values: Any, names: Names) -> Any:
    return jax.lax.psum(values, names) if names else values


def num_shards(names: Names) -> int:
    return jax.lax.axis_size(names) if names else 1


def first_class(num_classes: int, names: Names) -> Array | int:
    """The number of this shard's first class, each shard having `num_classes`."""
    return jax.lax.axis_index(names) * num_classes if names else 0


def local_index(index: Array, num_classes: int, names: Names) -> Array:
    """Class indices relative to this shard's classes; -1 for none, and for other shards'."""
    index = index - first_class(num_classes, names)
    return jnp.where((index >= 0) & (index < num_classes), index, -1) if names else index
