"""The classifier head and the loss in one: linear_cross_entropy.
"""
import jax
import jax.numpy as jnp
from ._head import Head, Plan, head_sums, head_total, choose_chunk, prefers_total
from ._arguments import *
from ._reduction import reduce
from ._targets import read_rows
from .functional import loss_terms
import dataclasses
from ._arguments import check_reduction, read_softcap, read_z_loss
from ._softmax import compute_dtype

def linear_cross_entropy(hidden, kernel, targets, *, bias=None, class_axis=-1, dtype=None, precision=None, chunk_size=None,
    weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, sample_weight=None, class_mask=None, z_loss=0.0, softcap=None):
    check_reduction(reduction)
    hidden, kernel = jnp.asarray(hidden), jnp.asarray(kernel)
    class_axis %= 2
    dt = jnp.dtype(dtype) if dtype is not None else jnp.result_type(hidden, kernel)
    C = kernel.shape[class_axis]
    lead = hidden.shape[:-1]
    logits = jax.ShapeDtypeStruct(lead + (C,), dt)
    rows = read_rows(logits, targets, name="hidden @ kernel", weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, axis=-1, sample_weight=sample_weight, class_mask=class_mask)
    rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]) if x.ndim else x, dataclasses.replace(rows, axis=1))
    h = hidden.reshape(-1, hidden.shape[-1])
    h = jnp.where((rows.sample_weight == 0) & ~jnp.all(jnp.isfinite(h), -1, keepdims=True), 0, h)
    plan = Plan(class_axis, chunk_size or choose_chunk(h.shape[0], C), dt, precision, read_softcap(softcap))
    wide = compute_dtype(plan)
    head = Head(h, kernel, None if bias is None else jnp.asarray(bias)[None], rows.mass)
    z = read_z_loss(z_loss, wide)
    scalars = dataclasses.replace(rows, exists=None, index=None, mass=None)
    if reduction != "none" and prefers_total(plan, head):
        ds = [1.0, 1.0]
        if reduction == "mean":
            ds = [jnp.sum(rows.denominator), jnp.sum(rows.sample_weight)]
            ds = [jnp.where(d == 0, 1, d) for d in ds]
        return head_total(plan, _terms, head, (scalars, z, jnp.asarray(ds[0],wide), jnp.asarray(ds[1],wide)), rows.exists, rows.index)
    shift, sums, _ = head_sums(plan, head, rows.exists, rows.index)
    out = reduce(loss_terms(rows, z, shift, sums), 1, reduction, None)
    return out.reshape(lead) if reduction == "none" else out

def _terms(scalars, shift, sums):
    rows, z, *ds = scalars
    return sum(n / d for (n, _), d in zip(loss_terms(rows, z, shift, sums), ds))
