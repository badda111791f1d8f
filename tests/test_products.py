"""The head's products: of which dtypes, how precise, by whose function, and how many there are."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import (
    EVERY_OPTION,
    assert_close,
    assert_same,
    assert_same_with_stats,
    evaluate,
    examples,
    head_calls,
)
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_distillation import head_calls as pair_calls

import jaxent
from jaxent import reference
from jaxent._forms import forced

forms = pytest.mark.parametrize("made_forward", [False, True])
few = examples(8)
FLOAT8 = [
    name
    for name in dir(jnp)
    if name.startswith("float8") and jnp.issubdtype(getattr(jnp, name), jnp.floating)
]
TARGETS = jnp.array([3, 0, 10, -100, 7, 7])


def in_form(made_forward):
    return forced(made_forward=made_forward, skip=True, block=3)


def problem(width=4, num_classes=11):
    random = np.random.default_rng(0)
    hidden, kernel = random.normal(size=(6, width)), random.normal(size=(width, num_classes))
    return hidden.astype("float32"), kernel.astype("float32")


# ---- dtypes ------------------------------------------------------------------------------


def test_every_float8_of_jax_is_tested():
    assert {"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e8m0fnu"} <= {*FLOAT8}


@st.composite
def operands(draw):
    """Hidden states, a kernel and a bias of any dtypes, and a dtype for their product or none."""
    wide = ["bfloat16", "float16", "float32", "float64"]
    kinds = st.sampled_from([*wide, *FLOAT8])
    dtypes = draw(kinds), draw(kinds), draw(kinds)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = (6, 4), (4, 11), (11,)
    arrays = [np.abs(random.normal(size=shape)).astype(d) for shape, d in zip(shapes, dtypes)]
    return arrays, draw(st.sampled_from([None, None, *wide]))


@forms
@few
@given(operands(), st.sampled_from([None, 3]))
def test_operands_of_any_dtypes_have_the_loss_of_their_values(made_forward, drawn, chunk_size):
    arrays, dtype = drawn
    whole = [np.asarray(x, "float64") for x in arrays]
    products = [x.dtype for x in arrays[:2]] if dtype is None else [dtype, dtype]
    bits = [max(16, jnp.finfo(x).bits) for x in products]

    def loss(module, hidden, kernel, bias, **keywords):
        return module.linear_cross_entropy(hidden, kernel, TARGETS, bias=bias, **keywords)

    with jax.enable_x64(True), in_form(made_forward):
        value, gradients = jax.jit(
            jax.value_and_grad(
                functools.partial(loss, jaxent, dtype=dtype, chunk_size=chunk_size), (0, 1, 2)
            )
        )(*arrays)
        # What is read is rounded to the dtype, which the operands' own never rounds.
        rounded = [x.astype(dtype or x.dtype).astype("float64") for x in whole[:2]]
        of_formula = jax.value_and_grad(functools.partial(loss, reference), (0, 1, 2))
        expected, expected_gradients = of_formula(*rounded, whole[2])
        assert value.dtype == ("float64" if max(bits) == 64 else "float32")
        if max(bits) == 64 and dtype is None:
            assert_close(value, expected, 32, "float64")
        assert_close(value, expected, 32, "float32")
        # The narrowest of: the products' operands, the argument.
        for gradient, wanted, x in zip(gradients, expected_gradients, arrays):
            assert gradient.dtype == x.dtype
            narrow = min(products, key=lambda d: jnp.finfo(d).bits)
            coarse = max(float(jnp.finfo(d).eps) for d in (x.dtype, "bfloat16", narrow))
            if jnp.finfo(x.dtype).bits > 16 and min(bits) > 16:
                coarse = float(jnp.finfo("float32").eps)
            if "e8m0" in x.dtype.name:
                continue  # has no sign
            tolerance = 16 * coarse * max(1e-2, np.abs(wanted).max())
            np.testing.assert_allclose(gradient.astype("float64"), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("module", "kind"), [*((jaxent, kind) for kind in FLOAT8), (reference, "float8_e4m3fn")]
)
def test_float8_is_bfloat16_of_its_values(module, kind):
    arrays = [np.abs(x).astype(kind) for x in problem()]
    upcast = [jnp.asarray(x).astype(jnp.bfloat16) for x in arrays]
    run = jax.jit(lambda *x: jax.value_and_grad(module.linear_cross_entropy, (0, 1))(*x, TARGETS))
    (loss, gradients), (expected, of_upcast) = run(*arrays), run(*upcast)
    np.testing.assert_array_equal(loss, expected)
    for x, gradient, wanted in zip(arrays, gradients, of_upcast):
        assert gradient.dtype == x.dtype
        np.testing.assert_array_equal(
            gradient.astype("float32"), wanted.astype(kind).astype("float32")
        )


@pytest.mark.parametrize("module", [jaxent, reference])
def test_narrower_products_are_refused_by_name(module):
    hidden, kernel = problem()
    for kind in (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8):
        with pytest.raises(TypeError, match="dtype must be a float type of 16 bits or more"):
            module.linear_cross_entropy(hidden, kernel, TARGETS, dtype=kind)
    four_bits = kernel.astype(jnp.float4_e2m1fn)
    with pytest.raises(TypeError, match=r"pass kernel\.astype\(jnp\.bfloat16\)"):
        module.linear_cross_entropy(hidden, four_bits, TARGETS)


# ---- dot_general -------------------------------------------------------------------------


def quantized(x, axes):
    """Round to 17 steps, scaled for each index of the axes that are not summed over.

    A step is a power of 2, so that no loop of half precision has other digits than another.
    """
    top = jnp.max(jnp.abs(x.astype(jnp.promote_types(x.dtype, "float32"))), axes, keepdims=True)
    step = jnp.ldexp(jnp.ones_like(top), jnp.frexp(top)[1] - 3)
    return (jnp.round(x / step) * step).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def quantized_dot(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
    return quantized_dot_fwd(lhs, rhs, dimension_numbers, precision, preferred_element_type)[0]


def quantized_dot_fwd(lhs, rhs, dimension_numbers, precision, preferred_element_type):
    """The product of quantized operands, whose gradients are those of such operands."""
    operands = [quantized(x, axes) for x, axes in zip((lhs, rhs), dimension_numbers[0])]
    out = jax.lax.dot_general(
        *operands,
        dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return out, operands


def quantized_dot_bwd(dimension_numbers, precision, preferred_element_type, operands, cotangent):
    def product(lhs, rhs):
        return jax.lax.dot_general(
            lhs,
            rhs,
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    return jax.vjp(product, *operands)[1](cotangent)


quantized_dot.defvjp(quantized_dot_fwd, quantized_dot_bwd)


def logits_of(hidden, kernel, class_axis=-1):
    """The quantized logits, whole, as a Flax layer makes them."""
    contracted = 0 if class_axis == -1 else 1
    return quantized_dot(
        hidden,
        kernel,
        (((hidden.ndim - 1,), (contracted,)), ((), ())),
        preferred_element_type=jnp.promote_types(jnp.float32, hidden.dtype),
    )


@forms
@few
@given(head_calls(EVERY_OPTION))
def test_a_given_product_and_its_gradients_are_those_of_the_reference(made_forward, call):
    call = call.replace(dot_general=quantized_dot)
    with in_form(made_forward):
        actual = evaluate(jaxent.linear_cross_entropy, call)
    assert_same(actual, evaluate(reference.linear_cross_entropy, call), 64)


@few
@given(st.booleans(), st.sampled_from([None, jax.lax.dot_general, quantized_dot]), pair_calls())
def test_a_divergence_has_the_given_product_of_each_head(skip, of_teacher, call):
    call = call.replace(dot_general=quantized_dot, teacher_dot_general=of_teacher)
    with forced(skip=skip, block=3):
        actual = call.run(jaxent.linear_distillation)
    assert_same_with_stats(actual, call.run(reference.linear_distillation), 128)


def derivatives(loss, *x):
    """The value, and the gradients of first and second order, in both modes."""
    gradient = jax.grad(loss, (0, 1))
    second = jax.grad(lambda *y: sum(jnp.sum(g**2) for g in gradient(*y)), (0, 1))
    return loss(*x), gradient(*x), jax.jvp(gradient, x, x)[1], second(*x)


def test_a_divergence_has_the_derivatives_of_the_given_products_logits():
    (hidden, kernel), (teacher_hidden, teacher_kernel) = problem(), problem(width=5)
    teacher_hidden = -teacher_hidden

    def total(loss, stats):
        return loss + jnp.sum(jnp.sin(stats.entropy))

    def streamed(hidden, kernel):
        found = jaxent.linear_distillation(
            hidden,
            kernel,
            teacher_hidden,
            teacher_kernel,
            beta=0.3,
            dot_general=quantized_dot,
            teacher_dot_general=quantized_dot,
            chunk_size=3,
            return_stats=True,
        )
        return total(*found)

    def dense(hidden, kernel):
        student, teacher = logits_of(hidden, kernel), logits_of(teacher_hidden, teacher_kernel)
        return total(*jaxent.distillation(student, teacher, beta=0.3, return_stats=True))

    actual, expected = (
        jax.jit(functools.partial(derivatives, loss))(hidden, kernel) for loss in (streamed, dense)
    )
    jax.tree.map(lambda a, b: assert_close(a, b, 64), actual, expected)


@pytest.mark.parametrize(("made_forward", "class_axis"), [(False, -1), (True, 0)])
def test_a_given_product_is_that_of_the_logits(made_forward, class_axis):
    hidden, kernel = problem()
    kernel = kernel if class_axis == -1 else kernel.T

    def streamed(hidden, kernel):
        return jaxent.linear_cross_entropy(
            hidden, kernel, TARGETS, class_axis=class_axis, dot_general=quantized_dot, chunk_size=3
        )

    def dense(hidden, kernel):
        return jaxent.cross_entropy(logits_of(hidden, kernel, class_axis), TARGETS)

    with in_form(made_forward):
        actual, expected = (
            jax.jit(functools.partial(derivatives, loss))(hidden, kernel)
            for loss in (streamed, dense)
        )
    jax.tree.map(lambda a, b: assert_close(a, b, 32), actual, expected)


def test_statistics_are_those_of_the_given_product():
    hidden, kernel = problem()
    functions = [module.linear_token_stats for module in (jaxent, reference)]
    actual, twin = (
        jax.jit(functools.partial(function, dot_general=quantized_dot))(hidden, kernel, TARGETS)
        for function in functions
    )
    expected = jaxent.token_stats(logits_of(hidden, kernel), TARGETS)
    for stats in (actual, twin):
        jax.tree.map(lambda a, b: assert_close(a, b, 32, "float32"), stats, expected)


def test_examples_have_a_product_each_under_vmap():
    hidden, kernel = problem()
    loss = functools.partial(jaxent.linear_cross_entropy, dot_general=quantized_dot)
    expected = loss(hidden, kernel, TARGETS, reduction="none")
    one = functools.partial(loss, reduction="none")
    actual = jax.vmap(one, (0, None, 0))(hidden, kernel, TARGETS)
    assert_close(actual, expected, 8)


@forms
def test_precision_and_dtypes_reach_the_given_product(made_forward):
    seen = []

    def noted(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
        seen.append((lhs.dtype, rhs.dtype, precision, preferred_element_type))
        product = jax.lax.dot_general(lhs, rhs, dimension_numbers, precision=precision)
        return product.astype(jnp.bfloat16)

    hidden, kernel = problem()
    with in_form(made_forward):
        loss, gradients = jax.value_and_grad(jaxent.linear_cross_entropy, (0, 1))(
            hidden, kernel, TARGETS, dot_general=noted, dtype=jnp.bfloat16, precision="highest"
        )
    half, single = jnp.dtype("bfloat16"), jnp.dtype("float32")
    assert {*seen} == {(half, half, "highest", single)}
    logits = jnp.matmul(*(jnp.asarray(x, jnp.bfloat16) for x in (hidden, kernel)))
    assert_close(loss, jaxent.cross_entropy(logits, TARGETS), 1, "bfloat16")
    assert all(gradient.dtype == jnp.float32 for gradient in gradients)


def test_an_explicit_mesh_takes_a_given_product():
    mesh = jax.make_mesh((2, 2), ("data", "classes"), (AxisType.Explicit,) * 2)
    hidden, kernel = problem(num_classes=12)

    def loss(hidden, kernel, targets):
        products = {"dot_general": quantized_dot}
        loss = jaxent.linear_cross_entropy(hidden, kernel, targets, **products)
        products["teacher_dot_general"] = quantized_dot
        return loss + jaxent.linear_distillation(hidden, kernel, -hidden, kernel, **products)

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    expected = run(hidden, kernel, TARGETS)
    with jax.set_mesh(mesh):
        split = jax.device_put(hidden, P("data")), jax.device_put(kernel, P(None, "classes"))
        actual = run(*split, jax.device_put(TARGETS, P("data")))
    jax.tree.map(lambda a, b: assert_close(a, b, 32), actual, expected)


def test_a_second_call_compiles_nothing():
    hidden, kernel = problem()
    gradient = jax.grad(functools.partial(jaxent.linear_cross_entropy, dot_general=quantized_dot))
    gradient(hidden, kernel, TARGETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "dot_general", None)  # nothing is traced again
        gradient(hidden, kernel, TARGETS)


class Scaled(nnx.Module):
    """A product with a parameter."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, lhs, rhs, dimension_numbers, **keywords):
        return self.scale * jax.lax.dot_general(lhs, rhs, dimension_numbers, **keywords)


