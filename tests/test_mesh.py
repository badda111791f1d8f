"""Law 11 on meshes that `jit` splits arrays over: values, gradients, and what is sent.

What is sent is counted in the compiled program, for eight devices.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import MESHES, assert_equal, collectives, floats, jit, laid_out, make_mesh
from sharded_calls import AUTO, AXES, CASES, WHOLE, call, given, specs, whole, with_gradients

import jaxent
import jaxent._linear
from jaxent import _xla
from jaxent._forms import forced

kinds = pytest.mark.parametrize("kind", MESHES)
# The last one has an axis that splits nothing.
on_meshes = pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("auto", {"data": 2, "model": 4}),
        ("explicit", {"data": 2, "model": 4}),
        ("explicit", {"data": 2, "model": 2, "other": 2}),
    ],
)
TOLD = {"auto": AUTO, "explicit": WHOLE}


def lay_out(mesh, tree, specs):
    return laid_out(tree, mesh, lambda name, _: specs[name])


@on_meshes
@pytest.mark.parametrize("case", CASES)
def test_law_11_loss_and_gradient_equal_the_whole_and_are_split_like_their_arguments(
    case, kind, sizes
):
    mesh = make_mesh(kind, **sizes)
    with jax.set_mesh(mesh):
        tree = lay_out(mesh, given(case), specs(given(case)))
        actual = jit(with_gradients(call(case, TOLD[kind])))(tree)
    for name, gradient in actual[1].items():
        if kind == "auto" and case in ("nll", "total_weight"):
            break  # made of per-example arrays alone, they are where XLA wants them
        assert gradient.sharding.is_equivalent_to(tree[name].sharding, gradient.ndim), name
    assert_equal(actual, whole(case))


def test_width_is_split_over_two_axes_beside_a_third():
    """Parts of the kernel come, and those of its gradient go, in the order of the axes."""
    mesh, both = make_mesh("explicit", data=2, model=2, other=2), ("data", "model")
    hidden, kernel, targets = problem()
    arguments = hidden.reshape(32, 16), kernel, targets.ravel()
    f = jax.value_and_grad(jaxent.linear_cross_entropy, (0, 1))
    mapped = jax.shard_map(
        functools.partial(jaxent.linear_cross_entropy, axis_name=both, width_axis_name=both),
        in_specs=(P(both),) * 3,
        out_specs=P(),
        axis_names={*both},
        mesh=mesh,
    )
    with jax.set_mesh(mesh):
        on_mesh = [jax.device_put(x, NamedSharding(mesh, P(both))) for x in arguments]
        for split in (f, jax.value_and_grad(mapped, (0, 1))):
            assert_equal(jit(split)(*on_mesh), jit(f)(*arguments))


# Larger arrays, to tell them by their sizes. A device has 32 tokens (64 with a second dimension)
# and 24 classes, and chunks of 4 of them where a case says so.
LARGER = {16: 64, 24: 96, 4: 8}
D, C = 8, 96


def compiled(kind, mesh, case, f):
    tree = {
        name: jax.ShapeDtypeStruct(
            [LARGER.get(n, n) for n in x.shape],
            x.dtype,
            sharding=NamedSharding(mesh, P(*AXES[name])),
        )
        for name, x in given(case).items()
    }
    with jax.set_mesh(mesh):
        return collectives(jax.jit(f(call(case, TOLD[kind]))).lower(tree).compile())


@kinds
@pytest.mark.parametrize("case", CASES)
def test_nothing_larger_than_what_the_gradients_need_is_sent(case, kind):
    mesh = make_mesh(kind, data=2, model=4)
    arrays = CASES[case][1].split()
    tokens = 32 * (3 if "y_k" in arrays else 2 if {"y_b", "t_b"} & {*arrays} else 1)
    forward = compiled(kind, mesh, case, lambda f: f)
    both = compiled(kind, mesh, case, with_gradients)
    # A forward pass adds up numbers of tokens; a kernel whose width is split is gathered once.
    wide = any(name.startswith("wide") for name in arrays)
    chunk = 4
    gathered = ("all-gather", D * chunk)
    assert [x for x in forward if x[0] != "all-reduce"] == [gathered] * wide
    assert max(n for kind, n in forward if kind == "all-reduce") <= tokens
    # The gradients of weights and biases have C numbers at most, and are added up over tokens.
    # Of a head there are hidden's to be added up over classes, and the kernel's over tokens:
    # its width being split, each device gets its part of a chunk.
    rest = [x for x in both if x[0] != "all-reduce" or x[1] > max(tokens, C)]
    expected = []
    if "linear" in case:
        expected = [("all-reduce", tokens * D)]
        expected += (
            [gathered, gathered, ("reduce-scatter", D // 2 * chunk)]
            if wide
            else [("all-reduce", C // 4 * D)]
        )
    assert sorted(rest) == sorted(expected)


@kinds
def test_tokens_split_over_two_dimensions(kind):
    mesh = make_mesh(kind, data=2, sequence=2, model=2)
    tree = given("linear")
    tree["s"] = jnp.linspace(0.5, 2, tree["y_b"].size).reshape(tree["y_b"].shape)

    def loss(tree, **names):
        return jaxent.linear_cross_entropy(
            tree["h_b"], tree["k"], tree["y_b"], sample_weight=tree["s"], **names
        )

    names = {"axis_name": P("data", "sequence"), "class_axis_name": "model"}
    split = functools.partial(loss, **(names if kind == "auto" else {}))
    tokens = P("data", "sequence")
    where = {"h_b": P(*tokens, None), "k": P(None, "model"), "y_b": tokens, "s": tokens}
    with jax.set_mesh(mesh):
        f = jax.jit(with_gradients(split))
        program = f.lower(lay_out(mesh, tree, where)).compile()
        actual = program(lay_out(mesh, tree, where))
    assert {kind for kind, _ in collectives(program)} == {"all-reduce"}
    assert_equal(actual, jit(with_gradients(loss))(tree))


@kinds
def test_none_and_statistics_stay_where_their_tokens_are(kind):
    mesh = make_mesh(kind, data=2, model=4)
    tree = given("linear")

    def values(tree, **names):
        arguments = tree["h_b"], tree["k"], tree["y_b"]
        loss = jaxent.linear_cross_entropy(*arguments, reduction="none", **names)
        stats = jaxent.linear_token_stats(*arguments, **names)
        return loss, jax.tree.map(lambda x: x.astype(jnp.float32), stats)

    names = TOLD[kind].head
    with jax.set_mesh(mesh):
        actual = jax.jit(functools.partial(values, **names))(lay_out(mesh, tree, specs(tree)))
    expected = jit(values)(tree)
    for x in jax.tree.leaves(actual):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), x.ndim)
    assert_equal(actual, expected)


@on_meshes
@pytest.mark.parametrize(
    "case",
    [
        "cross_entropy, every option",
        "linear",
        "linear, width split",
        "linear, (C, D), width split",
    ],
)
def test_second_order_equals_the_whole(case, kind, sizes):
    mesh = make_mesh(kind, **sizes)
    tree = given(case)
    direction = {name: jnp.cos(jnp.arange(x.size).reshape(x.shape)) for name, x in tree.items()}

    def products(names):
        def f(tree, direction):
            some = floats(tree)
            gradient = jax.grad(lambda some: call(case, names)(tree | some))
            forward = jax.jvp(gradient, (some,), ({name: direction[name] for name in some},))[1]
            slope = jax.grad(
                lambda some: sum(jnp.sum(g * direction[n]) for n, g in gradient(some).items())
            )
            return forward, slope(some)

        return f

    with jax.set_mesh(mesh):
        on_mesh = lay_out(mesh, tree, specs(tree)), lay_out(mesh, direction, specs(tree))
        actual = jit(products(TOLD[kind]))(*on_mesh)
    assert_equal(actual, jit(products(WHOLE))(tree, direction))


@kinds
def test_gradients_made_forward_are_added_up_once(kind):
    """Not for each block of tokens: a device goes over blocks of its own."""
    mesh = make_mesh(kind, data=8)
    tree = given("linear")
    where = {"h_b": P("data", None, None), "k": P(None, None), "y_b": P("data", None)}

    def loss(names):
        return lambda tree: jaxent.linear_cross_entropy(
            tree["h_b"], tree["k"], tree["y_b"], label_smoothing=0.1, **names
        )

    names = {"axis_name": "data"} if kind == "auto" else {}
    with jax.set_mesh(mesh), forced(made_forward=True, block=3):
        f = jax.jit(with_gradients(loss(names)))
        program = f.lower(lay_out(mesh, tree, where)).compile()
        actual = program(lay_out(mesh, tree, where))
    sent = collectives(program)
    assert {kind for kind, _ in sent} == {"all-reduce"}
    assert [n for _, n in sent if n > 2] == [tree["k"].size]
    assert_equal(actual, jit(with_gradients(loss({})))(tree))


@pytest.mark.parametrize("ambient", [True, False])
def test_batch_split_on_an_automatic_mesh_needs_no_names(ambient):
    """A wide head takes the loop over classes, for which `jit` moves no tokens.

    One device would make its gradients in the forward pass.
    """
    mesh = make_mesh("auto", data=8)

    def struct(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    arguments = (
        struct((8, 128, 1024), "float32", "data"),
        struct((1024, 256), "float32"),
        struct((8, 128), "int32", "data"),
    )
    f = jax.jit(jax.value_and_grad(functools.partial(jaxent.linear_cross_entropy, chunk_size=128)))
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        sent = collectives(f.lower(*arguments).compile())
    assert {kind for kind, _ in sent} == {"all-reduce"}
    assert max(n for _, n in sent) <= 1024 * 128


# ---- What is refused: a wrong combination says what to write ---------------------------------


WHOLLY = P(), P(), P()


def refused(kind, message, specs=WHOLLY, shapes=((8, 4), (4, 16), (8,)), **names):
    mesh = make_mesh(kind, data=2, model=4)
    arrays = jnp.ones(shapes[0]), jnp.ones(shapes[1]), jnp.zeros(shapes[2], int)
    if len(shapes[2]) == 2:
        arrays = *arrays[:2], jnp.ones(shapes[2])
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs)]
        with pytest.raises(ValueError, match=message):
            jax.jit(functools.partial(jaxent.linear_cross_entropy, **names))(*arrays)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"axis_name": "batch"}, "'batch' is no axis here.*which has 'data', 'model'"),
        (
            {"axis_name": "data", "class_axis_name": "data"},
            r"\['data'\] are in class_axis_name and in axis_name",
        ),
        (
            {"axis_name": "data", "width_axis_name": "model"},
            r"\['model'\] split the kernel's width and not the tokens.*reshard\(kernel",
        ),
        (
            {"axis_name": P("data", "model")},
            r"splits 2 dimensions of tokens; hidden, \[8, 4\], has 1",
        ),
    ],
)
def test_wrong_names_on_an_automatic_mesh_are_refused(names, message):
    refused("auto", message, **names)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            (P(None, "model"), P()),
            r"last axis must be whole.*reshard\(hidden, P\w*\(None, None\)\)",
        ),
        (
            (P(("data", "model")), P(None, "model")),
            r"\['model'\] split the tokens and the classes.*reshard\(hidden, P\w*\('data'",
        ),
        (
            (P("data"), P("model", None)),
            r"\['model'\] split the kernel's width and not the tokens",
        ),
    ],
)
def test_what_explicit_types_cannot_mean_is_refused(specs, message):
    refused("explicit", message, (*specs, P()))


def test_names_that_disagree_with_explicit_types_are_refused():
    message = r"not over \['model'\], as axis_name='model' says.*leave axis_name out"
    refused("explicit", message, (P("data"), P(), P()), axis_name="model")


def test_probabilities_split_another_way_are_refused():
    specs = P("data"), P(None, "model"), P("model", "data")
    refused(
        "explicit",
        r"targets is \[8, 16\], split as .*reshard\(targets, P",
        specs,
        ((8, 4), (4, 16), (8, 16)),
    )


def test_what_the_devices_do_not_divide_is_refused():
    message = r"kernel is \[4, 15\]: its axis 1 is split over 'model' into 4 parts"
    shapes = (8, 4), (4, 15), (8,)
    refused("auto", message, shapes=shapes, axis_name="data", class_axis_name="model")
    message = r"hidden is \[6, 4\]: its axis 0 is split over 'model' into 4 parts"
    refused("auto", message, shapes=((6, 4), (4, 16), (6,)), axis_name="model")


@kinds
def test_head_in_a_shard_map_of_some_axes_is_refused(kind):
    """Of a `shard_map` in it JAX 0.9.0 to 0.12.0 cannot compile the gradient, ours or not."""
    mesh = make_mesh(kind, data=2, model=4)
    names = {"axis_name": "data"} | ({"class_axis_name": "model"} if kind == "auto" else {})
    hidden, kernel, targets = jnp.ones((8, 4)), jnp.ones((4, 16)), jnp.zeros(8, int)
    with jax.set_mesh(mesh):
        hidden, targets = (
            jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (hidden, targets)
        )
        kernel = jax.device_put(kernel, NamedSharding(mesh, P(None, "model")))
        mapped = jax.shard_map(
            functools.partial(jaxent.linear_cross_entropy, **names),
            in_specs=(P("data"), P(), P("data")),
            out_specs=P(),
            axis_names={"data"},
        )
        with pytest.raises(ValueError, match="let it map all of them"):
            jax.jit(mapped)(hidden, kernel, targets)


@kinds
def test_dense_losses_take_a_shard_map_of_some_axes(kind):
    mesh = make_mesh(kind, data=2, model=4)
    tree = given("cross_entropy")

    def loss(tree, **names):
        return jaxent.cross_entropy(tree["clean"], tree["y"], **names)

    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            functools.partial(loss, axis_name="data"),
            in_specs=(P("data"),),
            out_specs=P(),
            axis_names={"data"},
        )
        actual = jit(with_gradients(mapped))(lay_out(mesh, tree, specs(tree)))
    assert_equal(actual, whole("cross_entropy"))


def test_names_of_a_mesh_are_taken_where_arrays_are_whole():
    """One configuration of a loss serves `jit` on a mesh and `shard_map`."""
    tree = given("cross_entropy")
    loss = jaxent.CrossEntropyLoss(axis_name="data", class_axis_name="model")
    mesh = make_mesh("explicit", data=2, model=4)
    with jax.set_mesh(mesh):
        on_mesh = lay_out(mesh, tree, specs(tree))
        actual = jax.jit(loss)(on_mesh["clean"], on_mesh["y"])
    assert_equal(actual, whole("cross_entropy")[0])


def test_what_is_compared_with_classes_is_split_like_them():
    """Else it is gathered, an array of the logits' size: seen ahead of time for TPUs."""
    mesh = make_mesh("explicit", data=2, model=4)
    tree = given("cross_entropy")

    def kinds_of(x, y):
        hits = _xla.one_hot(y[:, None], x, -1)
        return jax.typeof(hits).sharding.spec

    with jax.set_mesh(mesh):
        on_mesh = lay_out(mesh, tree, specs(tree))
        seen = []
        jax.jit(lambda x, y: seen.append(kinds_of(x, y)))(on_mesh["clean"], on_mesh["y"])
    assert seen == [P("data", "model")]


