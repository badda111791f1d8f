"""What each workaround of `jaxent/_xla/` is for: a bound that breaks without it.

No bound is a time. Each is compared with the plain form's number, on the newest JAX: where a test
fails because nothing breaks any more, its workaround is to be taken out. Those that an older
release alone needs say so, and are tested there.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
import test_sharding
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import make_mesh

import jaxent
from jaxent import _xla
from jaxent._forms import forced

OLD = jax.__version_info__ < (0, 12)
MB = 2**20


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def indices(*sizes):
    return jax.ShapeDtypeStruct(sizes, "int32")


def with_gradient(function, arguments=0):
    return jax.value_and_grad(function, arguments)


def head(hidden, kernel, targets):
    return jaxent.linear_cross_entropy(hidden, kernel, targets, chunk_size=512)


def smoothed_below_a_cap(logits, targets):
    return jaxent.cross_entropy(logits, targets, label_smoothing=0.1, softcap=30.0)


def made_forward(*arguments):
    with forced(made_forward=True):
        return with_gradient(jaxent.linear_cross_entropy, (0, 1))(*arguments)


def second_order(hidden, kernel, targets):
    """The gradient of the gradient's squared norm, in reverse mode twice."""
    gradient = jax.grad(head, (0, 1))

    def norm(*floats):
        return sum(jnp.sum(x * x) for x in gradient(*floats, targets))

    return jax.grad(norm, (0, 1))(hidden, kernel)


PIXELS = shape(2, 21, 32, 32), indices(2, 32, 32)
HALF_HEAD = (
    shape(256, 64, dtype="bfloat16"),
    shape(64, 4096, dtype="bfloat16"),
    indices(256),
)
HEAD = shape(256, 64), shape(64, 4096), indices(256)
ROWS = shape(256, 1000), indices(256)
HALF_ROWS = shape(256, 1000, dtype="bfloat16"), indices(256)


def held(program):
    """Return the bytes of scratch."""
    return program.memory_analysis().temp_size_in_bytes


def touched(program):
    """Return the bytes that XLA counts as read and written."""
    return program.cost_analysis()["bytes accessed"]


def kernels(program):
    """Return the number of what the program runs one after another."""
    entry = program.as_text().split("ENTRY")[1]
    return sum(f" {kind}(" in line for line in entry.splitlines() for kind in ("fusion", "reduce"))


def read_by_columns(program):
    """Return the number of matmuls whose left operand is read along its columns."""
    return program.as_text().count("lhs_contracting_dims={0}")


# Name, what is counted, the function, its arguments, the bound with the workaround, and whether
# only JAX before 0.12 needs it. Without it the count is above the bound.
COUNTED = {
    "take_class": (touched, jaxent.nll, ROWS, 1.5 * MB, False),
    "gather_bits": (held, jaxent.cross_entropy, HALF_ROWS, 0.1 * MB, True),
    "row_max": (touched, lambda x, _: jaxent.log_softmax(x), ROWS, 7 * MB, False),
    "apart_and_others": (held, jaxent.cross_entropy, ROWS, 0.1 * MB, False),
    "moment_of_others": (
        held,
        jaxent.token_stats,
        (shape(256, 4096), indices(256)),
        0.5 * MB,
        False,
    ),
    "mass_sums": (
        held,
        jaxent.cross_entropy,
        (shape(256, 1000), shape(256, 1000)),
        0.2 * MB,
        False,
    ),
    "in_one_loop": (
        held,
        functools.partial(jaxent.cross_entropy, axis=1),
        PIXELS,
        0.1 * MB,
        False,
    ),
    "computed_again": (
        held,
        with_gradient(smoothed_below_a_cap),
        (shape(4096, 1000), indices(4096)),
        1 * MB,
        False,
    ),
    "once_per_row": (touched, lambda x, _: jaxent.log_softmax(x), ROWS, 7 * MB, False),
    "sums_of": (kernels, functools.partial(jaxent.cross_entropy, z_loss=0.1), ROWS, None, False),
    "with_cpu_plan": (held, with_gradient(head, (0, 1)), HALF_HEAD, 0.9 * MB, True),
    "slice_of_bits": (held, with_gradient(head, (0, 1)), HALF_HEAD, 0.9 * MB, True),
    "scatter_slice": (held, second_order, HEAD, 3.4 * MB, False),
    "transposed": (read_by_columns, made_forward, HEAD, None, False),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_bound_breaks_without_it(name):
    count, function, arguments, bound, only_old = COUNTED[name]
    if only_old and not OLD:
        pytest.skip("for JAX before 0.12")
    program = jax.jit(lambda *args: function(*args)).lower(*arguments).compile()
    with _xla.without(name):
        plain = jax.jit(lambda *args: function(*args)).lower(*arguments).compile()
    number, without = count(program), count(plain)
    assert number < without
    if bound is not None:
        assert number < bound < without


@pytest.mark.skipif(OLD, reason="older JAX raises nothing")
def test_vmap_raises_where_sums_are_no_single_output():
    logits, targets = jnp.ones((2, 4)), jnp.arange(6).reshape(3, 2) % 4

    def total(logits):
        of_one = functools.partial(jaxent.cross_entropy, label_smoothing=0.1, z_loss=0.1)
        return jax.vmap(lambda targets: of_one(logits, targets))(targets).sum()

    assert jnp.all(jnp.isfinite(jax.grad(total)(logits)))
    with _xla.without("packed"), pytest.raises(ValueError, match="shared across the batch"):
        jax.grad(total)(logits)


@pytest.mark.skipif(OLD, reason="older JAX raises nothing")
def test_vmap_maps_all_outputs_of_a_rule_with_symbolic_zeros_or_none():
    logits, teacher = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))

    def total(logits):
        def of_one(beta):
            loss, stats = jaxent.distillation(logits, teacher, beta=beta, return_stats=True)
            return loss + stats.entropy.sum()

        return jax.vmap(of_one)(jnp.array([0.2, 0.7])).sum()

    assert jnp.all(jnp.isfinite(jax.grad(total)(logits)))
    with _xla.without("mapped_alike"), pytest.raises(ValueError, match="shared across the batch"):
        jax.grad(total)(logits)


