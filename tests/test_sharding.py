"""Law 11: a loss over shards is the loss of the whole, and so are its gradients.

Eight devices on the host. The first half splits the examples over a mapped axis and names
it (`axis_name`); the second lets `jit` split them, and reads off the compiled program that
no array was gathered for it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import MESHES, SHARDS, assert_equal, auto_mesh, collectives, floats, jit, laid_out

import jaxent

EACH, C = 4, 5
N = SHARDS * EACH


# ---- The batch -------------------------------------------------------------------------
#
# Shard 0 counts all of its examples, shard 1 ignores one target, shard 2 none is counted
# in (and one of its rows is NaN), shard 3 counts one alone, shard 5 has sample weights of 0.
# Class 3 is the one that `class_mask` excludes; no target is in it.


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(N, C)).astype(np.float32)
    logits[9] = np.nan
    labels = rng.choice([0, 1, 2, 4], size=N).astype(np.int32)
    labels[[5, 8, 9, 10, 11, 12, 13, 15]] = -100
    sample_weight = rng.uniform(0.5, 2, size=N).astype(np.float32)
    sample_weight[[8, 9, 10, 11, 20, 22]] = 0
    probabilities = rng.uniform(size=(N, C)).astype(np.float32)
    probabilities[:, 3] = 0
    probabilities /= probabilities.sum(-1, keepdims=True)
    exists = np.ones((N, C), bool)
    exists[:, 3] = False
    exists[29] = False  # no class is left
    return {
        "logits": logits,
        "labels": labels,
        "probabilities": probabilities,
        "sample_weight": sample_weight,
        "exists": exists,
        "weight": np.array([1.0, 0.5, 2.0, 4.0, 0.25], np.float32),
        "class_mask": np.array([True, True, True, False, True]),
        "label_smoothing": np.float32(0.1),
        "z_loss": np.float32(0.01),
    }


def take(*names):
    return {name: jnp.asarray(batch()[name]) for name in names}


def cross_entropy(sharded, shared, **static):
    sharded = dict(sharded)
    targets = sharded.pop("labels" if "labels" in sharded else "probabilities")
    if "exists" in sharded:
        sharded["class_mask"] = sharded.pop("exists")
    return jaxent.cross_entropy(sharded.pop("logits"), targets, **sharded, **shared, **static)


def nll(sharded, shared, **static):
    sharded = dict(sharded)
    targets = sharded.pop("labels" if "labels" in sharded else "probabilities")
    return jaxent.nll(sharded.pop("logits"), targets, **sharded, **shared, **static)


def total_weight(sharded, shared, **static):
    sharded = dict(sharded)
    return jaxent.total_weight(sharded.pop("labels"), **sharded, **shared, **static)


def linear_model(sharded, shared, **static):
    """A layer whose kernel all shards have, and the loss of its logits."""
    shared = dict(shared)
    logits = jnp.nan_to_num(sharded["logits"]) @ shared.pop("kernel")
    return cross_entropy(dict(sharded, logits=logits), shared, **static)


def prior(sharded, shared, **static):
    """Logits that all shards have, alike for all examples: a model of class frequencies."""
    shared = dict(shared)
    targets = sharded["labels" if "labels" in sharded else "probabilities"]
    logits = jnp.broadcast_to(shared.pop("bias"), (targets.shape[0], C))
    return cross_entropy(dict(sharded, logits=logits), shared, **static)


def as_bfloat16(tree):
    return dict(tree, logits=tree["logits"].astype(jnp.bfloat16))


def with_dimension(tree):
    """Logits (N, C, 3) and labels (N, 3), PyTorch's class axis."""
    return {
        "logits": jnp.stack([tree["logits"], 2 * tree["logits"], -tree["logits"]], -1),
        "labels": jnp.stack([tree["labels"], tree["labels"], jnp.minimum(tree["labels"], 1)], -1),
    }


kernel = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(C, C)), jnp.float32)}
bias = {"bias": kernel["kernel"][0]}