@kinds
def test_half_precision_is_added_up_in_the_dtype_of_the_argument(kind):
    """Each of four shards of the classes rounds its part of hidden's gradient once.

    None does where hidden states are given in float32.
    """
    mesh = make_mesh(kind, data=2, model=4)
    tree = given("linear")
    low = {name: x.astype(jnp.bfloat16) if name != "y_b" else x for name, x in tree.items()}
    high = {name: x.astype(jnp.float32) if name == "h_b" else x for name, x in low.items()}

    def gradient(tree, **names):
        return jax.grad(jaxent.linear_cross_entropy)(
            tree["h_b"], tree["k"], tree["y_b"], dtype=jnp.bfloat16, **names
        )

    exact = np.asarray(jit(gradient)(high), np.float64)
    ulp, tiny = (
        float(jnp.finfo(x.dtype).eps) * np.abs(exact).max() for x in (low["k"], high["h_b"])
    )
    with jax.set_mesh(mesh):
        split = jit(functools.partial(gradient, **TOLD[kind].head))
        of_low, of_high = (split(lay_out(mesh, x, specs(x))) for x in (low, high))
    assert of_low.dtype == jnp.bfloat16
    assert of_high.dtype == jnp.float32
    assert np.abs(np.asarray(of_low, np.float64) - exact).max() <= 4 * ulp
    assert np.abs(np.asarray(of_high, np.float64) - exact).max() <= 64 * tiny


