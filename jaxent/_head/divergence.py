"""The divergence of a student's head from a teacher's, whole: streamed, neither's logits held.

A first pass over chunks of classes sums up each head's exponentials, a second one the terms of the
divergence and of statistics, which need the normalizers of both, and a third the gradients of the
student. All compute a chunk's logits anew. As in `streaming`, tangents are scans of their own, so
nothing of the size tokens x classes is held in second order either.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import (
    SymbolicZero,
    custom_vjp_primal_tree_values,
    zero_from_primal,
)

from .._axes import Names, psum, vary_alike, vary_like
from .._divergence import (
    Form,
    Softmax,
    Sums,
    Values,
    asked,
    combine_rests,
    divergence_gradients,
    moved,
    stats_of,
    sum_of_others,
    sums_of,
    values_of,
)
from .._numerics import compute_dtype
from .._reduction import TokenStats
from .._rows import combine_argmax, first_best
from .._xla import is_inside, is_widened_on_cpu, scatter_slice, with_cpu_plan
from .chunks import (
    Chunk,
    Fixed,
    Head,
    Plan,
    Pull,
    accumulate,
    blank_hidden,
    blocks_of,
    chunk_logits_and_pull,
    chunk_numbers,
    gradients_of_logits,
    on_platform,
    read_chunk,
    scatter_width,
    transform_of,
    whole,
    zero_gradients,
)
from .streaming import cast_like, finer

R = TypeVar("R")


class Pair(NamedTuple):
    """What there is of the student and of the teacher."""

    student: Any
    teacher: Any

    def by_token(self, function: Any) -> "Pair":
        """Return it with what is of each token put through a function."""
        return Pair(self.student.by_token(function), self.teacher.by_token(function))


@dataclasses.dataclass(frozen=True)
class Plans:
    """What is static. Both plans have the same chunks of classes and blocks of tokens."""

    student: Plan
    teacher: Plan
    form: Form
    cpu_chunk: Any = None  # classes in a chunk on a CPU, where that is another number

    @property
    def dtype(self) -> Any:
        """The dtype of the divergence."""
        return compute_dtype(self.student, self.teacher)

    def both(self, function: Callable[[Plan], Plan]) -> "Plans":
        """Return them with both plans put through a function."""
        pair = Pair(function(self.student), function(self.teacher))
        return dataclasses.replace(self, student=pair.student, teacher=pair.teacher)

    @property
    def pair(self) -> Pair:
        return Pair(self.student, self.teacher)


class Tokens(NamedTuple):
    """Arrays of one value a token, (N, 1)."""

    values: Any

    def by_token(self, function: Any) -> "Tokens":
        """Return them put through a function."""
        return Tokens(jax.tree.map(function, self.values))


class Floats(NamedTuple):
    """What is differentiated."""

    heads: Pair  # of Head
    rests: Any  # a Pair, of the softmax of each token, (N, 1)
    coolness: Any  # 1 / T, a scalar, or None
    beta: Any  # a scalar, or None


class Around(NamedTuple):
    """What is known of all chunks when gradients are made."""

    sums: Sums  # over all classes, (N, 1)
    cotangents: Values


def head_divergences(
    plans: Plans,
    heads: Pair,
    fixed: Pair,
    coolness: Any,
    beta: Any,
    sample_weight: Array,
    classes: Names,
) -> tuple[Array, TokenStats | None]:
    """Return the divergence of each token, (N, 1), and the statistics that the form asks for.

    Args:
      plans: the static part. With `skip`, what there is of a token that is uncounted is 0, unless
        somebody differentiates the sample weight.
      heads: hidden states, kernel, bias and scale of each, which have no mass.
      fixed: which classes exist and uncounted tokens, the same for both; and the cap of each.
      coolness, beta: as in `_divergence.row_divergences`.
      sample_weight: (N, 1), which is only asked whether it is differentiated.
      classes: mapped axes over which the classes are split.
    """
    heads = heads._replace(teacher=jax.lax.stop_gradient(heads.teacher))
    uncounted = fixed.student.uncounted
    same_coolness = coolness  # on all shards of the classes, as the statistics are
    heads, fixed, coolness, beta, sample_weight = vary_alike(
        heads, fixed, coolness, beta, sample_weight
    )

    def read(plan: Plan, head: Head, fixed: Fixed) -> tuple[Softmax, Any]:
        arguments = plan, plans.dtype, head, fixed, coolness, sample_weight
        shift, rest, prediction = _streamed_rest(*arguments)
        shift = jax.lax.stop_gradient(shift)
        if prediction is not None:
            num_classes = head.kernel.shape[plan.class_axis]
            prediction, _ = combine_argmax(shift, prediction, num_classes, classes)
        softmax = Softmax(None, transform_of(head, fixed), shift, rest)
        return combine_rests(softmax, coolness, classes), prediction

    (student, prediction), (teacher, target) = map(read, plans.pair, heads, fixed)
    shifts, rests = Pair(student.shift, teacher.shift), Pair(student.rest, teacher.rest)
    floats = Floats(heads, rests, coolness, beta)
    parts = _streamed_terms(plans, floats, fixed, shifts, sample_weight)
    sums = psum(parts, classes)
    lost = uncounted & ~jnp.isfinite(jax.lax.stop_gradient(sums.divergence))
    sums = jax.tree.map(lambda x: jnp.where(lost, 0, x), sums)
    values = values_of(student, parts, classes)
    varying = vary_alike(values, floats, fixed, shifts, sums)
    values = psum(_with_gradient(plans, *varying), classes)
    divergence = jnp.where(lost, 0, values.divergence)
    predictions = prediction, target
    return divergence, stats_of(values, student.shift, predictions, same_coolness, uncounted)


# As `_divergence._with_gradient`.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradient(
    plans: Plans, values: Values, floats: Floats, fixed: Pair, shifts: Pair, sums: Sums
) -> Values:
    """Return the values, whose gradients these are: the other sums are constants to them."""
    return values


def _with_gradient_fwd(plans: Plans, values: Any, *arguments: Any) -> tuple[Values, Any]:
    primals: tuple[Values, Any] = custom_vjp_primal_tree_values((values, arguments))
    return primals


def _with_gradient_bwd(plans: Plans, arguments: Any, cotangents: Any) -> tuple[Any, ...]:
    floats, fixed, shifts, sums = arguments
    form, sums, cotangents = asked(plans.form, sums, cotangents)
    plans, around = dataclasses.replace(plans, form=form), Around(sums, cotangents)
    head, d_coolness, d_beta = _gradients(plans, (floats, around), fixed, shifts)
    head = blank_hidden(head, fixed.student.uncounted)
    return None, Floats(Pair(head, None), None, d_coolness, d_beta), None, None, None


_with_gradient.defvjp(_with_gradient_fwd, _with_gradient_bwd, symbolic_zeros=True)


# ---- The passes ------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _streamed_rest(
    plan: Plan, dtype: Any, head: Head, fixed: Fixed, coolness: Any, sample_weight: Array
) -> tuple[Array, Array, Array | None]:
    """Return shift and rest of each token's softmax, (N, 1); 0 for those that are skipped.

    The third is its most probable class, for statistics alone.
    """

    def function(plan: Plan, *arguments: Any) -> tuple[Array, Array, Array | None]:
        return _rest_pass(dtype, plan, *arguments)

    return on_platform(function, plan, head, fixed, coolness)


def _rest_pass(
    dtype: Any, plan: Plan, head: Head, fixed: Fixed, coolness: Any
) -> tuple[Array, Array, Array | None]:
    blocks = blocks_of(plan, fixed)
    head, fixed = head.by_token(blocks.first), fixed.by_token(blocks.first)

    def turn(rows: Any, chunk: Chunk, fixed: Fixed) -> tuple[Any, None]:
        shift, rest, best = rows
        softmax = _softmax(plan, chunk, fixed, shift)
        z = softmax.z
        if chunk.class_mask is not None:
            z = jnp.where(chunk.class_mask, z, -jnp.inf)
        top = jnp.max(z, -1, keepdims=True)
        is_largest = top > shift
        first = first_best(z, -1)
        if best is not None:
            stays = is_largest | (jnp.isnan(top) & ~jnp.isnan(shift))  # as argmax
            best = jnp.where(stays, chunk.start + first, best)
        top = jnp.maximum(shift, top)
        apart = jnp.where(is_largest, first, -1)
        before = moved(jnp.where(is_largest, shift - top, 0), rest, coolness)
        # None is apart where XLA computes no z as it did its maximum: its 1 is among the others.
        before -= jnp.where(is_inside(apart, -1, z), 0, 1)
        softmax = softmax._replace(shift=top)
        others = sum_of_others(-1, softmax, chunk.class_mask, coolness, apart)
        return (top, jnp.where(is_largest, before, rest) + others, best), None

    def step(rows: Any, i: Array) -> tuple[Any, None]:
        return blocks.run(turn, rows, read_chunk(plan, head, fixed, i), fixed)

    zeros = jnp.zeros((head.hidden.shape[0], 1), dtype)
    first = jnp.zeros(zeros.shape, jnp.int32) if plan.stats else None
    none = vary_like(head.hidden, (zeros + jnp.finfo(dtype).min, zeros - 1, first))
    rows, _ = jax.lax.scan(step, none, chunk_numbers(plan, head))
    return _back(plan, blocks, rows)


def _streamed_rest_jvp(
    plan: Plan, dtype: Any, primals: Any, tangents: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    head, fixed, coolness, _ = primals
    shift, rest, best = _streamed_rest(_whole_if(plan, tangents[-1]), dtype, *primals)
    plan = finer(whole(plan))
    no_class = jnp.full(shift.shape, -1, jnp.int32)

    def local(floats: Any, i: Array) -> Array:
        head, coolness = floats
        chunk = read_chunk(plan, head, fixed, i)
        softmax = _softmax(plan, chunk, fixed, shift)
        return sum_of_others(-1, softmax, chunk.class_mask, coolness, no_class)

    floats, d_floats = (head, coolness), (tangents[0], tangents[2])
    d_rest = _sum_of_tangents(plan, head, local, floats, d_floats, jnp.zeros_like(rest))
    d_best = None if best is None else zero_from_primal(best)
    return (shift, rest, best), (jnp.zeros_like(shift), d_rest, d_best)


_streamed_rest.defjvp(_streamed_rest_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _streamed_terms(
    plans: Plans, floats: Floats, fixed: Pair, shifts: Pair, sample_weight: Array
) -> Sums:
    """Return the sums of each token, (N, 1); 0 for those that are skipped."""
    return _on_platform(_terms_pass, plans, floats, fixed, shifts)


def _terms_pass(plans: Plans, floats: Floats, fixed: Pair, shifts: Pair) -> Sums:
    blocks = blocks_of(plans.student, fixed.student)
    heads, fixed = floats.heads.by_token(blocks.first), fixed.by_token(blocks.first)
    tokens = Tokens((shifts, floats.rests)).by_token(blocks.first)

    def turn(sums: Sums, chunks: Pair, fixed: Pair, tokens: Tokens) -> tuple[Sums, None]:
        softmaxes, _ = _softmaxes(plans, chunks, fixed, *tokens.values)
        part = _chunk_sums(plans, softmaxes, chunks, floats.coolness, floats.beta)
        return jax.tree.map(jnp.add, sums, part), None

    def step(sums: Sums, i: Array) -> tuple[Sums, None]:
        after: tuple[Sums, None]
        after = blocks.run(turn, sums, _read_chunks(plans, heads, fixed, i), fixed, tokens)
        return after

    zeros = jnp.zeros((heads.student.hidden.shape[0], 1), plans.dtype)
    others = (zeros, zeros) if plans.form.stats else ()
    none = vary_like(heads.student.hidden, Sums(zeros, zeros, zeros, *others))
    sums, _ = jax.lax.scan(step, none, chunk_numbers(plans.student, heads.student))
    back: Sums = _back(plans.student, blocks, sums)
    return back


def _streamed_terms_jvp(plans: Plans, primals: Any, tangents: Any) -> tuple[Sums, Sums]:
    floats, fixed, shifts, _ = primals
    reached = plans.both(lambda plan: _whole_if(plan, tangents[-1]))
    sums = _streamed_terms(reached, *primals)
    fine = plans.both(lambda plan: finer(whole(plan)))

    def local(floats: Floats, i: Array) -> Sums:
        chunks = _read_chunks(fine, floats.heads, fixed, i)
        softmaxes, _ = _softmaxes(fine, chunks, fixed, shifts, floats.rests)
        return _chunk_sums(fine, softmaxes, chunks, floats.coolness, floats.beta)

    zeros = jax.tree.map(jnp.zeros_like, sums)
    head = floats.heads.student
    return sums, _sum_of_tangents(fine.student, head, local, floats, tangents[0], zeros)


_streamed_terms.defjvp(_streamed_terms_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradients(
    plans: Plans, floats: tuple[Floats, Around], fixed: Pair, shifts: Pair
) -> tuple[Head, Any, Any]:
    """Return the gradients of the student's head, in its dtypes, of the coolness and of beta."""
    return _on_platform(_gradients_pass, plans, floats, fixed, shifts)