def as_integers(lhs, rhs, dimension_numbers, **keywords):
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, **keywords).astype(int)


def transposed(lhs, rhs, dimension_numbers, **keywords):
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, **keywords).T


@pytest.mark.parametrize("module", [jaxent, reference])
def test_what_is_no_product_is_refused(module):
    hidden, kernel = problem()
    for dot_general, message in (
        ("int8", "dot_general must be a function like jax.lax.dot_general, got 'int8'"),
        (jnp.matmul, r"take \(lhs, rhs, dimension_numbers, precision=.*too many positional"),
        (lambda a, b, dims: a, r"got a function: got an unexpected keyword argument 'precision'"),
        (Scaled(), "must be static, without arrays or traced values of its own, got a Scaled"),
        (as_integers, r"must return a float array, \[1, 11\] for hidden \[1, 4\].*got int32\["),
        (transposed, r"must return a float array, \[1, 11\].*got float32\[11, 1\]"),
    ):
        for function in (module.linear_cross_entropy, module.linear_token_stats):
            with pytest.raises(TypeError, match=message):
                function(hidden, kernel, TARGETS, dot_general=dot_general)
        heads = hidden, kernel, hidden, kernel
        with pytest.raises(TypeError, match=message):
            module.linear_distillation(*heads, dot_general=dot_general)
        message = re.sub(r"^dot_general|hidden", r"teacher_\g<0>", message)
        with pytest.raises(TypeError, match=message):
            module.linear_distillation(*heads, teacher_dot_general=dot_general)