# ---- vmap on a mesh --------------------------------------------------------------------------


def problem(parts=4, tokens=8, width=16, classes=48):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(parts, tokens, width)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(width, classes)), jnp.float32)
    return hidden, kernel, jnp.asarray(rng.integers(0, classes, (parts, tokens)))


@kinds
@pytest.mark.parametrize("split", [None, "data"])
def test_mapped_names_are_heard_beside_a_mesh(split, kind):
    """Examples are split over `vmap`, and the tokens of each over the mesh or not.

    `jit` of a psum over `vmap` on an explicit mesh is an error in jax 0.12.0, also without jaxent.
    """
    hidden, kernel, targets = problem()
    names = ("b", "data") if split and kind == "auto" else "b"

    def mean(hidden, kernel, targets):
        loss = functools.partial(jaxent.linear_cross_entropy, axis_name=names)
        return jax.vmap(loss, (0, None, 0), axis_name="b")(hidden, kernel, targets)

    expected = jnp.full(4, jaxent.linear_cross_entropy(hidden, kernel, targets))
    mesh = make_mesh(kind, data=8)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P(None, split))
        on_mesh = jax.device_put(hidden, sharding), kernel, jax.device_put(targets, sharding)
        f = mean if kind == "explicit" and split is None else jax.jit(mean)
        try:
            actual = f(*on_mesh)
        except ValueError as error:
            if "Length of sharding.spec" not in str(error):
                raise
            pytest.skip(f"JAX: {error}")
    assert_equal(actual, expected)