# name: (function, what is split over the shards, what all of them have, static options)
LOSSES = {
    "indices": (cross_entropy, take("logits", "labels"), {}, {}),
    "indices, every option": (
        cross_entropy,
        take("logits", "labels", "sample_weight"),
        take("weight", "class_mask", "label_smoothing", "z_loss"),
        {"softcap": 3.0},
    ),
    "indices, K dimensions, sum": (
        cross_entropy,
        with_dimension(take("logits", "labels")),
        take("weight", "label_smoothing", "z_loss"),
        {"axis": 1, "ignore_index": -100, "reduction": "sum"},
    ),
    "indices, an ignored class": (
        cross_entropy,
        take("logits", "labels", "sample_weight"),
        take("weight"),
        {"ignore_index": 2},
    ),
    "indices, bfloat16": (
        cross_entropy,
        as_bfloat16(take("logits", "labels", "sample_weight")),
        take("weight", "z_loss"),
        {},
    ),
    "probabilities": (
        cross_entropy,
        {k: jnp.nan_to_num(v) for k, v in take("logits", "probabilities").items()},
        {},
        {},
    ),
    "probabilities, every option": (
        cross_entropy,
        take("logits", "probabilities", "sample_weight", "exists"),
        take("weight", "label_smoothing", "z_loss"),
        {"softcap": 3.0},
    ),
    "probabilities, sum": (
        cross_entropy,
        take("logits", "probabilities", "sample_weight"),
        take("weight", "class_mask"),
        {"reduction": "sum"},
    ),
    "nll, indices": (
        nll,
        take("logits", "labels", "sample_weight"),
        take("weight"),
        {},
    ),
    "nll, probabilities": (
        nll,
        take("logits", "probabilities", "sample_weight"),
        take("weight"),
        {},
    ),
    "linear model": (
        linear_model,
        take("logits", "labels", "sample_weight"),
        take("weight", "label_smoothing", "z_loss") | kernel,
        {},
    ),
    "prior, indices": (
        prior,
        take("labels", "sample_weight"),
        take("label_smoothing", "z_loss") | bias,
        {},
    ),
    "prior, probabilities": (
        prior,
        take("probabilities", "sample_weight"),
        take("weight") | bias,
        {},
    ),
    "total_weight": (total_weight, take("labels", "sample_weight"), take("weight"), {}),
}
LOSSES["indices, an ignored class"][1]["labels"] = jnp.where(
    take("labels")["labels"] == -100, 2, take("labels")["labels"]
)

FULLEST = ("indices, every option", "probabilities, every option", "linear model", "total_weight")


def value_and_grads(loss, sharded, shared):
    """The loss, and its gradient for every float that is split and that is shared."""

    def of_floats(a, b):
        return loss(dict(sharded, **a), dict(shared, **b))

    return jax.value_and_grad(of_floats, argnums=(0, 1))(floats(sharded), floats(shared))


@functools.cache
def whole(name):
    function, sharded, shared, static = LOSSES[name]
    loss = functools.partial(function, **static)
    return jit(functools.partial(value_and_grads, loss))(sharded, shared)


# ---- The ways to map ------------------------------------------------------------------


def split(tree, *shape):
    shape = shape or (SHARDS,)
    return jax.tree.map(lambda x: x.reshape(*shape, -1, *x.shape[1:]), tree)


def join(tree):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def over_axis(transform):
    def way(f, out):
        """f(split, shared) mapped; `out` says of each result whether it is split."""
        axes = jax.tree.map(lambda is_split: 0 if is_split else None, out)

        def call(sharded, shared):
            mapped = transform(lambda part: f(part, shared), out_axes=axes, axis_name="data")
            results = mapped(split(sharded))
            return jax.tree.map(lambda s, r: join(r) if s else r, out, results)

        return call

    return way