def _gradients_pass(
    plans: Plans, floats: tuple[Floats, Around], fixed: Pair, shifts: Pair
) -> tuple[Head, Any, Any]:
    of_heads, around = floats
    blocks = blocks_of(plans.student, fixed.student)
    heads, fixed = of_heads.heads.by_token(blocks.first), fixed.by_token(blocks.first)
    tokens = Tokens((shifts, of_heads.rests, around)).by_token(blocks.first)
    head = heads.student

    def turn(d_hidden: Array, chunks: Pair, fixed: Pair, tokens: Tokens) -> tuple[Array, Any]:
        *known, around = tokens.values
        softmaxes = _softmaxes(plans, chunks, fixed, *known)
        part, scalars = _chunk_gradients(plans, *softmaxes, chunks, of_heads, around)
        return d_hidden + part.hidden, (part._replace(hidden=None), scalars)

    def step(total: Any, i: Array) -> tuple[Any, None]:
        gradients, scalars = total
        chunks = _read_chunks(plans, heads, fixed, i)
        d_hidden, (part, more) = blocks.run(turn, gradients.hidden, chunks, fixed, tokens)
        gradients = gradients._replace(hidden=d_hidden)
        part, start = scatter_width(plans.student, part), chunks.student.start
        gradients = accumulate(plans.student, head, gradients, part, start)
        return (gradients, jax.tree.map(jnp.add, scalars, more)), None

    zeros = zero_gradients(plans.student, head), _zero_scalars(plans, head)
    (gradients, scalars), _ = jax.lax.scan(step, zeros, chunk_numbers(plans.student, head))
    return cast_like(gradients, head).by_token(blocks.back), *scalars


