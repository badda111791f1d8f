"""The loss objects: at home wherever Flax users put things, and equal to their functions."""

import copy
import functools
import inspect
import pickle
import pydoc
import typing

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from calls import examples
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxent

WEIGHT = np.array([1.0, 2.0, 0.5], np.float32)
LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
LABELS = jnp.array([0, 2, -100, 1])


def assert_close(actual, expected):
    """Equal to a few roundings: at most one program is compiled otherwise than the other."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    eps = np.finfo(expected.dtype).eps
    np.testing.assert_allclose(actual, expected, rtol=8 * eps, atol=8 * eps)


def configured():
    return jaxent.CrossEntropyLoss(
        weight=WEIGHT, label_smoothing=jnp.float32(0.1), class_mask=[True] * 3, softcap=30.0
    )


def expected_of_configured():
    return jaxent.cross_entropy(LOGITS, LABELS, weight=WEIGHT, label_smoothing=0.1, softcap=30.0)


# ---- nnx ------------------------------------------------------------------------------


class Classifier(nnx.Module):
    def __init__(self, loss, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.loss = loss

    def __call__(self, x, labels):
        return self.loss(self.dense(x), labels)


LOSSES = {
    "without weight": jaxent.CrossEntropyLoss,
    "with weight": lambda: jaxent.CrossEntropyLoss(weight=WEIGHT),
    "with all": configured,
    "nll with weight": lambda: jaxent.NLLLoss(weight=WEIGHT),
}


def classifier(loss):
    return Classifier(LOSSES[loss](), nnx.Rngs(0))


@pytest.mark.parametrize("loss", LOSSES)
def test_nnx_module_holds_a_loss_and_runs_under_nnx_jit(loss):
    model = classifier(loss)
    expected = model.loss(model.dense(LOGITS), LABELS)
    assert_close(nnx.jit(lambda model: model(LOGITS, LABELS))(model), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_nnx_split_and_merge_give_the_loss_back(loss):
    model = classifier(loss)
    merged = nnx.merge(*nnx.split(model))
    assert type(merged.loss) is type(model.loss)
    assert repr(merged.loss) == repr(model.loss)
    assert_close(merged(LOGITS, LABELS), model(LOGITS, LABELS))


@pytest.mark.parametrize("loss", LOSSES)
def test_what_a_loss_holds_is_no_parameter(loss):
    names = {path for path, _ in nnx.to_flat_state(nnx.state(classifier(loss), nnx.Param))}
    assert names == {("dense", "kernel"), ("dense", "bias")}


def test_nnx_state_shows_the_arrays_of_a_loss():
    state = nnx.state(classifier("with all"))
    assert set(state["loss"]) == {"weight", "label_smoothing", "class_mask"}
    np.testing.assert_array_equal(state["loss"]["weight"], WEIGHT)
    assert "loss" not in nnx.state(classifier("without weight"))


@pytest.mark.parametrize("loss", LOSSES)
def test_nnx_grad_of_parameters_is_that_of_a_model_without_a_loss_object(loss):
    model = classifier(loss)
    actual = nnx.jit(nnx.grad(lambda model: model(LOGITS, LABELS)))(model)

    def plain(params):
        logits = LOGITS @ params["kernel"] + params["bias"]
        if loss == "nll with weight":
            return jaxent.nll(logits, LABELS, weight=WEIGHT)
        smoothing, softcap = (0.1, 30.0) if loss == "with all" else (0.0, None)
        return jaxent.cross_entropy(
            logits,
            LABELS,
            weight=None if loss == "without weight" else WEIGHT,
            label_smoothing=smoothing,
            softcap=softcap,
        )

    expected = jax.jit(jax.grad(plain))(
        {"kernel": model.dense.kernel[...], "bias": model.dense.bias[...]}
    )
    assert set(actual) == {"dense"}
    for name in ("kernel", "bias"):
        assert np.any(expected[name] != 0)
        assert_close(actual["dense"][name][...], expected[name])


# ---- linen ----------------------------------------------------------------------------


class Linen(linen.Module):
    loss: jaxent.CrossEntropyLoss

    @linen.compact
    def __call__(self, x, labels):
        return self.loss(linen.Dense(3)(x), labels)


@pytest.mark.parametrize("loss", ["without weight", "with weight", "with all"])
def test_linen_module_holds_a_loss_as_a_field(loss):
    loss = LOSSES[loss]()
    module = Linen(loss)
    assert hash(module) == hash(Linen(loss))
    assert module == Linen(loss)
    assert module.clone().loss is loss
    variables = module.init(jax.random.key(0), LOGITS, LABELS)
    assert set(variables) == {"params"}
    dense = variables["params"]["Dense_0"]
    expected = loss(LOGITS @ dense["kernel"] + dense["bias"], LABELS)
    assert_close(jax.jit(module.apply)(variables, LOGITS, LABELS), expected)


def test_linen_module_is_a_static_argument_with_a_loss_in_it():
    module = Linen(configured())
    variables = module.init(jax.random.key(0), LOGITS, LABELS)
    apply = jax.jit(
        lambda module, variables: module.apply(variables, LOGITS, LABELS), static_argnums=0
    )
    assert_close(apply(module, variables), module.apply(variables, LOGITS, LABELS))


# ---- JAX's transformations ------------------------------------------------------------


def counting_jit():
    """A jitted call of a loss, and the list that grows by one each time it is traced."""
    traces = []

    @jax.jit
    def call(loss):
        traces.append(loss)
        return loss(LOGITS, LABELS)

    return call, traces


def test_changed_values_of_arrays_do_not_retrace():
    call, traces = counting_jit()
    for factor in (1.0, 2.0, 3.0):
        weight = WEIGHT ** jnp.float32(factor)
        smoothing, z_loss = jnp.float32(0.1 * factor), jnp.float32(0.01 * factor)
        loss = jaxent.CrossEntropyLoss(weight=weight, label_smoothing=smoothing, z_loss=z_loss)
        expected = jaxent.cross_entropy(
            LOGITS, LABELS, weight=weight, label_smoothing=smoothing, z_loss=z_loss
        )
        assert_close(call(loss), expected)
    assert len(traces) == 1


def test_equal_configuration_does_not_retrace():
    call, traces = counting_jit()
    for loss in (configured(), configured(), copy.deepcopy(configured())):
        call(loss)
    call(pickle.loads(pickle.dumps(configured())))
    call(nnx.merge(*nnx.split(configured())))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"reduction": "sum"},
        {"ignore_index": 0},
        {"label_smoothing": 0.2},
        {"z_loss": 0.1},
        {"softcap": 1.0},
        {"weight": WEIGHT},
    ],
    ids=str,
)
def test_changed_statics_retrace(changed):
    call, traces = counting_jit()
    before = call(jaxent.CrossEntropyLoss())
    after = call(jaxent.CrossEntropyLoss(**changed))
    assert len(traces) == 2
    assert before != after
    assert_close(after, jaxent.cross_entropy(LOGITS, LABELS, **changed))


def test_vmap_over_stacked_weights_is_a_loss_for_each():
    weights = jnp.stack([WEIGHT, WEIGHT**2, jnp.ones(3)])
    losses = jax.vmap(lambda w: jaxent.CrossEntropyLoss(weight=w))(weights)
    assert losses.weight.shape == (3, 3)
    actual = jax.jit(jax.vmap(lambda loss: loss(LOGITS, LABELS)))(losses)
    expected = [jaxent.cross_entropy(LOGITS, LABELS, weight=w) for w in weights]
    assert_close(actual, jnp.stack(expected))


STACKED = {
    "weight": jnp.stack([WEIGHT, WEIGHT**2, jnp.ones(3)]),
    "label_smoothing": jnp.array([0.1, 0.5, 0.0]),
    "z_loss": jnp.array([0.1, 0.0, 0.2]),
}


@pytest.mark.parametrize("stacked", STACKED)
def test_gradient_of_logits_shared_by_stacked_losses_is_the_sum_of_each(stacked):
    values = STACKED[stacked]

    def loss(logits, value):
        options = {"label_smoothing": 0.1, stacked: value}
        return jaxent.CrossEntropyLoss(**options)(logits, LABELS)

    def together(logits):
        return jnp.sum(jax.vmap(loss, in_axes=(None, 0))(logits, values))

    def one_by_one(logits):
        return sum(loss(logits, value) for value in values)

    actual, expected = (jax.jit(jax.grad(f))(LOGITS) for f in (together, one_by_one))
    assert_close(actual, expected)


def test_gradient_of_logits_shared_by_stacked_targets_is_the_sum_of_each():
    targets = jnp.stack([LABELS, (LABELS + 1) % 3, jnp.zeros_like(LABELS)])
    loss = jaxent.CrossEntropyLoss()

    def together(logits):
        return jnp.sum(jax.vmap(loss, in_axes=(None, 0))(logits, targets))

    def one_by_one(logits):
        return sum(loss(logits, t) for t in targets)

    actual, expected = (jax.jit(jax.grad(f))(LOGITS) for f in (together, one_by_one))
    assert_close(actual, expected)


def test_vmap_over_examples_with_one_loss():
    loss = jaxent.CrossEntropyLoss(weight=WEIGHT, reduction="none", axis=-1)
    actual = jax.jit(jax.vmap(loss))(LOGITS, LABELS)
    assert_close(actual, loss(LOGITS, LABELS))


def test_scan_closes_over_a_loss():
    loss = configured()
    _, values = jax.lax.scan(lambda c, x: (c, loss(x, LABELS)), 0, jnp.stack([LOGITS, -LOGITS]))
    assert_close(values, jnp.stack([loss(LOGITS, LABELS), loss(-LOGITS, LABELS)]))


def test_scan_carries_a_loss_and_changes_its_weight():
    def step(loss, _):
        value = loss(LOGITS, LABELS)
        return jax.tree.map(lambda w: 2 * w, loss), value

    loss = jaxent.CrossEntropyLoss(weight=WEIGHT, reduction="sum")
    last, values = jax.lax.scan(step, loss, length=3)
    once = loss(LOGITS, LABELS)
    assert_close(values, jnp.stack([once, 2 * once, 4 * once]))
    assert isinstance(last, jaxent.CrossEntropyLoss)
    np.testing.assert_array_equal(last.weight, 8 * WEIGHT)


def test_scan_runs_over_stacked_losses():
    losses = jax.tree.map(lambda w: jnp.stack([w, w**2]), jaxent.NLLLoss(weight=WEIGHT))
    _, values = jax.lax.scan(lambda c, loss: (c, loss(LOGITS, LABELS)), 0, losses)
    expected = [jaxent.nll(LOGITS, LABELS, weight=WEIGHT**k) for k in (1, 2)]
    assert_close(values, jnp.stack(expected))


ARRAYS = {
    "weight": WEIGHT,
    "label_smoothing": jnp.float32(0.1),
    "z_loss": jnp.float32(0.2),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_a_loss_are_constants_to_differentiation(name):
    loss = jaxent.CrossEntropyLoss(**{name: ARRAYS[name]})
    gradient = jax.jit(jax.grad(lambda loss: loss(LOGITS, LABELS)))(loss)
    np.testing.assert_array_equal(getattr(gradient, name), 0 * ARRAYS[name])


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_given_to_the_call_is_differentiated(name):
    def by_object(value):
        return jaxent.CrossEntropyLoss(**ARRAYS)(LOGITS, LABELS, **{name: value})

    def by_function(value):
        return jaxent.cross_entropy(LOGITS, LABELS, **(ARRAYS | {name: value}))

    actual, expected = (
        jax.jit(jax.grad(f))(jnp.asarray(ARRAYS[name])) for f in (by_object, by_function)
    )
    assert_close(actual, expected)
    assert np.all(expected != 0)


def test_no_optimizer_of_a_model_trains_the_class_weights():
    eqx, optax = pytest.importorskip("equinox"), pytest.importorskip("optax")

    class Model(eqx.Module):
        linear: eqx.nn.Linear
        loss: jaxent.CrossEntropyLoss

    model = Model(eqx.nn.Linear(3, 3, key=jax.random.key(1)), configured())
    optimizer = optax.adam(1e-2)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    gradients = eqx.filter_grad(lambda m: m.loss(jax.vmap(m.linear)(LOGITS), LABELS))(model)
    updates, _ = optimizer.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
    trained = eqx.apply_updates(model, updates)
    np.testing.assert_array_equal(trained.loss.weight, WEIGHT)
    np.testing.assert_array_equal(trained.loss.label_smoothing, np.float32(0.1))
    assert np.any(trained.linear.weight != model.linear.weight)


def test_equal_configurations_without_arrays_are_equal_and_hash_alike():
    kinds = jaxent.CrossEntropyLoss, jaxent.NLLLoss, jaxent.LinearCrossEntropyLoss
    for kind in kinds:
        one, same, other = kind(axis_name="i"), kind(axis_name="i"), kind(reduction="sum")
        assert one == same
        assert hash(one) == hash(same)
        assert one != other
        assert len({one, same, other}) == 2
        assert one == copy.deepcopy(one) == pickle.loads(pickle.dumps(one))
    assert len({kind() for kind in kinds}) == 3
    assert kinds[0]() != kinds[1]()
    assert kinds[0]() != None  # noqa: E711


def test_a_loss_with_arrays_equals_itself_alone():
    one, same = configured(), configured()
    assert one == one
    assert one != same
    assert len({one, same}) == 2


def test_attributes_are_set_as_they_are_constructed():
    loss = jaxent.CrossEntropyLoss()
    loss.weight = [1.0, 2.0, 0.5]
    loss.label_smoothing = jnp.float32(0.1)
    loss.softcap = 30
    loss.class_mask = [True] * 3
    assert repr(loss) == repr(configured())
    assert_close(loss(LOGITS, LABELS), expected_of_configured())
    assert len(jax.tree.leaves(loss)) == 3
    assert_close(nnx.merge(*nnx.split(loss))(LOGITS, LABELS), expected_of_configured())
    loss.weight, loss.label_smoothing, loss.class_mask = None, 0.1, None
    assert not jax.tree.leaves(loss)
    assert loss == jaxent.CrossEntropyLoss(label_smoothing=0.1, softcap=30.0)


def test_attributes_are_set_in_a_model_too():
    model = Classifier(jaxent.CrossEntropyLoss(), nnx.Rngs(0))
    model.loss.weight = WEIGHT
    call = nnx.jit(lambda model: model(LOGITS, LABELS))
    expected = jaxent.cross_entropy(model.dense(LOGITS), LABELS, weight=WEIGHT)
    assert_close(call(model), expected)


def test_loss_is_made_inside_jit_from_tracers():
    @jax.jit
    def call(weight, smoothing):
        return jaxent.CrossEntropyLoss(weight=weight, label_smoothing=smoothing, softcap=30.0)(
            LOGITS, LABELS
        )

    assert_close(call(jnp.asarray(WEIGHT), 0.1), expected_of_configured())


# ---- Copies and files -----------------------------------------------------------------


def assert_same_loss(actual, original):
    assert actual is not original
    assert type(actual) is type(original)
    assert repr(actual) == repr(original)
    assert jax.tree.structure(actual) == jax.tree.structure(original)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(original), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    np.testing.assert_array_equal(actual(LOGITS, LABELS), original(LOGITS, LABELS))


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "tree_map": lambda loss: jax.tree.map(jnp.copy, loss),
    "nnx.clone": nnx.clone,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("loss", LOSSES)
def test_copy_is_the_same_loss(loss, how):
    original = LOSSES[loss]()
    assert_same_loss(COPIES[how](original), original)


def test_deepcopy_of_a_model_copies_its_loss():
    model = classifier("with all")
    assert_same_loss(copy.deepcopy(model).loss, model.loss)


def zeroed(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def abstract(tree):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


@pytest.mark.parametrize("loss", ["with weight", "with all", "nll with weight"])
def test_orbax_restores_a_loss(loss, tmp_path):
    original = LOSSES[loss]()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "loss", original)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "loss", abstract(zeroed(original)))
    assert_same_loss(restored, original)


@pytest.mark.parametrize("loss", ["without weight", "with all"])
def test_orbax_restores_the_state_of_a_model_with_its_loss(loss, tmp_path):
    model = classifier(loss)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(model))
        checkpointer.wait_until_finished()
        other = Classifier(zeroed(LOSSES[loss]()), nnx.Rngs(1))
        before = other(LOGITS, LABELS)
        nnx.update(other, checkpointer.restore(tmp_path / "model", abstract(nnx.state(other))))
    assert_same_loss(other.loss, model.loss)
    assert other(LOGITS, LABELS) == model(LOGITS, LABELS) != before


# ---- What they look like --------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (jaxent.CrossEntropyLoss(), "CrossEntropyLoss()"),
        (jaxent.NLLLoss(), "NLLLoss()"),
        (
            jaxent.NLLLoss(weight=[1.0, 2.0], ignore_index=None, reduction="sum", axis=1),
            "NLLLoss(weight=float32[2], ignore_index=None, reduction='sum', axis=1)",
        ),
        (
            jaxent.NLLLoss(axis_name="data"),
            "NLLLoss(axis_name='data')",
        ),
        (
            jaxent.CrossEntropyLoss(
                weight=WEIGHT,
                ignore_index=-1,
                reduction="none",
                label_smoothing=0.1,
                axis=-1,
                class_mask=[True, True, False],
                z_loss=1e-4,
                softcap=30,
                axis_name=["rows", "columns"],
            ),
            "CrossEntropyLoss(weight=float32[3], ignore_index=-1, reduction='none', "
            "label_smoothing=0.1, axis=-1, class_mask=bool[3], z_loss=0.0001, softcap=30.0, "
            "axis_name=('rows', 'columns'))",
        ),
        (
            jaxent.CrossEntropyLoss(label_smoothing=jnp.float32(0), z_loss=np.float32(0.5)),
            "CrossEntropyLoss(label_smoothing=float32[], z_loss=0.5)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_repr_says_what_differs_from_the_defaults(loss, text):
    assert repr(loss) == text
    assert str(loss) == text


def test_repr_of_a_default_loss_is_how_to_make_it():
    loss = jaxent.CrossEntropyLoss(ignore_index=None, reduction="sum", z_loss=0.5, axis=1)
    again = eval(repr(loss), {"CrossEntropyLoss": jaxent.CrossEntropyLoss})
    assert_same_loss(again, jaxent.CrossEntropyLoss(**loss._keywords({})))


def test_repr_inside_jit_shows_shapes():
    texts = []
    jax.jit(lambda loss: texts.append(repr(loss)))(configured())
    assert texts == [
        "CrossEntropyLoss(weight=float32[3], label_smoothing=float32[], class_mask=bool[3], "
        "softcap=30.0)"
    ]


# ---- Bad configuration ----------------------------------------------------------------

BAD_FOR_BOTH = [
    ({"reduction": "avg"}, ValueError, r"reduction must be one of .*'mean'.*, got 'avg'"),
    ({"reduction": None}, ValueError, "reduction must be one of .*, got None"),
    ({"weight": [[1.0, 2.0]]}, ValueError, r"weight is \[1, 2\]: it must be \[C\]"),
    ({"weight": 2.0}, ValueError, r"weight is \[\]: it must be \[C\]"),
    ({"weight": [1j, 2]}, TypeError, r"weight must be real, got complex64\[2\]"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index must be a Python integer or None, got 1.5"),
    ({"ignore_index": "pad"}, TypeError, "ignore_index must be .*'pad'"),
]
BAD = [(jaxent.NLLLoss, *case) for case in BAD_FOR_BOTH] + [
    (jaxent.CrossEntropyLoss, *case)
    for case in [
        *BAD_FOR_BOTH,
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\], got -0.1"),
        ({"label_smoothing": [0.1, 0.2]}, ValueError, r"label_smoothing must be a scalar, .*\[2\]"),
        ({"label_smoothing": np.float64(2)}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        ({"z_loss": [1.0]}, ValueError, r"z_loss must be a scalar, got float32\[1\]"),
        ({"z_loss": float("nan")}, ValueError, "z_loss must be .*nan"),
        ({"softcap": -1.0}, ValueError, "softcap must be .*, got -1"),
        ({"softcap": 0}, ValueError, "softcap must be .*, got 0"),
        ({"softcap": float("inf")}, ValueError, "softcap must be .*, got inf"),
        ({"class_mask": [1, 0, 1]}, TypeError, "class_mask is int32.* must be bool"),
        ({"axis": "classes"}, TypeError, "axis"),
        ({"axis": 1.0}, TypeError, "axis"),
    ]
]


@pytest.mark.parametrize(("make", "keywords", "error", "message"), BAD, ids=str)
def test_bad_configuration_is_refused_at_construction(make, keywords, error, message):
    with pytest.raises(error, match=message):
        make(**keywords)


@pytest.mark.parametrize("make", [jaxent.NLLLoss, jaxent.CrossEntropyLoss])
def test_unknown_and_positional_configuration_is_refused(make):
    with pytest.raises(TypeError, match="smoothing"):
        make(smoothing=0.1)
    with pytest.raises(TypeError, match="positional"):
        make(WEIGHT)


def test_bad_keywords_of_a_call_are_refused_at_the_call():
    loss = jaxent.CrossEntropyLoss()
    with pytest.raises(ValueError, match="reduction must be one of"):
        loss(LOGITS, LABELS, reduction="avg")
    with pytest.raises(TypeError, match="smoothing"):
        loss(LOGITS, LABELS, smoothing=0.1)


def test_weight_of_the_wrong_length_is_refused_at_the_call():
    with pytest.raises(ValueError, match=r"weight is \[2\]: it must be \[3\]"):
        jaxent.CrossEntropyLoss(weight=[1.0, 2.0])(LOGITS, LABELS)


# ---- Equal to their functions ---------------------------------------------------------


def test_keywords_of_the_call_go_before_those_of_the_object():
    loss = jaxent.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1, ignore_index=0)
    actual = loss(
        LOGITS, LABELS, weight=None, reduction="none", ignore_index=-100, sample_weight=[1, 2, 3, 0]
    )
    expected = jaxent.cross_entropy(
        LOGITS, LABELS, label_smoothing=0.1, reduction="none", sample_weight=[1, 2, 3, 0]
    )
    assert_close(actual, expected)
    assert repr(loss) == (
        "CrossEntropyLoss(weight=float32[3], ignore_index=0, label_smoothing=0.1)"
    )


def mostly(default, *others):
    return st.sampled_from([default, *others])


SHARED_OPTIONS = {
    "weight": mostly(None, WEIGHT, [3.0, 0.0, 1.0]),
    "ignore_index": mostly(-100, None, 0, 2),
    "reduction": mostly("mean", "sum", "none"),
    "axis": mostly(None, 1, -1),
}
CROSS_ENTROPY_OPTIONS = SHARED_OPTIONS | {
    "label_smoothing": mostly(0.0, 0.1, 1.0, jnp.float32(0.3)),
    "class_mask": mostly(None, [True, True, True], [True, False, True]),
    "z_loss": mostly(0.0, 0.01, jnp.float32(0.1)),
    "logit_scale": mostly(1.0, 0.5, jnp.float32(2.0)),
    "softcap": mostly(None, 2.0),
}
CALLS = st.fixed_dictionaries(
    {},
    optional={
        "sample_weight": mostly(None, [1.0, 0.0, 2.0, 0.5], [True, False, True, True]),
        "reduction": mostly("mean", "sum", "none"),
    },
)


def same_as_function(make, function, options, call):
    actual = make(**options)(LOGITS, LABELS, **call)
    np.testing.assert_array_equal(actual, function(LOGITS, LABELS, **(options | call)))


@examples(15)
@given(st.fixed_dictionaries({}, optional=CROSS_ENTROPY_OPTIONS), CALLS)
def test_cross_entropy_object_equals_its_function(options, call):
    same_as_function(jaxent.CrossEntropyLoss, jaxent.cross_entropy, options, call)


@examples(15)
@given(st.fixed_dictionaries({}, optional=SHARED_OPTIONS), CALLS)
def test_nll_object_equals_its_function(options, call):
    same_as_function(jaxent.NLLLoss, jaxent.nll, options, call)


@pytest.mark.parametrize(
    ("make", "function"),
    [
        (jaxent.NLLLoss, jaxent.nll),
        (jaxent.CrossEntropyLoss, jaxent.cross_entropy),
        (jaxent.LinearCrossEntropyLoss, jaxent.linear_cross_entropy),
    ],
)
def test_object_takes_its_functions_keywords_with_their_defaults(make, function):
    """All but sample_weight, bias and return_stats, which go with the call."""
    of_object = inspect.signature(make).parameters
    of_function = inspect.signature(function).parameters
    keywords = {k: p.default for k, p in of_function.items() if p.kind is p.KEYWORD_ONLY}
    for name in ("bias", "sample_weight", "return_stats"):
        keywords.pop(name, None)
    assert {k: p.default for k, p in of_object.items()} == keywords


@pytest.mark.parametrize(
    ("call", "function"),
    [
        (jaxent.NLLLoss.__call__, jaxent.nll),
        (jaxent.CrossEntropyLoss.__call__, jaxent.cross_entropy),
        (jaxent.LinearCrossEntropyLoss.__call__, jaxent.linear_cross_entropy),
        (jaxent.LinearHead.loss, jaxent.linear_cross_entropy),
    ],
)
def test_a_call_is_typed_by_its_functions_keywords(call, function):
    """An editor knows all of them, of the same types, and no other."""
    (of_call,) = (p for p in inspect.signature(call).parameters.values() if p.kind is p.VAR_KEYWORD)
    (keywords,) = typing.get_args(typing.get_type_hints(call)[of_call.name])
    expected = types_of_keywords(function)
    # Which has overloads of its own, since the result depends on it.
    assert expected.pop("return_stats", None) == typing.get_type_hints(call).get("return_stats")
    assert typing.get_type_hints(keywords) == expected
    assert not keywords.__required_keys__


def types_of_keywords(function):
    types, parameters = typing.get_type_hints(function), inspect.signature(function).parameters
    return {k: types[k] for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize(
    "function",
    [
        jaxent.cross_entropy,
        jaxent.linear_cross_entropy,
        jaxent.distillation,
        jaxent.linear_distillation,
    ],
)
def test_overloads_are_typed_by_the_functions_keywords(function):
    expected = types_of_keywords(function)
    expected.pop("return_stats")
    overloads = typing.get_overloads(inspect.unwrap(function))
    assert len(overloads) == 3
    for overload in overloads:
        (keywords,) = typing.get_args(typing.get_type_hints(overload)["keywords"])
        assert typing.get_type_hints(keywords) == expected


@pytest.mark.parametrize("name", [*jaxent.__all__, "reference.cross_entropy"])
def test_help_names_types_by_a_word(name):
    """And not each as the union that it is."""
    value = functools.reduce(getattr, name.split("."), jaxent)
    if callable(value):
        text = pydoc.render_doc(value, renderer=pydoc.plaintext)
        assert "numpy.ndarray | " not in text
