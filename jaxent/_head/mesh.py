"""The head on a mesh that `jit` splits arrays over: which axis splits what, and `shard_map`.

Left to XLA, a loop over chunks of classes gathers a kernel that is split over them. So the
head's sums are mapped over the mesh here, each device going over its own classes of its own
tokens. On an explicit mesh hidden states and kernel say how they are split, in their types; on
an automatic one, where types do not, the axis names say it.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from .._axes import AxisName, Names, flat_names, in_shard_map, meshes, read_axis_names
from .._sparse import SparseTargets

G = TypeVar("G", bound=Any)  # a named tuple with targets, sample_weight and class_mask


class Layout(NamedTuple):
    """How a head is split, over mapped axes or over those of a mesh."""

    examples: Names = ()
    classes: Names = ()
    width: Names = ()  # of the kernel: each chunk is gathered
    mesh: Any = None  # None: the axes are mapped already, if there are any
    tokens: tuple[Names, ...] = ()  # the mesh's axes of each dimension of the tokens
    owns_all_tokens: bool = True  # whether a call can know that nobody else splits its tokens

    def num_tokens(self, hidden: Array) -> int:
        """Return how many of the tokens a device has."""
        tokens = math.prod(hidden.shape[:-1])
        if self.mesh is None:
            return tokens
        parts: int = math.prod(self.mesh.shape[name] for name in flat_names(self.tokens))
        return tokens // parts

    def of_hidden(self) -> P:
        return P(*map(_entry, self.tokens), None)

    def of_kernel(self, class_axis: int) -> P:
        sides = _entry(self.width), _entry(self.classes)
        return P(*(sides if class_axis else reversed(sides)))

    def of_part(self, shape: tuple[int, ...], whole: tuple[int, ...]) -> P:
        """Return the spec of an array that broadcasts to the logits, or to the tokens."""
        entries = [_entry(names) for names in (*self.tokens, self.classes)][: len(whole)]
        skip = len(whole) - len(shape)
        sizes = zip(entries[skip:], shape, whole[skip:])
        return P(*(entry if size == full else None for entry, size, full in sizes))

    def of_argument(self, logits: tuple[int, ...], x: Array) -> P:
        """Return the spec of an array of the logits' dimensions, or of a scalar."""
        return self.of_part(x.shape, logits) if x.ndim == len(logits) else P()


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
    named = [
        tuple(name for name in flat_names(names) if name not in here)
        for names, here in zip(given.values(), mapped)
    ]
    mesh = next(iter(meshes(hidden, kernel)), None)
    free = _free_axes(mesh)
    partial = mesh is not None and len(free) < len(mesh.axis_names)
    whole = not any(flat_names((*_spec(hidden), *_spec(kernel))))
    typed = AxisType.Explicit in free.values() and not (whole and (partial or any(mapped)))
    if not any(named) and not typed:
        sizes = [mesh.shape[name] for name in free] if mesh else [jax.device_count()]
        examples, classes, width = mapped
        return Layout(
            examples, classes, width, owns_all_tokens=any(mapped) or math.prod(sizes) == 1
        )

    assert mesh is not None  # it has the names, or is in the types
    if partial:
        raise ValueError(
            f"jax.shard_map maps some axes of the mesh here, and {sorted(free)} are left to split "
            "the head, whose gradient JAX cannot compile there; let it map all of them "
            "(axis_names), and pass axis_name, class_axis_name and width_axis_name"
        )
    if mapped[1] or mapped[2]:
        raise ValueError(
            f"{mapped[1] or mapped[2]} are mapped here and split the kernel, which the mesh splits "
            "too: let one of them do it"
        )
    *tokens, features = map(flat_names, _spec(hidden))
    of_kernel = [flat_names(_spec(kernel)[axis]) for axis in (class_axis, 1 - class_axis)]
    split = f"hidden is {list(hidden.shape)}, split as {_spec(hidden)}, kernel "
    split += f"{list(kernel.shape)}, split as {_spec(kernel)}"
    for argument, names, found in zip(given, named, (sum(tokens, ()), *of_kernel)):
        explicit = [n for n in names if free[n] == AxisType.Explicit and mesh.shape[n] > 1]
        if absent := [n for n in explicit if n not in found]:
            raise ValueError(
                f"{split}: not over {absent}, as {argument}={given[argument]!r} says; on an "
                f"explicit mesh leave {argument} out, or split the array by jax.sharding.reshard"
            )

    by_dimension = list(axis_name) if isinstance(axis_name, P) else [named[0]]
    if named[0] and len(by_dimension) > len(tokens):
        raise ValueError(
            f"axis_name={axis_name!r} splits {len(by_dimension)} dimensions of tokens; hidden, "
            f"{list(hidden.shape)}, has {len(tokens)}"
        )
    by_dimension += [()] * (len(tokens) - len(by_dimension))
    automatic = [[n for n in flat_names(e) if free.get(n) == AxisType.Auto] for e in by_dimension]
    tokens = list(map(_union, tokens, automatic))
    classes, width = map(_union, of_kernel, named[1:])
    layout = Layout(mapped[0], classes, width, mesh, tuple(tokens))
    if features:
        raise ValueError(
            f"{split}: its last axis must be whole; pass "
            f"jax.sharding.reshard(hidden, {layout.of_hidden()})"
        )
    _check_axes(split, class_axis, layout)
    check_divisible("hidden", hidden, layout.of_hidden(), mesh)
    check_divisible("kernel", kernel, layout.of_kernel(class_axis), mesh)
    return layout