def over_mesh(check_vma):
    def way(f, out):
        specs = jax.tree.map(lambda is_split: P("data") if is_split else P(), out)
        return jax.shard_map(
            f,
            mesh=auto_mesh(),
            in_specs=(P("data"), P()),
            out_specs=specs,
            check_vma=check_vma,
        )

    return way


WAYS = {
    "vmap": over_axis(jax.vmap),
    "pmap": over_axis(jax.pmap),
    "shard_map": over_mesh(True),
    "shard_map, check_vma=False": over_mesh(False),
}


def test_the_batch_is_what_these_tests_need():
    counted = (batch()["labels"] != -100) & (batch()["sample_weight"] != 0)
    assert counted.reshape(SHARDS, EACH).sum(-1).tolist() == [4, 3, 0, 1, 4, 2, 4, 4]
    assert batch()["sample_weight"].reshape(SHARDS, EACH)[2].max() == 0
    assert len(jax.devices()) >= SHARDS


@pytest.mark.parametrize(
    ("way", "name"),
    [(way, name) for way in ("vmap", "shard_map") for name in LOSSES]
    + [(way, name) for way in ("pmap", "shard_map, check_vma=False") for name in FULLEST],
)
def test_law_11_loss_and_gradient_outside_the_mapped_function_equal_the_whole(name, way):
    function, sharded, shared, static = LOSSES[name]
    mapped = WAYS[way](functools.partial(function, axis_name="data", **static), False)
    actual = jit(functools.partial(value_and_grads, mapped))(sharded, shared)
    assert_equal(actual, whole(name))


@pytest.mark.parametrize("name", LOSSES)
def test_law_11_gradient_inside_a_checked_shard_map_equals_the_whole(name):
    function, sharded, shared, static = LOSSES[name]
    loss = functools.partial(function, axis_name="data", **static)
    mapped = WAYS["shard_map"](
        functools.partial(value_and_grads, loss),
        (False, ({k: True for k in floats(sharded)}, {k: False for k in floats(shared)})),
    )
    assert_equal(jit(mapped)(sharded, shared), whole(name))


@pytest.mark.parametrize("way", ["vmap", "pmap", "shard_map, check_vma=False"])
@pytest.mark.parametrize("name", FULLEST)
def test_law_11_gradient_inside_other_maps_is_right_after_pmean_and_division(name, way):
    function, sharded, shared, static = LOSSES[name]
    loss = functools.partial(function, axis_name="data", **static)

    def corrected(sharded, shared):
        value, (of_split, of_shared) = value_and_grads(loss, sharded, shared)
        of_split = jax.tree.map(lambda g: g / SHARDS, of_split)
        return value, (of_split, jax.lax.pmean(of_shared, "data"))

    mapped = WAYS[way](
        corrected,
        (False, ({k: True for k in floats(sharded)}, {k: False for k in floats(shared)})),
    )
    assert_equal(jit(mapped)(sharded, shared), whole(name))


@pytest.mark.parametrize("way", WAYS)
def test_none_is_each_shards_own_part_of_the_whole(way):
    function, sharded, shared, static = LOSSES["indices, every option"]
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=N), jnp.float32)
    static = dict(static, reduction="none")
    mapped = WAYS[way](functools.partial(function, axis_name="data", **static), True)
    function = functools.partial(function, **static)

    def dotted(f):
        return lambda sharded, shared: jnp.dot(f(sharded, shared), cotangent)

    @jax.jit
    def both(sharded, shared):
        return (
            (mapped(sharded, shared), value_and_grads(dotted(mapped), sharded, shared)),
            (function(sharded, shared), value_and_grads(dotted(function), sharded, shared)),
        )

    assert_equal(*both(sharded, shared))


@pytest.mark.parametrize("way", WAYS)
def test_shard_without_counted_examples_changes_nothing(way):
    """The mean of the shards' means would count shard 2; the loss does not see it."""
    _, sharded, shared, _ = LOSSES["indices"]
    f = functools.partial(cross_entropy, axis_name="data")
    actual = jit(WAYS[way](f, False))(sharded, shared)
    rest = {k: jnp.concatenate([v[:8], v[12:]]) for k, v in sharded.items()}
    assert_equal(actual, jit(cross_entropy)(rest, {}))
    means = jit(jax.vmap(cross_entropy))(split(sharded), {})
    assert abs(actual - jnp.mean(means)) > 0.01  # so the test would notice