def test_a_product_that_holds_a_traced_scale_is_refused():
    hidden, kernel = problem()

    def loss(scale):
        def scaled(lhs, rhs, *dimension_numbers, **keywords):
            return scale * jax.lax.dot_general(lhs, rhs, *dimension_numbers, **keywords)

        return jaxent.linear_cross_entropy(hidden, kernel, TARGETS, dot_general=scaled)

    assert_close(loss(2.0), jaxent.cross_entropy(2 * hidden @ kernel, TARGETS), 8)
    for transform in (jax.jit, jax.grad):
        with pytest.raises(TypeError, match="dot_general must be static"):
            transform(loss)(2.0)


# ---- LinearHead --------------------------------------------------------------------------


def halves(arrays, *, dtype=None):
    """Round to float16, whatever the dtype."""
    return tuple(x if x is None else x.astype(jnp.float16).astype(jnp.float32) for x in arrays)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(
    "keywords",
    [{"dot_general": quantized_dot}, {"promote_dtype": halves}, {}],
    ids=["dot_general", "promote_dtype", "neither"],
)
def test_loss_of_a_head_is_that_of_its_logits(keywords, use_bias):
    def quantized_without_sharding(*args, out_sharding=None, **keywords):
        return quantized_dot(*args, **keywords)

    if "dot_general" in keywords:
        keywords = {"dot_general": quantized_without_sharding}
    hidden, _ = problem()
    layer = jaxent.LinearHead(4, 11, use_bias=use_bias, rngs=nnx.Rngs(0), **keywords)
    actual = nnx.jit(nnx.value_and_grad(lambda layer: layer.loss(hidden, TARGETS)))(layer)
    expected = nnx.jit(
        nnx.value_and_grad(lambda layer: jaxent.cross_entropy(layer(hidden), TARGETS))
    )(layer)
    jax.tree.map(lambda a, b: assert_close(a, b, 16), actual, expected)
    linear = nnx.Linear(4, 11, use_bias=use_bias, rngs=nnx.Rngs(0))
    plain = jaxent.cross_entropy(linear(hidden), TARGETS)
    assert (np.abs(actual[0] - plain) > 1e-6) == bool(keywords)