def _gradients_jvp(plans: Plans, primals: Any, tangents: Any) -> tuple[Any, Any]:
    floats, fixed, shifts = primals
    head = floats[0].heads.student
    moving, d_moving, put_back = _moving(floats, tangents[0])
    fine = plans.both(lambda plan: finer(whole(plan)))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(total: Any, i: Array) -> tuple[Any, None]:
        def part(moving: Any) -> Any:
            of_heads, around = put_back(moving)
            chunks = _read_chunks(fine, of_heads.heads, fixed, i)
            softmaxes = _softmaxes(fine, chunks, fixed, shifts, of_heads.rests)
            gradients, scalars = _chunk_gradients(fine, *softmaxes, chunks, of_heads, around)
            return (scatter_width(fine.student, gradients), scalars), chunks.student.start

        _, (d_part, more), start = jax.jvp(part, (moving,), (d_moving,), has_aux=True)
        gradients, scalars = total
        gradients = accumulate(fine.student, head, gradients, d_part, start, scatter_slice)
        return (gradients, jax.tree.map(jnp.add, scalars, more)), None

    zeros = zero_gradients(fine.student, head), _zero_scalars(fine, head)
    (d_gradients, d_scalars), _ = jax.lax.scan(step, zeros, chunk_numbers(fine.student, head))
    return _gradients(plans, *primals), (cast_like(d_gradients, head), *d_scalars)


