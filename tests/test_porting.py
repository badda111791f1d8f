"""PyTorch's loss modules and deprecated flags, read as ours."""

import itertools
import pathlib
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxent
from jaxent import porting

FLAGS = (None, True, False)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def linear(torch):
    if not hasattr(torch.nn, "LinearCrossEntropyLoss"):
        pytest.skip("PyTorch before 2.13 has no LinearCrossEntropyLoss")
    return torch.nn.LinearCrossEntropyLoss


@pytest.mark.parametrize(
    ("size_average", "reduce", "reduction"),
    [
        (True, None, "mean"),
        (False, None, "sum"),
        (None, True, "mean"),
        (None, False, "none"),
        (True, True, "mean"),
        (True, False, "none"),
        (False, True, "sum"),
        (False, False, "none"),
    ],
)
@pytest.mark.parametrize("overruled", ["none", "mean", "sum"])
def test_deprecated_flags_overrule_the_reduction(size_average, reduce, reduction, overruled):
    with pytest.warns(DeprecationWarning, match=f"pass reduction='{reduction}'") as caught:
        assert porting.legacy_reduction(size_average, reduce, overruled) == reduction
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_without_flags_the_reduction_stays_and_nothing_warns(reduction):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert porting.legacy_reduction(reduction=reduction) == reduction
        assert porting.legacy_reduction() == "mean"


def test_flags_decide_as_in_pytorch(torch):
    for size_average, reduce in itertools.product(FLAGS, FLAGS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.nn.NLLLoss(size_average=size_average, reduce=reduce, reduction="sum")
            ours = porting.legacy_reduction(size_average, reduce, "sum")
        assert ours == module.reduction, (size_average, reduce)


def test_importing_porting_does_not_import_torch():
    code = "import sys, jaxent.porting; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_jaxent_imports_no_flax_before_an_object_is_used():
    code = (
        "import sys, jaxent; assert 'flax' not in sys.modules; "
        "assert {'NLLLoss', 'porting'} <= {*dir(jaxent)}; "
        "from jaxent import *; assert 'flax' in sys.modules; "
        "assert NLLLoss is jaxent._flax.NLLLoss and porting is jaxent.porting"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        jaxent.nothing  # noqa: B018


@pytest.mark.parametrize("shape", [(4,), (6, 4), (2, 4, 3)])
def test_cross_entropy_module_computes_the_same_here(torch, shape):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=shape).astype(np.float32)
    labels = np.asarray(rng.integers(1, 4, () if len(shape) == 1 else shape[:1] + shape[2:]))
    if labels.ndim:
        labels[-1] = 0  # ignored
    module = torch.nn.CrossEntropyLoss(
        torch.tensor([1.0, 0.5, 2.0, 3.0]), ignore_index=0, reduction="sum", label_smoothing=0.2
    )
    loss = porting.from_torch(module)
    assert repr(loss) == (
        "CrossEntropyLoss(weight=float32[4], ignore_index=0, reduction='sum', "
        "label_smoothing=0.2, axis=1)"
    )
    expected = module(torch.tensor(logits), torch.tensor(labels)).item()
    assert expected > 0
    np.testing.assert_allclose(jax.jit(loss)(logits, labels), expected, rtol=1e-5)


def test_nll_module_computes_the_same_here(torch):
    logits = np.random.default_rng(1).normal(size=(5, 3, 2)).astype(np.float32)
    labels = np.array([[0, 1], [2, 9], [1, 1], [9, 0], [2, 0]])
    module = torch.nn.NLLLoss(torch.tensor([1.0, 2.0, 3.0]), ignore_index=9)
    loss = porting.from_torch(module)
    assert repr(loss) == "NLLLoss(weight=float32[3], ignore_index=9, axis=1)"
    expected = module(torch.log_softmax(torch.tensor(logits), 1), torch.tensor(labels)).item()
    ours = loss(jaxent.log_softmax(logits, axis=1), labels)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_defaults_stay_defaults(torch):
    assert repr(porting.from_torch(torch.nn.CrossEntropyLoss())) == "CrossEntropyLoss(axis=1)"
    assert repr(porting.from_torch(torch.nn.NLLLoss())) == "NLLLoss(axis=1)"


def test_deprecated_flags_of_a_module_arrive_as_its_reduction(torch):
    with pytest.warns(UserWarning, match="reduction='sum'"):
        module = torch.nn.CrossEntropyLoss(size_average=False)
    assert porting.from_torch(module).reduction == "sum"


def test_square_shapes_are_read_as_pytorch_reads_them(torch):
    logits = np.random.default_rng(2).normal(size=(2, 3, 3)).astype(np.float32)
    labels = np.array([[0, 1, 2], [2, 2, 0]])
    module = torch.nn.CrossEntropyLoss()
    expected = module(torch.tensor(logits), torch.tensor(labels)).item()
    np.testing.assert_allclose(porting.from_torch(module)(logits, labels), expected, rtol=1e-6)
    other = jaxent.cross_entropy(logits, labels, axis=-1)
    assert abs(other - expected) > 1e-2  # the other reading is another number


def test_subclasses_are_taken_for_what_they_extend(torch):
    class Mine(torch.nn.CrossEntropyLoss):
        pass

    assert type(porting.from_torch(Mine(label_smoothing=0.5))) is jaxent.CrossEntropyLoss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NLLLoss2d is deprecated
        assert type(porting.from_torch(torch.nn.NLLLoss2d())) is jaxent.NLLLoss


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_weight_of_any_dtype_comes_as_float32(torch, dtype):
    weight = torch.tensor([1.0, 0.5, 2.5], dtype=getattr(torch, dtype))
    loss = porting.from_torch(torch.nn.CrossEntropyLoss(weight))
    assert loss.weight.dtype == jnp.float32
    np.testing.assert_array_equal(loss.weight, [1.0, 0.5, 2.5])


def test_weight_is_a_copy_detached_from_its_module(torch):
    module = torch.nn.NLLLoss(torch.ones(3, requires_grad=True))
    loss = porting.from_torch(module)
    with torch.no_grad():
        module.weight.fill_(7.0)
    np.testing.assert_array_equal(loss.weight, [1.0, 1.0, 1.0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6, 3), (3,)])