def _check_axes(split: str, class_axis: int, layout: Layout) -> None:
    tokens = sum(layout.tokens, ())
    if both := set(tokens) & set(layout.classes):
        rest = [tuple(n for n in names if n not in both) for names in layout.tokens]
        hidden = layout._replace(tokens=tuple(rest)).of_hidden()
        raise ValueError(
            f"{split}: {sorted(both)} split the tokens and the classes, and can split only one; "
            f"pass jax.sharding.reshard(hidden, {hidden}), or other axis names"
        )
    if outside := set(layout.width) - set(tokens):
        kernel = layout._replace(width=()).of_kernel(class_axis)
        raise ValueError(
            f"{split}: {sorted(outside)} split the kernel's width and not the tokens; split both "
            f"(axis_name), or pass jax.sharding.reshard(kernel, {kernel})"
        )


def check_divisible(name: str, array: Array, spec: P, mesh: Any) -> None:
    for axis, entry in enumerate(spec):
        parts = math.prod(mesh.shape[n] for n in flat_names(entry))
        if array.shape[axis] % parts:
            raise ValueError(
                f"{name} is {list(array.shape)}: its axis {axis} is split over {entry!r} into "
                f"{parts} parts, which must be alike; pad it, and exclude what was added (classes "
                "by class_mask, tokens by ignore_index or sample_weight)"
            )


def _free_axes(mesh: Any) -> dict[str, AxisType]:
    """Return the axes of a mesh that are not mapped."""
    kinds = zip(mesh.axis_names, mesh.axis_types) if mesh else ()
    return {name: kind for name, kind in kinds if kind != AxisType.Manual}


def _spec(x: Array) -> P:
    spec = jax.typeof(x).sharding.spec
    return P(*spec, *[None] * (x.ndim - len(spec)))


def _union(a: Iterable[str], b: Iterable[str]) -> Names:
    return tuple(dict.fromkeys([*a, *b]))


def _entry(names: Names) -> str | Names | None:
    return names[0] if len(names) == 1 else (names or None)