_gradients.defjvp(_gradients_jvp, symbolic_zeros=True)


# ---- A chunk ---------------------------------------------------------------------------------


def _read_chunks(plans: Plans, heads: Pair, fixed: Pair, i: Array) -> Pair:
    return Pair(*(read_chunk(*each, i) for each in zip(plans.pair, heads, fixed)))


def _softmax(plan: Plan, chunk: Chunk, fixed: Fixed, shift: Array) -> Softmax:
    logits, _ = chunk_logits_and_pull(plan, chunk.head)  # which has derivatives in every mode
    return Softmax(logits, transform_of(chunk.head, fixed), shift)


def _softmaxes(
    plans: Plans, chunks: Pair, fixed: Pair, shifts: Pair, rests: Pair
) -> tuple[Pair, Pull]:
    """Return both, and what takes the gradient of the student's logits to its head's."""
    logits, pulls = zip(*(chunk_logits_and_pull(p, c.head) for p, c in zip(plans.pair, chunks)))
    transforms = (transform_of(c.head, f) for c, f in zip(chunks, fixed))
    return Pair(*map(Softmax, logits, transforms, shifts, rests)), pulls[0]


def _chunk_sums(plans: Plans, softmaxes: Pair, chunks: Pair, coolness: Any, beta: Any) -> Sums:
    return sums_of(-1, plans.form, *softmaxes, chunks.student.class_mask, coolness, beta)