def test_linear_module_becomes_a_head_that_computes_the_same(torch, linear, shape, bias):
    torch.manual_seed(0)
    weight = torch.tensor([1.0, 0.5, 2.0, 3.0])
    module = linear(3, 4, bias=bias, weight=weight, ignore_index=0, label_smoothing=0.2)
    head = porting.from_torch(module)
    assert type(head) is jaxent.LinearHead
    assert repr(head.criterion) == (
        "LinearCrossEntropyLoss(weight=float32[4], ignore_index=0, label_smoothing=0.2)"
    )
    hidden = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    labels = np.array([1, 2, 3, 0, 1, 0]) if len(shape) == 2 else np.array(2)
    theirs = module(torch.tensor(hidden), torch.tensor(labels))
    loss = nnx.jit(lambda head: head.loss(hidden, labels))(head)
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-5)
    logits = module.linear(torch.tensor(hidden)).detach()
    np.testing.assert_allclose(head(hidden), logits, rtol=1e-5, atol=1e-6)


def test_gradient_step_of_a_ported_head_is_that_of_its_module(torch, linear):
    torch.manual_seed(1)
    module = linear(3, 4, bias=True, reduction="sum")
    head = porting.from_torch(module)
    hidden = np.random.default_rng(4).normal(size=(6, 3)).astype(np.float32)
    labels = np.array([1, 2, 3, -100, 1, 0])
    module(torch.tensor(hidden), torch.tensor(labels)).backward()
    gradients = nnx.grad(lambda head: head.loss(hidden, labels))(head)
    for name, theirs in (
        ("kernel", module.linear.weight.grad.T),
        ("bias", module.linear.bias.grad),
    ):
        assert np.any(theirs.numpy() != 0)
        np.testing.assert_allclose(gradients[name][...], theirs, rtol=1e-5, atol=1e-6)


def test_linear_module_of_defaults_is_a_head_of_defaults(linear):
    head = porting.from_torch(linear(3, 4))
    assert repr(head.criterion) == "LinearCrossEntropyLoss()"  # ignoring -100, as torch's None
    assert head.bias is None
    built = jaxent.LinearHead(3, 4, use_bias=False, rngs=nnx.Rngs(0))
    assert nnx.graphdef(head) == nnx.graphdef(built)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_parameters_of_a_head_keep_their_dtype_and_every_bit(torch, linear, dtype):
    module = linear(3, 5, bias=True, dtype=getattr(torch, dtype))
    with jax.enable_x64(dtype == "float64"):
        head = porting.from_torch(module)
    theirs = {"kernel": module.linear.weight.T, "bias": module.linear.bias}
    for name, parameter in theirs.items():
        ours = getattr(head, name)[...]
        assert ours.dtype == head.param_dtype == dtype
        np.testing.assert_array_equal(
            np.asarray(ours, np.float64), parameter.detach().double().numpy(), strict=True
        )