def test_product_of_the_criterion_overrides_that_of_the_layer():
    hidden, _ = problem()
    criterion = jaxent.LinearCrossEntropyLoss(dot_general=quantized_dot)
    assert repr(criterion) == "LinearCrossEntropyLoss(dot_general=quantized_dot)"
    assert criterion == jaxent.LinearCrossEntropyLoss(dot_general=quantized_dot)
    layer = jaxent.LinearHead(4, 11, criterion=criterion, rngs=nnx.Rngs(0))
    loss = jaxent.cross_entropy(logits_of(hidden, layer.kernel[...]), TARGETS)
    assert_close(layer.loss(hidden, TARGETS), loss, 16)


def test_a_head_refuses_a_product_with_parameters():
    for dot_general in (Scaled(), len):
        with pytest.raises(TypeError, match="dot_general must be"):
            jaxent.LinearHead(4, 11, dot_general=dot_general, rngs=nnx.Rngs(0))


# ---- How many products -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made_forward", "of_both", "dot_general"),
    [(False, 4, None), (False, 4, quantized_dot), (True, 3, None)],
    ids=["streamed", "streamed, given", "made forward"],
)
def test_a_frozen_head_costs_a_product_less(made_forward, of_both, dot_general):
    shapes = (64, 32), (32, 512), (64,)

    def loss(hidden, kernel, targets):
        return jaxent.linear_cross_entropy(
            hidden, kernel, targets, dot_general=dot_general, chunk_size=128
        )

    def products(arguments):
        """Return how many there are, and how many arrays of the kernel's shape a loop carries."""
        gradient = jax.jit(jax.grad(loss, arguments))
        arrays = map(jax.ShapeDtypeStruct, shapes, ["float32", "float32", "int32"])
        with forced(made_forward=made_forward, skip=True, block=16):
            lines = gradient.lower(*arrays).compile().as_text().splitlines()
        loops = [line.split(" while(")[0] for line in lines if " while(" in line]
        assert loops
        dots = sum(bool(re.search(r"= \S+ dot\(", line)) for line in lines)
        return dots, max(loop.count("f32[32,512]") for loop in loops)

    assert products((0, 1)) == (of_both, 2)
    assert products(0) == (of_both - 1, 1)