@pytest.mark.parametrize("way", WAYS)
def test_nothing_counted_on_any_shard_is_zero_with_zero_gradient(way):
    logits, labels = take("logits", "labels").values()
    sharded = {"logits": logits, "labels": jnp.full_like(labels, -100)}
    f = WAYS[way](functools.partial(cross_entropy, axis_name="data"), False)
    value, (grads, _) = jit(functools.partial(value_and_grads, f))(sharded, {})
    assert value == 0
    np.testing.assert_array_equal(grads["logits"], np.zeros((N, C)))


@pytest.mark.parametrize("way", WAYS)
def test_index_out_of_range_on_one_shard_is_nan_on_all_and_in_its_row_alone(way):
    logits, labels = take("logits", "labels").values()
    sharded = {"logits": jnp.nan_to_num(logits), "labels": labels.at[17].set(C)}
    f = WAYS[way](functools.partial(cross_entropy, axis_name="data"), False)
    value, (grads, _) = jit(functools.partial(value_and_grads, f))(sharded, {})
    assert np.isnan(value)
    rows = np.isnan(grads["logits"])
    assert rows[17].all()
    assert not np.delete(rows, 17, 0).any()


def test_scalar_sample_weight_that_all_shards_have_gets_the_wholes_gradient():
    _, sharded, _, _ = LOSSES["indices"]
    shared = {"sample_weight": jnp.float32(0.5)}
    whole = functools.partial(cross_entropy, reduction="sum")
    expected = jit(functools.partial(value_and_grads, whole))(sharded, shared)
    loss = functools.partial(whole, axis_name="data")
    outside = jit(functools.partial(value_and_grads, WAYS["shard_map"](loss, False)))
    inside = WAYS["shard_map"](
        functools.partial(value_and_grads, loss),
        (False, ({"logits": True}, {"sample_weight": False})),
    )
    assert_equal(outside(sharded, shared), expected)
    assert_equal(jit(inside)(sharded, shared), expected)


def test_hessian_vector_product_inside_a_checked_shard_map_equals_the_whole():
    function, sharded, shared, static = LOSSES["linear model"]
    direction = jnp.asarray(np.random.default_rng(3).normal(size=(C, C)), jnp.float32)

    def product(sharded, shared, **axis):
        def of_kernel(k):
            return function(sharded, dict(shared, kernel=k), **static, **axis)

        return jax.jvp(jax.grad(of_kernel), (shared["kernel"],), (direction,))[1]

    inside = WAYS["shard_map"](functools.partial(product, axis_name="data"), False)
    assert_equal(jit(inside)(sharded, shared), jit(product)(sharded, shared))


def test_steps_of_descent_over_shards_are_those_of_the_whole_batch():
    _, sharded, shared, static = LOSSES["linear model"]
    others = {k: v for k, v in shared.items() if k != "kernel"}

    def descend(sharded, kernel, **axis):
        def step(kernel, _):
            def loss(kernel):
                return linear_model(sharded, others | {"kernel": kernel}, **static, **axis)

            value, gradient = jax.value_and_grad(loss)(kernel)
            return kernel - gradient, value

        return jax.lax.scan(step, kernel, length=5)

    over_shards = jax.shard_map(
        functools.partial(descend, axis_name="data"),
        mesh=auto_mesh(),
        in_specs=(P("data"), P()),
        out_specs=P(),
    )
    kernel, losses = jit(over_shards)(sharded, shared["kernel"])
    assert losses[-1] < 0.8 * losses[0]
    assert_equal((kernel, losses), jit(descend)(sharded, shared["kernel"]))


