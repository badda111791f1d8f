"""Sparse targets: law 15, what they say that dense ones cannot, and that they are never dense."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import (
    EVERY_OPTION,
    NLL_OPTIONS,
    assert_close,
    assert_same,
    calls,
    evaluate,
    examples,
    full_mask,
    head_calls,
)
from hypothesis import given
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent
from jaxent import SparseTargets, reference
from jaxent._forms import forced

ULPS = 32
SPLIT = [((4, 6), 1), ((6,), 0), ((3, 4, 2), 1)]  # classes in two halves


@st.composite
def sparse_calls(draw, of=calls, options=EVERY_OPTION, *shapes, **keywords):
    """A call with few classes an example: some twice, some places empty, some probabilities 0.

    Its `targets` are the probabilities, (..., K), and `indices` are an argument of their own.
    """
    options = [name for name in options if name != "ignore_index"]
    call = draw(of(options, *shapes, targets=["probabilities"], **keywords))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, num_classes = call.cotangent.shape, call.shape[call.axis]
    shape = (*rows, draw(st.sampled_from([1, 2, 4, 7])))
    ignored = draw(st.sampled_from([-100, -1, None, 0]))
    dtype = draw(st.sampled_from(["int8", "int16", "int32", "int64"]))
    indices = random.integers(0, num_classes, shape)
    if ignored is not None:
        indices = np.where(random.uniform(size=shape) < 0.3, ignored, indices)
    probabilities = random.uniform(size=shape) * (random.uniform(size=shape) < 0.8)
    if (mask := call.get("class_mask")) is not None:  # no mass where there is no class
        mask = np.moveaxis(full_mask(mask, call.shape, call.axis), call.axis, -1)
        exists = np.take_along_axis(mask, np.clip(indices, 0, None), -1)
        probabilities = np.where(exists, probabilities, 0)
    floats = call.floats | {"targets": probabilities.astype(call.dtype)}
    others = call.others | {"indices": indices.astype(dtype), "ignore_index": ignored}
    return dataclasses.replace(call, floats=floats, others=others)


def sparse(function):
    """The function of a sparse call."""

    def run(*positional, indices, **keywords):
        *first, probabilities = positional
        return function(*first, SparseTargets(indices, probabilities), **keywords)

    return run


def dense(function):
    """The function of a sparse call, with the probabilities of all classes made of it."""

    def run(*positional, indices, ignore_index, **keywords):
        *first, probabilities = positional
        logits = first[0]
        if len(first) == 2:
            num_classes, axis = first[1].shape[keywords["class_axis"]], -1
        else:
            axis = keywords["axis"]
            num_classes = logits.shape[axis]
        empty = indices == ignore_index if ignore_index is not None else np.zeros(1, bool)
        one_hots = (indices[..., None] == np.arange(num_classes)) & ~empty[..., None]
        wide = jnp.promote_types(probabilities.dtype, "float32")
        wide_probabilities = probabilities[..., None].astype(wide)
        targets = jnp.sum(jnp.where(one_hots, wide_probabilities, 0), -2)
        counted = ~np.all(np.broadcast_to(empty, indices.shape), -1)
        weight = jnp.where(counted, keywords.pop("sample_weight", np.float32(1)), 0)
        targets = jnp.moveaxis(targets, -1, axis)
        return function(*first, targets, sample_weight=weight, **keywords)

    return run


@examples(4)
@given(sparse_calls())
def test_law_15_sparse_targets_equal_dense_ones(call):
    assert_same(
        evaluate(sparse(jaxent.cross_entropy), call),
        evaluate(dense(jaxent.cross_entropy), call),
        2 * ULPS,
    )


@pytest.mark.parametrize("one_loop", [False, True])
@examples(4)
@given(sparse_calls())
def test_law_2_sparse_targets_equal_their_reference(one_loop, call):
    with forced(one_loop=one_loop):
        actual = evaluate(sparse(jaxent.cross_entropy), call)
    assert_same(actual, evaluate(sparse(reference.cross_entropy), call), ULPS)


@examples(4)
@given(sparse_calls(options=NLL_OPTIONS))
def test_law_15_nll_of_sparse_targets_equals_dense_ones(call):
    actual = evaluate(sparse(jaxent.nll), call)
    assert_same(actual, evaluate(dense(jaxent.nll), call), ULPS)
    assert_same(actual, evaluate(sparse(reference.nll), call), ULPS)


@pytest.mark.parametrize("made_forward", [False, True])
@examples(3)
@given(sparse_calls(head_calls))
def test_law_15_a_head_with_sparse_targets_equals_dense_ones(made_forward, call):
    with forced(made_forward=made_forward, skip=True, block=3):
        actual = evaluate(sparse(jaxent.linear_cross_entropy), call)
    assert_same(actual, evaluate(dense(reference.linear_cross_entropy), call), 2 * ULPS)


def over_halves_of_the_classes(function):
    """The function of a sparse call over a mapped axis; indices are those of all classes."""

    def split(logits, targets, axis, **keywords):
        places = {"logits": axis}
        for name in ("weight", "class_mask"):
            if (value := keywords.get(name)) is not None:
                places[name] = axis if value.ndim > 1 else 0
        arrays = {"logits": logits} | {k: keywords.pop(k) for k in places if k != "logits"}
        halves = {
            k: x.reshape(*x.shape[: places[k]], 2, -1, *x.shape[places[k] + 1 :])
            for k, x in arrays.items()
        }

        def half(part):
            first = part.pop("logits")
            return function(first, targets, axis=axis, class_axis_name="c", **part, **keywords)

        return jax.vmap(half, (places,), None, axis_name="c")(halves)

    return split


@examples(3)
@given(sparse_calls(calls, EVERY_OPTION, SPLIT))
def test_law_11_sparse_targets_over_split_classes_equal_the_whole(call):
    actual = evaluate(sparse(over_halves_of_the_classes(jaxent.cross_entropy)), call)
    assert_same(actual, evaluate(sparse(jaxent.cross_entropy), call), ULPS)


TOKENS, WIDTH, CLASSES, PLACES = 6, 4, 12, 4


def draw(seed=0):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(TOKENS, CLASSES)).astype("float32")
    hidden = random.normal(size=(TOKENS, WIDTH)).astype("float32")
    kernel = random.normal(size=(WIDTH, CLASSES)).astype("float32")
    indices = random.integers(0, CLASSES, (TOKENS, PLACES)).astype("int32")
    indices[0, 1] = indices[0, 2]
    indices[1, 3] = indices[2, :] = -100
    probabilities = random.uniform(size=(TOKENS, PLACES)).astype("float32")
    probabilities[3, 0] = 0
    return logits, hidden, kernel, indices, probabilities


def assert_alike(found, expected, ulps=ULPS):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, ulps, "float32")


def test_gradient_of_a_probability_is_minus_the_logarithm_of_its_class():
    logits, _, _, indices, probabilities = draw()

    def loss(probabilities):
        targets = SparseTargets(indices, probabilities)
        return jaxent.cross_entropy(logits, targets, reduction="sum")

    expected = -np.take_along_axis(jax.nn.log_softmax(logits), np.maximum(indices, 0), -1)
    expected = np.where(indices < 0, 0, expected)
    assert expected[3, 0] > 0  # where the probability is 0
    assert_close(jax.grad(loss)(probabilities), expected, ULPS)


@pytest.mark.parametrize("form", ["logits", "streamed", "made forward"])
def test_second_order_of_sparse_targets_is_the_formulas(form):
    logits, hidden, kernel, indices, probabilities = draw()
    options = {"logit_scale": np.float32(0.7), "softcap": 3.0, "label_smoothing": 0.1}

    def norm(module):
        def of_logits(logits, p):
            return module.cross_entropy(logits, SparseTargets(indices, p), **options)

        def of_head(hidden, kernel, p):
            targets = SparseTargets(indices, p)
            return module.linear_cross_entropy(hidden, kernel, targets, **options)

        of, values = (of_logits, (logits,)) if form == "logits" else (of_head, (hidden, kernel))
        values = *values, probabilities
        every = tuple(range(len(values)))

        def squared(*values):
            return sum(jnp.sum(g * g) for g in jax.grad(of, every)(*values))

        return jax.jit(jax.grad(squared, every))(*values)

    with forced(made_forward=form == "made forward", skip=True, block=4):
        found = norm(jaxent)
    assert_alike(found, norm(reference))


def test_statistics_of_sparse_targets_are_the_formulas():
    logits, hidden, kernel, indices, probabilities = draw()
    targets = SparseTargets(indices, probabilities)

    def run(module):
        def total(stats):
            return sum(jnp.sum(jnp.sin(value)) for value in stats[:3]), stats._asdict()

        def of_logits(x):
            return total(module.token_stats(x, targets, softcap=5.0))

        def of_head(hidden, kernel):
            return total(module.linear_token_stats(hidden, kernel, targets, chunk_size=5))

        def beside_the_loss(x):
            options = {"weight": np.linspace(0.5, 1, CLASSES), "label_smoothing": 0.1}
            _, stats = module.cross_entropy(x, targets, return_stats=True, **options)
            return total(stats)

        def gradients(f, places=0):
            return jax.jit(jax.grad(f, places, has_aux=True))

        of_losses = gradients(beside_the_loss)(logits)
        return gradients(of_logits)(logits), gradients(of_head, (0, 1))(hidden, kernel), of_losses

    found = run(jaxent)
    assert_alike(found, run(reference))
    (_, stats), *_ = found
    assert stats["prediction"][2] == -1  # all places empty: not counted


def test_statistics_with_probabilities_are_correct_where_the_most_probable_class_is_predicted():
    targets = SparseTargets(np.array([[1, 2, 1]] * 2), np.array([[0.3, 0.4, 0.3]] * 2, "float32"))
    stats = jaxent.token_stats(jnp.array([[0.0, 1, 0], [0.0, 0, 1]]), targets)
    assert stats.correct.tolist() == [True, False]


@pytest.mark.parametrize("function", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("probability", [0.5, 0.0])
def test_an_index_out_of_range_is_nan_in_its_example_alone(function, probability):
    logits, hidden, kernel, indices, probabilities = draw()
    indices[3, 0], probabilities[3, 0] = CLASSES, probability

    def losses(module, x):
        targets, options = SparseTargets(indices, probabilities), {"reduction": "none"}
        if function == "cross_entropy":
            return module.cross_entropy(x, targets, **options)
        return module.linear_cross_entropy(x, kernel, targets, **options)

    x = logits if function == "cross_entropy" else hidden

    def run(module):
        return losses(module, x), jax.grad(lambda x: losses(module, x).sum())(x)

    found, expected = run(jaxent), run(reference)
    assert_alike(found, expected)
    np.testing.assert_array_equal(np.isnan(found[0]), np.arange(TOKENS) == 3)
    np.testing.assert_array_equal(np.isnan(found[1]).all(-1), np.arange(TOKENS) == 3)
    stats = jaxent.token_stats(logits, SparseTargets(indices, probabilities))
    np.testing.assert_array_equal(np.isnan(stats.log_prob), np.arange(TOKENS) == 3)
    assert not stats.correct[3]


def test_integers_that_jax_would_cut_are_out_of_range():
    targets = SparseTargets(np.array([[2**32 + 1, 0]]), np.array([[0.5, 0.5]], "float32"))
    assert np.isnan(jaxent.cross_entropy(np.zeros((1, 3), "float32"), targets))


def test_mass_on_an_excluded_class_is_infinite_and_no_mass_is_none():
    logits, _, _, indices, probabilities = draw()
    class_mask = np.arange(CLASSES) != indices[3, 0]

    def losses(p):
        return jaxent.cross_entropy(
            logits[3], SparseTargets(indices[3], p), class_mask=class_mask, axis=0
        )

    assert np.isfinite(losses(probabilities[3] * (indices[3] != indices[3, 0])))
    assert losses(probabilities[3] + 1) == np.inf


def test_an_example_whose_places_are_all_empty_acts_as_deleted():
    logits, _, _, indices, probabilities = draw()
    logits[2] = probabilities[2] = np.nan

    def loss(logits, p, indices):
        return jaxent.cross_entropy(logits, SparseTargets(indices, p))

    kept = np.arange(TOKENS) != 2
    whole = jax.value_and_grad(loss, (0, 1))(logits, probabilities, indices)
    part = jax.value_and_grad(loss, (0, 1))(logits[kept], probabilities[kept], indices[kept])
    assert_close(whole[0], part[0], ULPS)
    for gradient, expected in zip(whole[1], part[1]):
        np.testing.assert_array_equal(gradient[2], 0)
        assert_close(gradient[kept], expected, ULPS)


@pytest.mark.parametrize("spec", [P("rows", None), P(None, "columns"), P("rows", "columns")])
def test_sparse_targets_on_an_explicit_mesh(spec):
    logits, hidden, kernel, indices, probabilities = draw()
    indices[5] = indices[4]
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Explicit,) * 2)

    def of_logits(x, p, indices):
        return jaxent.cross_entropy(x, SparseTargets(indices, p), label_smoothing=0.1)

    def of_head(hidden, kernel, p, indices):
        return jaxent.linear_cross_entropy(hidden, kernel, SparseTargets(indices, p), chunk_size=4)

    def run(put):
        rows, columns = P(spec[0], None), P(None, spec[1])
        places = put(probabilities, rows), put(indices, rows)
        logits_ = jax.jit(jax.value_and_grad(of_logits, (0, 1)))(put(logits, spec), *places)
        head = jax.jit(jax.value_and_grad(of_head, (0, 1, 2)))
        return logits_, head(put(hidden, rows), put(kernel, columns), *places)

    expected = run(lambda x, _: x)
    with jax.set_mesh(mesh):
        found = run(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)))
    assert_alike(found, expected)


def test_as_many_places_as_classes_are_not_split_as_classes():
    _, hidden, kernel, _, _ = draw()
    random = np.random.default_rng(0)
    indices = random.integers(0, CLASSES, (TOKENS, CLASSES))
    probabilities = random.uniform(size=indices.shape).astype("float32")
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)

    def loss(hidden, kernel, p, **names):
        return jaxent.linear_cross_entropy(hidden, kernel, SparseTargets(indices, p), **names)

    run = jax.value_and_grad(loss, (0, 1, 2))
    expected = run(hidden, kernel, probabilities)
    with jax.set_mesh(mesh):
        names = {"axis_name": "rows", "class_axis_name": "columns"}
        found = jax.jit(functools.partial(run, **names))(hidden, kernel, probabilities)
    assert_alike(found, expected)


def test_vmap_and_a_symbolic_batch():
    logits, _, _, indices, probabilities = draw()

    def losses(x, indices, p):
        return jaxent.cross_entropy(x, SparseTargets(indices, p), axis=-1, reduction="none")

    def gradients(*arguments):
        return jax.grad(lambda x, i, p: losses(x, i, p).sum(), (0, 2))(*arguments)

    expected = losses(logits, indices, probabilities), gradients(logits, indices, probabilities)
    mapped = jax.vmap(losses)(logits, indices, probabilities)
    assert_alike((mapped, jax.vmap(gradients)(logits, indices, probabilities)), expected)
    (size,) = jax.export.symbolic_shape("n")
    shapes = [
        jax.ShapeDtypeStruct((size, x.shape[1]), x.dtype) for x in (logits, indices, probabilities)
    ]
    exported = jax.export.export(jax.jit(gradients))(*shapes)
    assert_alike(exported.call(logits, indices, probabilities), expected[1])


def test_objects_take_sparse_targets():
    logits, hidden, kernel, indices, probabilities = draw()
    targets = SparseTargets(indices, probabilities)
    assert jaxent.CrossEntropyLoss()(logits, targets) == jaxent.cross_entropy(logits, targets)
    assert jaxent.NLLLoss()(logits, targets) == jaxent.nll(logits, targets)
    assert jaxent.LinearCrossEntropyLoss()(hidden, kernel, targets) == jaxent.linear_cross_entropy(
        hidden, kernel, targets
    )


def test_many_places_take_memory_as_their_number_does():
    def scratch(places):
        arrays = [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in [((256, 512), "float32"), ((256, places), "int32")]
        ]

        def loss(x, indices):
            targets = SparseTargets(indices, jnp.full(indices.shape, 1 / places))
            return jaxent.cross_entropy(x, targets)

        program = jax.jit(jax.value_and_grad(loss)).lower(*arrays).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert scratch(256) < 6 * scratch(64)


def test_a_head_with_sparse_targets_holds_no_logits_and_no_dense_targets():
    """Beyond what class indices take: a chunk's gradient, and a few arrays (N, K)."""
    tokens, width, classes, places = 512, 16, 16384, 8
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [
            ((tokens, width), "float32"),
            ((width, classes), "float32"),
            ((tokens,), "int32"),
            ((tokens, places), "int32"),
            ((tokens, places), "float32"),
        ]
    ]

    def scratch(loss, *arguments):
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
        return program.memory_analysis().temp_size_in_bytes

    def of_indices(hidden, kernel, y):
        return jaxent.linear_cross_entropy(hidden, kernel, y, chunk_size=1024)

    def of_places(hidden, kernel, indices, p):
        return of_indices(hidden, kernel, SparseTargets(indices, p))

    hidden, kernel, y, indices, p = arrays
    difference = scratch(of_places, hidden, kernel, indices, p) - scratch(
        of_indices, hidden, kernel, y
    )
    # Dense targets, and logits, take 16 chunks, 32 MB.
    assert difference < 4 * tokens * (1024 + 20 * places)