@kinds
def test_kernel_is_split_by_a_map_or_by_the_mesh(kind):
    hidden, kernel, targets = problem()
    mesh = make_mesh(kind, data=2, model=4)
    names = {"class_axis_name": "c"} | ({"axis_name": "data"} if kind == "auto" else {})

    def mapped(hidden, kernels):
        loss = functools.partial(jaxent.linear_cross_entropy, targets=targets, **names)
        return jax.vmap(lambda k: loss(hidden, k), 1, axis_name="c")(kernels)

    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(hidden, NamedSharding(mesh, P("data")))
        with pytest.raises(ValueError, match="let one of them do it"):
            jax.jit(mapped)(on_mesh, kernel.reshape(16, 4, 12))


@kinds
@pytest.mark.parametrize("function", ["cross_entropy", "linear_cross_entropy"])
def test_vmap_goes_over_a_split_dimension(function, kind):
    hidden, kernel, targets = problem()
    names = {"class_axis_name": "model"} if kind == "auto" and "linear" in function else {}

    def total(hidden, kernel, targets, **names):
        def loss(hidden, targets):
            if function == "cross_entropy":
                return jaxent.cross_entropy(hidden @ kernel, targets)
            return jaxent.linear_cross_entropy(hidden, kernel, targets, **names)

        return jnp.sum(jnp.sin(jax.vmap(loss)(hidden, targets)))

    mesh = make_mesh(kind, data=2, model=4)
    where = P("data"), P(None, "model"), P("data")
    with jax.set_mesh(mesh):
        on_mesh = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip((hidden, kernel, targets), where)
        ]
        split = functools.partial(total, **names)
        actual = jax.jit(jax.value_and_grad(split, (0, 1)))(*on_mesh)
    assert_equal(actual, jit(jax.value_and_grad(total, (0, 1)))(hidden, kernel, targets))