# ---- Objects --------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_cross_entropy_object_over_shards_equals_the_whole(way):
    """The object is an argument. What it holds is constant, and given to the call it is not."""
    sharded = take("logits", "labels", "sample_weight")

    def configured(**axis):
        return jaxent.CrossEntropyLoss(**take("weight", "label_smoothing", "z_loss"), **axis)

    def call(sharded, loss_and_weight):
        loss, weight = loss_and_weight
        s = sharded["sample_weight"]
        return loss(sharded["logits"], sharded["labels"], sample_weight=s, weight=weight)

    def state(f, loss):
        value, gradient = jit(jax.value_and_grad(f, argnums=1))(sharded, (loss, loss.weight))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient[0]))
        return value, gradient[1]

    actual = state(WAYS[way](call, False), configured(axis_name="data"))
    assert_equal(actual, state(call, configured()))


@pytest.mark.parametrize("way", WAYS)
def test_nll_object_over_shards_equals_the_whole(way):
    sharded, weight = take("logits", "labels"), batch()["weight"]
    loss = jaxent.NLLLoss(weight=weight, axis_name="data")
    mapped = WAYS[way](lambda sharded, _: loss(sharded["logits"], sharded["labels"]), False)
    expected = jaxent.NLLLoss(weight=weight)(sharded["logits"], sharded["labels"])
    assert_equal(jit(mapped)(sharded, {}), expected)