def test_float64_parameters_come_as_float32_where_jax_has_no_float64(torch, linear):
    module = linear(3, 5, bias=True, dtype=torch.float64)
    head = porting.from_torch(module)
    assert head.kernel.dtype == head.bias.dtype == head.param_dtype == jnp.float32
    theirs = module.linear.weight.T.detach().numpy()
    np.testing.assert_array_equal(head.kernel[...], theirs.astype(np.float32))


def test_parameters_of_a_head_are_copies(torch, linear):
    module = linear(64, 64, bias=True, weight=torch.ones(64))
    head = porting.from_torch(module)
    before = jax.tree.map(np.array, nnx.state(head))
    with torch.no_grad():
        for tensor in (module.linear.weight, module.linear.bias, module.weight):
            tensor.fill_(7.0)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(head), before)
    assert np.any(head.kernel[...] != 7)
    assert np.all(head.criterion.weight == 1)


def test_chunking_options_of_a_head_are_left_behind(torch, linear):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method=None)
    head = porting.from_torch(linear(3, 4, options=options))
    assert repr(head.criterion) == "LinearCrossEntropyLoss()"


@pytest.mark.parametrize("out_features", [(2,), (4, 3), (1,)])
def test_head_of_several_codebooks_is_refused_in_a_message_that_says_what_to_call(
    linear, out_features
):
    with pytest.raises(ValueError, match="out_features") as caught:
        porting.from_torch(linear(5, 10, out_features=out_features))
    message = str(caught.value)
    assert message.startswith(f"module has out_features={out_features}")
    assert "one jaxent.linear_cross_entropy under jax.vmap" in message
    section = message.split('"')[1]
    page = pathlib.Path(__file__).parent.parent / "docs" / "porting" / "pytorch.md"
    assert "docs/porting/pytorch.md" in message
    assert f"\n### {section}\n" in page.read_text()


def test_subclass_of_the_linear_module_is_taken_unless_it_has_a_forward(linear):
    class Mine(linear):
        pass

    class Scaled(linear):
        def forward(self, hidden, labels):
            return 2 * super().forward(hidden, labels)

    assert type(porting.from_torch(Mine(3, 4))) is jaxent.LinearHead
    with pytest.raises(TypeError, match=r"a torch\.nn\.LinearCrossEntropyLoss or .*Scaled"):
        porting.from_torch(Scaled(3, 4))


def test_probability_targets_with_an_ignore_index_are_refused_at_the_call_by_both(torch):
    module = torch.nn.CrossEntropyLoss(ignore_index=0)
    loss = porting.from_torch(module)
    logits, targets = np.zeros((2, 3), np.float32), np.full((2, 3), 1 / 3, np.float32)
    with pytest.raises(RuntimeError, match="ignore_index is not supported"):
        module(torch.tensor(logits), torch.tensor(targets))
    with pytest.raises(ValueError, match="ignore_index=0"):
        loss(logits, targets)


def test_other_modules_are_refused_in_a_message_that_says_what_is_taken(torch):
    class Focal(torch.nn.CrossEntropyLoss):
        def forward(self, logits, labels):
            return super().forward(logits, labels) ** 2

    refused = [
        torch.nn.KLDivLoss(),
        torch.nn.GaussianNLLLoss(),
        torch.nn.Linear(2, 2),
        torch.nn.CrossEntropyLoss,  # the class, not an instance
        Focal(),
    ]
    for module in refused:
        with pytest.raises(TypeError, match=r"takes a torch\.nn\.CrossEntropyLoss, a torch\.nn\."):
            porting.from_torch(module)
    with pytest.raises(TypeError, match=r"got torch\.nn\.modules\.loss\.KLDivLoss"):
        porting.from_torch(torch.nn.KLDivLoss())


def test_losses_of_the_same_name_that_are_not_pytorchs_are_refused():
    losses = (jaxent.CrossEntropyLoss(), jaxent.NLLLoss(), jaxent.LinearCrossEntropyLoss())
    for loss in (*losses, None, "CrossEntropyLoss"):
        with pytest.raises(TypeError, match="from_torch takes"):
            porting.from_torch(loss)


def test_configuration_that_pytorch_refuses_when_called_is_refused(torch):
    with pytest.raises(ValueError, match="label_smoothing"):
        porting.from_torch(torch.nn.CrossEntropyLoss(label_smoothing=1.5))
    with pytest.raises(ValueError, match="reduction"):
        porting.from_torch(torch.nn.NLLLoss(reduction="median"))