def test_what_has_few_numbers_is_moved_to_its_tokens():
    hidden, kernel, targets = problem()
    weight = jnp.linspace(0.5, 2, 32).reshape(4, 8)
    expected = jaxent.linear_cross_entropy(hidden, kernel, targets, sample_weight=weight)
    mesh = make_mesh("explicit", data=2, model=4)
    f = jax.jit(lambda h, k, y, s: jaxent.linear_cross_entropy(h, k, y, sample_weight=s))
    with jax.set_mesh(mesh):
        k = jax.device_put(kernel, NamedSharding(mesh, P(None, "model")))
        for of_hidden, of_rest in (
            (P("data"), P(None, "model")),
            (P(), P("data")),
            (P("data"), P()),
        ):
            h = jax.device_put(hidden, NamedSharding(mesh, of_hidden))
            y, s = (jax.device_put(x, NamedSharding(mesh, of_rest)) for x in (targets, weight))
            assert_equal(f(h, k, y, s), expected)


@kinds
def test_names_of_a_mesh_of_one_device_are_taken(kind):
    hidden, kernel, targets = problem()
    loss = functools.partial(jaxent.linear_cross_entropy, axis_name="data", class_axis_name="model")
    with jax.set_mesh(make_mesh(kind, data=1, model=1)):
        actual = jax.jit(loss)(hidden, kernel, targets)
    assert_equal(actual, jaxent.linear_cross_entropy(hidden, kernel, targets))


def test_sums_of_what_only_some_of_the_names_split():
    """Sample weights of the positions, the same for each row of the batch."""
    hidden, kernel, _ = problem()
    logits = hidden @ kernel
    targets, weight = jax.nn.softmax(-logits), jnp.linspace(0.5, 2, 8)

    def loss(logits, targets, weight, **names):
        return jaxent.cross_entropy(logits, targets, axis=-1, sample_weight=weight[None], **names)

    mapped = jax.shard_map(
        functools.partial(loss, axis_name=("data", "model")),
        mesh=make_mesh("auto", data=2, model=4),
        in_specs=(P("data", "model"), P("data", "model"), P("model")),
        out_specs=P(),
    )
    arguments = logits, targets, weight
    evaluated = [jit(jax.value_and_grad(f, (0, 1, 2)))(*arguments) for f in (mapped, loss)]
    assert_equal(*evaluated)