# ---- Two axes -------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("rows", "columns"), ["columns", "rows"]], ids=str)
@pytest.mark.parametrize("check_vma", [True, False])
def test_examples_split_over_two_axes_of_a_mesh_equal_the_whole(names, check_vma):
    function, sharded, shared, static = LOSSES["indices, every option"]
    mapped = jax.shard_map(
        functools.partial(function, axis_name=names, **static),
        mesh=auto_mesh((4, 2), ("rows", "columns")),
        in_specs=(P(("rows", "columns")), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    actual = jit(functools.partial(value_and_grads, mapped))(sharded, shared)
    assert_equal(actual, whole("indices, every option"))


def test_gradient_inside_a_map_over_two_axes_equals_the_whole():
    function, sharded, shared, static = LOSSES["indices, every option"]
    loss = functools.partial(function, axis_name=("rows", "columns"), **static)
    mapped = jax.shard_map(
        functools.partial(value_and_grads, loss),
        mesh=auto_mesh((4, 2), ("rows", "columns")),
        in_specs=(P(("rows", "columns")), P()),
        out_specs=(P(), (P(("rows", "columns")), P())),
    )
    assert_equal(jit(mapped)(sharded, shared), whole("indices, every option"))


def test_examples_split_over_two_nested_vmaps_equal_the_whole():
    function, sharded, shared, static = LOSSES["indices, every option"]
    mapped = functools.partial(function, axis_name=("rows", "columns"), **static)
    for name in ("columns", "rows"):
        mapped = jax.vmap(mapped, in_axes=(0, None), out_axes=None, axis_name=name)

    def over_vmaps(sharded, shared):
        return mapped(split(sharded, 4, 2), shared)

    actual = jit(functools.partial(value_and_grads, over_vmaps))(sharded, shared)
    assert_equal(actual, whole("indices, every option"))


def test_naming_one_axis_of_two_gives_the_loss_of_each_part():
    """Examples split over rows and columns, added up over rows: one loss for each column."""
    _, sharded, shared, static = LOSSES["indices, every option"]

    def loss(sharded, shared):
        return cross_entropy(sharded, shared, axis_name="rows", **static)[None]

    mapped = jax.shard_map(
        loss,
        mesh=auto_mesh((4, 2), ("rows", "columns")),
        in_specs=(P(("rows", "columns")), P()),
        out_specs=P("columns"),
    )
    parts = [
        jax.tree.map(lambda x, i=i: x[:, i].reshape(-1, *x.shape[3:]), split(sharded, 4, 2))
        for i in range(2)
    ]
    each = jit(functools.partial(cross_entropy, **static))
    expected = jnp.stack([each(part, shared) for part in parts])
    assert_equal(jit(mapped)(sharded, shared), expected)


# ---- Without axis_name: jit splits the work -------------------------------------------


def test_collectives_are_seen_where_there_are_some():
    mesh = auto_mesh()
    x = jax.device_put(jnp.ones((N, 2 * SHARDS)), NamedSharding(mesh, P("data")))

    def sent(f, out=None):
        return collectives(jax.jit(f, out_shardings=out).lower(x).compile())

    def mapped(f):
        return jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data"))

    replicated = NamedSharding(mesh, P())
    neighbours = [(i, (i + 1) % SHARDS) for i in range(SHARDS)]
    size, part = x.size, x.size // SHARDS
    assert sent(lambda x: x) == []
    assert sent(lambda x: x, replicated) == [("all-gather", size)]
    assert sent(lambda x: jnp.sum(x), replicated) == [("all-reduce", 1)]
    assert sent(lambda x: jnp.sum(x, 0), replicated) == [("all-reduce", 2 * SHARDS)]
    assert sorted(sent(lambda x: (jnp.sum(x, 0), jnp.max(x)))) == [
        ("all-reduce", 1),
        ("all-reduce", 2 * SHARDS),
    ]
    assert {k for k, _ in sent(lambda x: x + 1, NamedSharding(mesh, P(None, "data")))} == {
        "all-to-all"
    }
    permuted = mapped(lambda x: jax.lax.ppermute(x, "data", neighbours))
    assert sent(permuted) == [("collective-permute", part)]
    scattered = mapped(lambda x: jax.lax.psum_scatter(x, "data", scatter_dimension=1, tiled=True))
    assert [k for k, _ in sent(scattered)] == ["reduce-scatter"]


MANY, CLASSES, POSITIONS = 64, 6, 3  # a part of the logits, 8 * 6, is larger than all else


@functools.cache
def many():
    rng = np.random.default_rng(4)
    labels = rng.choice([0, 1, 2, 4, 5], size=MANY).astype(np.int32)
    labels[[3, 4, *range(16, 24)]] = -100
    probabilities = rng.dirichlet(np.ones(CLASSES), size=MANY).astype(np.float32)
    probabilities[:, 3] = 0
    sample_weight = rng.uniform(0.5, 2, size=MANY).astype(np.float32)
    sample_weight[[7, 30]] = 0
    return {
        "x": rng.normal(size=(MANY, CLASSES)).astype(np.float32),
        "x3": rng.normal(size=(MANY, CLASSES, POSITIONS)).astype(np.float32),
        "y": labels,
        "y3": np.stack([labels, np.minimum(labels, 1), labels], -1),
        "t": probabilities,
        "t3": np.stack([probabilities, probabilities**2, 0.5 * probabilities], -1),
        "s": sample_weight,
        "w": np.array([1.0, 0.5, 2.0, 4.0, 0.25, 1.5], np.float32),
        "m": np.array([True, True, True, False, True, True]),
        "m2": rng.uniform(size=(MANY, CLASSES)) + np.eye(CLASSES)[np.maximum(labels, 0)] > 0.3,
        "e": np.float32(0.1),
        "z": np.float32(0.01),
    }


SHARED = ("w", "m", "e", "z")  # by all devices; the rest is split

# Each takes its arguments by name.
PROGRAMS = {
    "log_softmax": lambda x, t: jnp.sum(t * jaxent.log_softmax(x)),
    "log_softmax, masked": lambda x, t, m: jnp.sum(
        t * jnp.maximum(jaxent.log_softmax(x, class_mask=m), -100)
    ),
    "log_softmax, axis 1": lambda x3, t3: jnp.sum(t3 * jaxent.log_softmax(x3, axis=1)),
    "nll, indices": lambda x, y: jaxent.nll(x, y),
    "nll, indices, weights": lambda x, y, w, s: jaxent.nll(x, y, weight=w, sample_weight=s),
    "nll, probabilities, weights": lambda x, t, w, s: jaxent.nll(x, t, weight=w, sample_weight=s),
    "indices": lambda x, y: jaxent.cross_entropy(x, y),
    "indices, weight": lambda x, y, w: jaxent.cross_entropy(x, y, weight=w),
    "indices, sample_weight": lambda x, y, s: jaxent.cross_entropy(x, y, sample_weight=s),
    "indices, label_smoothing": lambda x, y, e: jaxent.cross_entropy(x, y, label_smoothing=e),
    "indices, class_mask": lambda x, y, m: jaxent.cross_entropy(x, y, class_mask=m),
    "indices, class_mask of each example": lambda x, y, m2: jaxent.cross_entropy(
        x, y, class_mask=m2
    ),
    "indices, z_loss": lambda x, y, z: jaxent.cross_entropy(x, y, z_loss=z),
    "indices, softcap, sum": lambda x, y: jaxent.cross_entropy(x, y, softcap=3.0, reduction="sum"),
    "indices, every option": lambda x, y, w, s, m, e, z: jaxent.cross_entropy(
        x, y, weight=w, sample_weight=s, class_mask=m, label_smoothing=e, z_loss=z, softcap=3.0
    ),
    "probabilities": lambda x, t: jaxent.cross_entropy(x, t),
    "probabilities, every option": lambda x, t, w, s, m, e, z: jaxent.cross_entropy(
        x, t, weight=w, sample_weight=s, class_mask=m, label_smoothing=e, z_loss=z, softcap=3.0
    ),
    "indices, class axis 1": lambda x3, y3, w, m, e, z: jaxent.cross_entropy(
        x3, y3, axis=1, weight=w, class_mask=m, label_smoothing=e, z_loss=z
    ),
    "probabilities, class axis 1": lambda x3, t3, w, m, e, z: jaxent.cross_entropy(
        x3, t3, axis=1, weight=w, class_mask=m, label_smoothing=e, z_loss=z
    ),
    "total_weight": lambda y: jaxent.total_weight(y).astype(jnp.float32),
    "total_weight, weights": lambda y, w, s: jaxent.total_weight(y, weight=w, sample_weight=s),
    "total_weight, K dimensions": lambda y3, w: jaxent.total_weight(y3, weight=w),
}


def arguments(program):
    code = PROGRAMS[program].__code__
    names = code.co_varnames[: code.co_argcount]
    return {name: jnp.asarray(many()[name]) for name in names}


def with_gradients(program):
    def call(given):
        def of_floats(some):
            return PROGRAMS[program](**dict(given, **some))

        return jax.value_and_grad(of_floats)(floats(given))

    return call


@functools.cache
def unsharded(program):
    return jit(with_gradients(program))(arguments(program))


def batch_sharded(name, array):
    return P() if name in SHARED else P("data", *[None] * (array.ndim - 1))


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_jit_over_a_sharded_batch_gathers_nothing(program, kind):
    mesh = jax.make_mesh((SHARDS,), ("data",), axis_types=(MESHES[kind],))
    with jax.set_mesh(mesh):
        given = laid_out(arguments(program), mesh, batch_sharded)
        compiled = jax.jit(with_gradients(program)).lower(given).compile()
        actual = compiled(given)
    sent = collectives(compiled)
    assert sent, "the loss of eight devices must be added up somewhere"
    assert {kind for kind, _ in sent} == {"all-reduce"}, sent
    assert max(elements for _, elements in sent) <= CLASSES, sent
    for name, gradient in actual[1].items():
        assert gradient.sharding.is_equivalent_to(given[name].sharding, gradient.ndim), name
    assert_equal(actual, unsharded(program))


@pytest.mark.parametrize("kind", MESHES)
def test_jit_needs_no_ambient_mesh(kind):
    program = "indices, every option"
    mesh = jax.make_mesh((SHARDS,), ("data",), axis_types=(MESHES[kind],))
    given = laid_out(arguments(program), mesh, batch_sharded)
    compiled = jax.jit(with_gradients(program)).lower(given).compile()
    assert {kind for kind, _ in collectives(compiled)} == {"all-reduce"}
    assert_equal(compiled(given), unsharded(program))


@pytest.mark.parametrize("kind", MESHES)
def test_what_is_not_reduced_is_not_sent(kind):
    """log_softmax and reduction="none", their gradients too: no device needs another."""
    mesh = jax.make_mesh((SHARDS,), ("data",), axis_types=(MESHES[kind],))

    def rows(given):
        def both(x):
            losses = jaxent.cross_entropy(
                x, given["y"], sample_weight=given["s"], label_smoothing=0.1, reduction="none"
            )
            return losses, jaxent.log_softmax(x)

        result, pull = jax.vjp(both, given["x"])
        return result, pull((given["s"], given["t"]))

    given = {k: jnp.asarray(many()[k]) for k in "xyst"}
    with jax.set_mesh(mesh):
        on_mesh = laid_out(given, mesh, batch_sharded)
        compiled = jax.jit(rows).lower(on_mesh).compile()
        actual = compiled(on_mesh)
    assert collectives(compiled) == []
    assert not actual[0][0].is_fully_replicated
    assert not actual[1][0].is_fully_replicated
    assert_equal(actual, jit(rows)(given))


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("targets", ["y3", "t3"])
def test_batch_and_positions_sharded_over_two_axes_gather_nothing(targets, kind):
    """Logits (batch, class, position), split over batch and position."""
    mesh = jax.make_mesh((4, 2), ("data", "sequence"), axis_types=(MESHES[kind],) * 2)
    given = {k: jnp.asarray(many()[k]) for k in ("x3", targets, "w")}
    given = {k: v if k == "w" else jnp.concatenate([v, v[..., :1]], -1) for k, v in given.items()}

    def loss(given):
        def of_floats(some):
            some = given | some
            return jaxent.cross_entropy(
                some["x3"], some[targets], axis=1, weight=some["w"], label_smoothing=0.1
            )

        return jax.value_and_grad(of_floats)(floats(given))

    def spec_of(name, array):
        return P() if name == "w" else P("data", *[None] * (array.ndim - 2), "sequence")

    with jax.set_mesh(mesh):
        on_mesh = laid_out(given, mesh, spec_of)
        compiled = jax.jit(loss).lower(on_mesh).compile()
        actual = compiled(on_mesh)
    assert {kind for kind, _ in collectives(compiled)} == {"all-reduce"}
    assert max(elements for _, elements in collectives(compiled)) <= CLASSES
    assert_equal(actual, jit(loss)(given))


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("targets", ["indices", "probabilities"])
def test_class_sharded_logits_have_the_same_loss_and_gradient(targets, kind):
    """Nothing is said here of what is sent."""
    rng = np.random.default_rng(5)
    classes = 2 * SHARDS
    x = jnp.asarray(rng.normal(size=(6, classes)), jnp.float32)
    y = jnp.asarray([0, 5, 15, -100, 8, 7], jnp.int32)
    t = jnp.asarray(rng.dirichlet(np.ones(classes), size=6), jnp.float32)
    w = jnp.asarray(rng.uniform(0.5, 2, size=classes), jnp.float32)

    def loss(x, t, w):
        return jaxent.cross_entropy(
            x, y if t is None else t, weight=w, label_smoothing=0.1, z_loss=0.01, axis=-1
        )

    t = None if targets == "indices" else t
    f = jax.jit(jax.value_and_grad(loss, argnums=(0, 2)))
    mesh = jax.make_mesh((SHARDS,), ("model",), axis_types=(MESHES[kind],))
    split = NamedSharding(mesh, P(None, "model"))
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(x, split), t if t is None else jax.device_put(t, split)
        actual = f(*on_mesh, jax.device_put(w, NamedSharding(mesh, P("model"))))
    assert_equal(actual, f(x, t, w))