def on_shards(
    function: Callable[[Array, Array, Any], Any],
    layout: Layout,
    class_axis: int,
    hidden: Array,
    kernel: Array,
    rest: Any,
    out_specs: Any = None,
    specs: Any = None,
) -> Any:
    """Call the function with each device's part, or with all where nothing is split.

    Args:
      rest: a tree of arrays with the logits' dimensions, of sizes that broadcast to theirs, and
        of scalars.
      out_specs: of what comes back, by default a tree of (..., 1); P() for a scalar, the same on
        all devices.
      specs: those of `rest`, where it holds other arrays.
    """
    if layout.mesh is None:
        return function(hidden, kernel, rest)
    logits = (*hidden.shape[:-1], kernel.shape[class_axis])
    if specs is None:
        specs = jax.tree.map(functools.partial(layout.of_argument, logits), rest)
    specs = layout.of_hidden(), layout.of_kernel(class_axis), specs
    free = _free_axes(layout.mesh)
    if AxisType.Explicit in free.values():
        lay_out = functools.partial(_lay_out, layout.mesh, free)
        hidden, kernel, rest = jax.tree.map(lay_out, (hidden, kernel, rest), specs)
    # An explicit axis that splits nothing is left out: it may be one that `vmap` goes over.
    used = {*sum(layout.tokens, ()), *layout.classes, *layout.width}
    names = {name for name, kind in free.items() if name in used or kind == AxisType.Auto}
    if not names:
        return function(hidden, kernel, rest)
    mapped = jax.shard_map(
        function,
        mesh=layout.mesh,
        in_specs=specs,
        out_specs=layout.of_hidden() if out_specs is None else out_specs,
        axis_names=names,
    )
    return mapped(hidden, kernel, rest)


def _lay_out(mesh: Any, free: dict[str, AxisType], x: Array, spec: P) -> Array:
    """Split an array as its type has to say on an explicit mesh, cutting what is whole."""
    wanted = [tuple(n for n in flat_names(e) if free[n] == AxisType.Explicit) for e in spec]
    split: Array = jax.sharding.reshard(x, NamedSharding(mesh, P(*map(_entry, wanted))))
    return split


def gathered_before(layout: Layout) -> tuple[Layout, Names]:
    """Return the layout of a kernel whole along the axes that are returned.

    Of a vmapped custom_vjp the backward pass knows no axis names: no chunk can be gathered there.
    """
    if layout.mesh is None and not in_shard_map(layout.width):
        return layout._replace(width=()), layout.width
    return layout, ()


def lay_out_given(hidden: Array, layout: Layout, num_classes: int, given: G) -> G:
    """Return what was given of the tokens or logits, split on an explicit mesh as hidden is.

    What has few numbers is moved for it; what has the logits' size is not, and raises.
    """
    free = {} if layout.mesh is None else _free_axes(layout.mesh)
    if AxisType.Explicit not in free.values():
        return given
    logits = (*hidden.shape[:-1], num_classes)

    def like_hidden(name: str, x: Any) -> Any:
        if x is None:
            return x
        if isinstance(x, SparseTargets):
            spec = P(*layout.of_part(logits[:-1], logits[:-1]), None)
            return jax.tree.map(lambda part: _lay_out(layout.mesh, free, part, spec), x)
        whole = logits if x.ndim == len(logits) else logits[:-1]
        if x.ndim > len(whole) or (name == "class_mask" and len(whole) < len(logits)):
            return x
        spec = layout.of_part(x.shape, whole)
        moved = any(a and a != b for a, b in zip(_spec(x), spec))
        if moved and len(whole) == len(logits):
            raise ValueError(
                f"{name} is {list(x.shape)}, split as {_spec(x)}, and hidden and kernel are split "
                f"for {spec}: pass jax.sharding.reshard({name}, {spec})"
            )
        return _lay_out(layout.mesh, free, x, spec)

    names = "targets", "sample_weight", "class_mask"
    moved: G = given._replace(**{name: like_hidden(name, getattr(given, name)) for name in names})
    return moved
