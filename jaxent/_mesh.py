"""The head on a mesh that `jit` splits arrays over: which axis splits what, and `shard_map`.

Left to XLA, a loop over chunks of classes gathers a kernel that is split over them. So the
head's sums are mapped over the mesh here, each device going over its own classes of its own
tokens. On an explicit mesh hidden states and kernel say how they are split, in their types; on
an automatic one, where types do not, the axis names say it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ._axes import AxisName, Names, flat_names, meshes, read_axis_names


class Layout(NamedTuple):
    """How a head is split, over mapped axes or over those of a mesh."""

    examples: Names = ()
    classes: Names = ()
    width: Names = ()  # of the kernel: each chunk is gathered
    mesh: Any = None  # None: the axes are mapped already, if there are any
    tokens: tuple[Names, ...] = ()  # the mesh's axes of each dimension of the tokens
    alone: bool = True  # whether a call can know that nobody else splits its tokens


def read_layout(
    hidden: Array,
    kernel: Array,
    class_axis: int,
    axis_name: AxisName,
    class_axis_name: AxisName,
    width_axis_name: AxisName,
) -> Layout:
    given = {
        "axis_name": axis_name,
        "class_axis_name": class_axis_name,
        "width_axis_name": width_axis_name,
    }
    mapped = read_axis_names(hidden, kernel, **given)
    mesh = next(iter(meshes(hidden, kernel)), None)
    free = {}
    if mesh is not None:
        kinds = dict(zip(mesh.axis_names, mesh.axis_types))
        free = {name: kind for name, kind in kinds.items() if kind != AxisType.Manual}
    on_mesh = {
        argument: tuple(n for n in flat_names(names) if n in free and n not in here)
        for (argument, names), here in zip(given.items(), mapped)
    }
    if not any(on_mesh.values()) and AxisType.Explicit not in free.values():
        return Layout(*mapped, alone=any(mapped) or _is_alone(mesh, free))
    for argument, here in zip(given, mapped):
        if here and on_mesh[argument]:
            raise ValueError(
                f"{argument}={given[argument]!r} names axes that are mapped here and axes of the "
                "mesh: map all of them, or none"
            )

    of_hidden, of_kernel = ([flat_names(entry) for entry in _spec(x)] for x in (hidden, kernel))
    shapes = f"hidden is {list(hidden.shape)}, split as {_spec(hidden)}; kernel is "
    shapes += f"{list(kernel.shape)}, split as {_spec(kernel)}"
    *tokens, features = of_hidden
    wanted = list(axis_name) if isinstance(axis_name, P) else [on_mesh["axis_name"]]
    if len(wanted) > len(tokens) and on_mesh["axis_name"]:
        raise ValueError(
            f"axis_name={axis_name!r}: hidden is {list(hidden.shape)}, and has {len(tokens)} "
            "dimensions of tokens to split"
        )
    wanted = [[n for n in flat_names(entry) if n in on_mesh["axis_name"]] for entry in wanted]
    wanted += [[]] * (len(tokens) - len(wanted))
    # An automatic axis is in no type; an explicit one is named rightly or not at all.
    automatic = [[n for n in names if free[n] == AxisType.Auto] for names in wanted]
    _check_explicit(shapes, axis_name=(on_mesh["axis_name"], sum(tokens, ()), free))
    tokens = tuple(tuple(dict.fromkeys([*a, *b])) for a, b in zip(tokens, automatic))
    sides = []
    for argument, side in (
        ("class_axis_name", of_kernel[class_axis]),
        ("width_axis_name", of_kernel[1 - class_axis]),
    ):
        _check_explicit(shapes, **{argument: (on_mesh[argument], side, free)})
        sides.append(tuple(dict.fromkeys([*side, *on_mesh[argument]])))
    classes, width = sides
    of_tokens = sum(tokens, ())
    if features:
        raise ValueError(
            f"{shapes}: the last axis of hidden must be whole; pass "
            f"jax.sharding.reshard(hidden, {P(*map(_entry, tokens), None)})"
        )
    if both := set(of_tokens) & set(classes):
        rest = P(*(_entry(tuple(n for n in names if n not in both)) for names in tokens), None)
        raise ValueError(
            f"{shapes}: {sorted(both)} split the tokens and the classes, and can split only one; "
            f"pass jax.sharding.reshard(hidden, {rest})"
        )
    if not set(width) <= set(of_tokens):
        whole = [None, _entry(classes)][:: 1 if class_axis else -1]
        raise ValueError(
            f"{shapes}: {sorted(set(width) - set(of_tokens))} split the kernel's width and must "
            "split the tokens too (axis_name); or pass jax.sharding.reshard(kernel, "
            f"{P(*whole)})"
        )
    layout = Layout(mapped[0], mapped[1] or classes, mapped[2] or width, mesh, tokens)
    _check_divisible(hidden, kernel, class_axis, layout)
    return layout


def _is_alone(mesh, free):
    if mesh is None:
        return jax.device_count() == 1
    return math.prod(mesh.shape[name] for name in free) == 1


def _spec(x):
    spec = jax.typeof(x).sharding.spec
    return P(*spec, *[None] * (x.ndim - len(spec)))


def _entry(names):
    return names[0] if len(names) == 1 else (names or None)


def _check_explicit(shapes, **named):
    ((argument, (given, found, free)),) = named.items()
    absent = [n for n in given if free[n] == AxisType.Explicit and n not in found]
    if absent:
        raise ValueError(
            f"{shapes}: that does not agree with {argument}={_entry(given)!r}; on an explicit mesh "
            f"leave {argument} out, or jax.sharding.reshard the array"
        )


def _check_divisible(hidden, kernel, class_axis, layout):
    sides = (layout.width, layout.classes)[:: 1 if class_axis else -1]
    for name, array, split in (
        ("hidden", hidden, layout.tokens),
        ("kernel", kernel, sides),
    ):
        for axis, names in enumerate(split):
            parts = math.prod(layout.mesh.shape[n] for n in names if n in layout.mesh.shape)
            if array.shape[axis] % parts:
                raise ValueError(
                    f"{name} is {list(array.shape)}: its axis {axis} is split over {_entry(names)!r}"
                    f" into {parts} parts, which must be alike; pad it, and exclude what was added "
                    "(classes by class_mask, tokens by ignore_index or sample_weight)"
                )


def on_shards(
    function: Callable, layout: Layout, class_axis: int, hidden, kernel, rest, scalar=False
) -> Any:
    """`function(hidden, kernel, rest)` of each device's part, or of all where nothing is split.

    Args:
      rest: a tree of arrays with the logits' dimensions, of sizes that broadcast to theirs, and
        of scalars.
      scalar: whether a scalar comes back, the same on all devices, and not a tree of (..., 1).
    """
    if layout.mesh is None:
        return function(hidden, kernel, rest)
    logits = (*hidden.shape[:-1], kernel.shape[class_axis])

    def spec_of(x):
        if x.ndim < len(logits):
            return P()
        entries = (*layout.tokens, layout.classes)
        return P(
            *(_entry(names) if a == b else None for names, a, b in zip(entries, x.shape, logits))
        )

    of_hidden = P(*map(_entry, layout.tokens), None)
    of_kernel = P(*map(_entry, (layout.width, layout.classes)[:: 1 if class_axis else -1]))
    specs = of_hidden, of_kernel, jax.tree.map(spec_of, rest)
    arguments = jax.tree.map(
        functools.partial(_lay_out, layout.mesh), (hidden, kernel, rest), specs
    )
    names = {
        n for n, k in zip(layout.mesh.axis_names, layout.mesh.axis_types) if k != AxisType.Manual
    }
    mapped = jax.shard_map(
        function,
        mesh=layout.mesh,
        in_specs=specs,
        out_specs=P() if scalar else of_hidden,
        axis_names=names,
    )
    return mapped(*arguments)


def _lay_out(mesh, x, spec):
    """On an explicit mesh, split as `shard_map` wants it. What is whole on each device is cut."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    if AxisType.Explicit not in kinds.values():
        return x
    wanted = [tuple(n for n in flat_names(e) if kinds[n] == AxisType.Explicit) for e in spec]
    return jax.sharding.reshard(x, NamedSharding(mesh, P(*map(_entry, wanted))))