LOGITS = np.zeros((2, 5), "float32")
HALVES = np.full((2, 3), 0.5, "float32")
REFUSED = {
    "float indices": (SparseTargets(HALVES, HALVES), TypeError, "targets.indices must be integers"),
    "bool indices": (
        SparseTargets(HALVES > 0, HALVES),
        TypeError,
        r"targets.indices must be integers, got bool\[2, 3\]",
    ),
    "integer probabilities": (
        SparseTargets(np.zeros((2, 3), "int32"), np.ones((2, 3), "int32")),
        TypeError,
        "probabilities must be floats",
    ),
    "two shapes": (
        SparseTargets(np.zeros((2, 2), "int32"), HALVES),
        ValueError,
        r"targets.indices is int32\[2, 2\], targets.probabilities float32\[2, 3\]: they must have",
    ),
    "other examples": (
        SparseTargets(np.zeros((4, 3), "int32"), np.ones((4, 3), "float32")),
        ValueError,
        r"targets.indices",
    ),
    "no places": (
        SparseTargets(np.zeros((2, 0), "int32"), np.ones((2, 0), "float32")),
        ValueError,
        "K > 0 classes",
    ),
}


@pytest.mark.parametrize("module", [jaxent, reference])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_while_tracing(case, module):
    targets, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: module.cross_entropy(LOGITS, targets))
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: module.linear_cross_entropy(LOGITS, np.eye(5), targets))


def test_class_indices_alone_are_counted_and_checked():
    targets = SparseTargets(np.zeros((2, 3), "int32"), HALVES)
    for call in (jaxent.total_weight, lambda targets: jaxent.check_targets(targets, 5)):
        with pytest.raises(TypeError, match="a SparseTargets"):
            call(targets)