def _chunk_gradients(
    plans: Plans, softmaxes: Pair, pull: Pull, chunks: Pair, floats: Floats, around: Around
) -> tuple[Head, tuple[Any, Any]]:
    """Return what a chunk adds to the student's gradients, and to those of coolness and beta."""
    chunk = chunks.student
    d_logits, d_transform, *scalars = divergence_gradients(
        -1, plans.form, *softmaxes, chunk.class_mask, floats.coolness, floats.beta, *around
    )
    gradients = gradients_of_logits(chunk.head, pull, d_logits, d_transform.scale)
    return gradients, (scalars[0], scalars[1])


def _zero_scalars(plans: Plans, head: Head) -> tuple[Any, Any]:
    zero = vary_like(head.hidden, jnp.zeros((), plans.dtype))
    form = plans.form
    return zero if form.by_temperature else None, zero if form.by_beta else None


# ---- What the passes have in common ----------------------------------------------------------


def _on_platform(function: Callable[..., R], plans: Plans, *arguments: Any) -> R:
    """Call the function with the plans of the platform: see `chunks.on_platform`."""

    def on_cpu(plan: Plan) -> Plan:
        chunk = plans.cpu_chunk or plan.chunk
        return dataclasses.replace(plan, cpu=is_widened_on_cpu(plan.dtype), chunk=chunk)

    cpu_plans = plans.both(on_cpu)
    if cpu_plans == plans:
        return function(plans, *arguments)
    return with_cpu_plan(function, plans, cpu_plans, *arguments)


def _back(plan: Plan, blocks: Any, rows: R) -> R:
    """Return what was made of each token in its order, 0 for those in no block."""
    if plan.skip:
        skipped = blocks.unreached()
        rows = jax.tree.map(lambda x: jnp.where(skipped, 0, x), rows)
    back: R = jax.tree.map(blocks.back, rows)
    return back


def _whole_if(plan: Plan, d_sample_weight: Any) -> Plan:
    """Return the plan, of all tokens where somebody differentiates the sample weight."""
    return plan if isinstance(d_sample_weight, SymbolicZero) else whole(plan)


def _moving(floats: R, tangents: Any) -> tuple[list[Array], list[Array], Callable[[Any], R]]:
    """Return what has tangents, those, and a function that puts it back among what has none.

    The zeros of a teacher's kernel would be as large as it is.
    """
    leaves, structure = jax.tree.flatten(floats)
    d_leaves = jax.tree.leaves(tangents, is_leaf=lambda x: isinstance(x, SymbolicZero))
    moves = [not isinstance(tangent, SymbolicZero) for tangent in d_leaves]

    def put_back(moving: Any) -> R:
        found = iter(moving)
        values = [next(found) if m else x for x, m in zip(leaves, moves)]
        whole: R = jax.tree.unflatten(structure, values)
        return whole

    moving, d_moving = ([x for x, m in zip(xs, moves) if m] for xs in (leaves, d_leaves))
    return moving, d_moving, put_back


def _sum_of_tangents(
    plan: Plan, head: Head, local: Callable[..., R], floats: Any, d_floats: Any, zeros: R
) -> R:
    """Return the tangent of the sum of `local(floats, i)` over chunks, which holds none of them."""
    moving, d_moving, put_back = _moving(floats, d_floats)

    # A program of its own: JAX leaves out the transpose of that where the cotangent is 0, as it is
    # here in first order, and of a scan it does not (jax 0.10.2 to 0.12.0.1).
    @jax.jit
    def scanned(d_moving: Any) -> Any:
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def step(total: Any, i: Array) -> tuple[Any, None]:
            part = jax.jvp(lambda moving: local(put_back(moving), i), (moving,), (d_moving,))[1]
            return jax.tree.map(jnp.add, total, part), None

        return jax.lax.scan(step, vary_like(head.hidden, zeros), chunk_numbers(plan, head))[0]

    summed: R = scanned(d_moving)
    return summed