@pytest.mark.skipif(OLD, reason="older JAX raises nothing")
def test_zeros_are_split_like_what_they_are_for_on_a_mesh_that_is_not_set():
    test_sharding.test_jit_needs_no_ambient_mesh("explicit")
    with _xla.without("zeros_like"), pytest.raises(Exception, match="same sharding"):
        test_sharding.test_jit_needs_no_ambient_mesh("explicit")


def test_class_numbers_are_split_like_the_classes():
    mesh = make_mesh("explicit", data=2, model=4)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("data", "model")))

        def numbers(x):
            return jax.typeof(_xla.class_numbers(x, 1)).sharding.spec

        specs = []
        jax.eval_shape(lambda x: specs.append(numbers(x)), x)
        with _xla.without("class_numbers"):
            jax.eval_shape(lambda x: specs.append(numbers(x)), x)
    assert [spec[-1] for spec in specs] == ["model", None]


@pytest.mark.skipif(OLD, reason="older JAX compiles it")
def test_a_part_of_a_sum_is_compiled_beside_an_explicit_axis():
    mesh = make_mesh("explicit", data=2, other=4)

    def compile(function):
        def norm(x):
            return jnp.sum(
                jnp.sin(jax.shard_map(function, out_specs=P("data"), axis_names={"data"})(x))
            )

        with jax.set_mesh(mesh):
            x = jax.device_put(jnp.ones((4, 4)), NamedSharding(mesh, P("data")))
            return jax.jit(jax.value_and_grad(norm)).lower(x).compile()

    for name, axis in (("add_parts", 1), ("gather_parts", 0)):
        function = functools.partial(getattr(_xla, name), names=("data",), axis=axis)
        compile(function)
        with _xla.without(name), pytest.raises(ValueError, match="must be equal to aval's ndim"):
            compile(function)


def test_largest_logits_are_not_0_from_themselves_in_every_loop():
    hidden, kernel = jnp.array([[4.0], [6.5]]), jnp.array([[6.3, 0.0]])
    one_hot = jnp.array([[1.0, 0.0], [1.0, 0.0]])

    def smallest_loss():
        keywords = {"logit_scale": 0.7, "chunk_size": 1, "reduction": "none"}
        return jaxent.linear_cross_entropy(hidden, kernel, one_hot, **keywords)[-1]

    assert 3.5e-13 < smallest_loss() < 3.6e-13
    with _xla.without("rounded"):
        assert abs(smallest_loss()) > 1e-7


def test_a_workaround_is_counted_here_and_says_where_it_was_seen():
    of_its_own = {"packed", "mapped_alike", "zeros_like", "class_numbers", "rounded"}
    of_its_own |= {"add_parts", "gather_parts"}
    assert COUNTED.keys() | of_its_own == _xla.WORKAROUNDS.keys()
    for function in _xla.WORKAROUNDS.values():
        assert "jax 0." in " ".join(function.__doc__.split()), function.__name__


def test_a_switch_is_of_a_name_and_ends_with_its_context():
    with pytest.raises(ValueError, match="none of"), _xla.without("nothing"):
        pass
    with _xla.without("row_max"):
        assert {"row_max"} == _xla.SWITCHED_OFF
    assert not _xla.SWITCHED_OFF
