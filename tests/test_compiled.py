"""What the compiled programs hold and touch: the bounds that the benchmarks found, on the CPU.

Scratch is memory beyond inputs and outputs, of loss and gradient, in logits arrays of float32,
which is what half precision is computed in. Passes are XLA's count of bytes, in logits arrays.
`python -m benchmarks dense_compiled` has the same for accelerators.
"""

import functools
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from sharded import make_mesh

import jaxent

N, C = 256, 4096
OPTIONS = {
    "plain": {},
    "weight": {"weight": jnp.ones(C)},
    "class_mask": {"class_mask": jnp.arange(C) < C - 7},
    "sample_weight": {"sample_weight": jnp.ones(N)},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-4},
    "softcap": {"softcap": 30.0},
    "softcap and label_smoothing": {"softcap": 30.0, "label_smoothing": 0.1},
}
ROOT = pathlib.Path(__file__).parent.parent


def compiled(dtype, options, gradient=True):
    loss = functools.partial(jaxent.cross_entropy, **options)
    function = jax.jit(jax.value_and_grad(loss) if gradient else loss)
    logits, targets = jax.ShapeDtypeStruct((N, C), dtype), jax.ShapeDtypeStruct((N,), "int32")
    return function.lower(logits, targets).compile()


def scratch(program):
    return program.memory_analysis().temp_size_in_bytes / (4 * N * C)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.05), ("bfloat16", 1.05)])
def test_no_option_adds_scratch_of_the_size_of_the_logits(dtype, bound, options):
    # In half precision the exponentials are kept for the backward pass in float32, once. jax 0.10
    # keeps those of float32 beside the gradient, and not in its place.
    if jax.__version_info__ < (0, 12):
        bound = 1.05
    assert scratch(compiled(dtype, OPTIONS[options])) < bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_pass_holds_no_logits(dtype):
    # Of one block of classes in 64, gathered.
    assert scratch(compiled(dtype, {}, gradient=False)) < 0.07


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_pass_of_smoothed_targets_and_of_probabilities_holds_no_logits(dtype):
    def smoothed(logits, targets, weight):
        return jaxent.cross_entropy(logits, targets, weight=weight, label_smoothing=0.1)

    logits, probabilities = (jax.ShapeDtypeStruct((N, C), x) for x in (dtype, "float32"))
    indices, weight = jax.ShapeDtypeStruct((N,), "int32"), jax.ShapeDtypeStruct((C,), "float32")
    for function, arguments in (
        (smoothed, (indices, weight)),
        (jaxent.cross_entropy, (probabilities,)),
    ):
        assert scratch(jax.jit(function).lower(logits, *arguments).compile()) < 0.07


def test_smoothing_on_a_mesh_holds_no_logits():
    mesh = make_mesh("auto", data=2)
    loss = functools.partial(jaxent.cross_entropy, label_smoothing=0.1)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    logits = jax.ShapeDtypeStruct((2 * N, C), "float32", sharding=rows)
    targets = jax.ShapeDtypeStruct((2 * N,), "int32", sharding=rows)
    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(loss)).lower(logits, targets).compile()
    assert scratch(program) < 0.1  # of a device's rows


@pytest.mark.parametrize(("options", "passes"), [("plain", 8), ("softcap", 9)])
def test_bytes_touched(options, passes):
    # Read for the maximum; read, and exponentials written; read for their sum; read, and the
    # gradient written: 6, and XLA's counting of reductions' operands, and of all that a gather may
    # take from (of the block of the class apart).
    touched = compiled("float32", OPTIONS[options]).cost_analysis()["bytes accessed"]
    assert touched < (passes + 0.2) * 4 * N * C


def test_exponentials_are_computed_once():
    program = compiled("float32", {}).as_text()
    assert len(re.findall(rf"\[{N},{C}\]\S* exponential\(", program)) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("options", "gradient", "passes"),
    [
        ("plain", False, 3.3),
        ("plain", True, 6.0),
        ("weighted", False, 5.0),
        ("weighted", True, 7.8),
    ],
)
def test_few_classes_are_summed_at_once(dtype, options, gradient, passes):
    # Of pixels: read for the maximum, and read for all sums; read, and the gradient written. What
    # there is beside it of each pixel is 1/21 of a pass each time. One by one the sums take 4.4,
    # 8.5, 9.2 and 13.0 passes, and hold 1.4 arrays of logits, 2.4 in bfloat16.
    shape = (2, 21, 64, 64)
    weighted = {"weight": jnp.linspace(0.5, 2, 21), "label_smoothing": 0.1}
    chosen = weighted if options == "weighted" else {}
    loss = functools.partial(jaxent.cross_entropy, axis=1, **chosen)
    function = jax.jit(jax.value_and_grad(loss) if gradient else loss)
    logits = jax.ShapeDtypeStruct(shape, dtype)
    program = function.lower(logits, jax.ShapeDtypeStruct((2, 64, 64), "int32")).compile()
    size = 4 * logits.size
    assert program.cost_analysis()["bytes accessed"] < passes * size
    assert program.memory_analysis().temp_size_in_bytes < 0.6 * size


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="compiles for TPUs: libtpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tpu_touches_four_passes_and_holds_nothing(monkeypatch, dtype):
    # Read for the maximum; read for the sum; read, and the gradient written.
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import dense_compiled

    sharding = dense_compiled.accelerators.sharding("TPU v5e")
    shape = (8192, 128256)
    for name in ("jaxent", "jaxent, softcap", "jaxent, label_smoothing", "jaxent, all of these"):
        case = dense_compiled.LOSSES[name]
        _, share, passes = dense_compiled.figures(shape, dtype, *case, sharding)
        assert share < 1
        assert passes < 4.05
