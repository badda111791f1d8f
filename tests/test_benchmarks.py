"""The benchmarks run: each question is one, and what it times is what it says."""

import importlib

import jax
import numpy as np
import pytest

import jaxent

pytest.importorskip("optax")
QUESTIONS = importlib.import_module("benchmarks.__main__").QUESTIONS


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_says_what_it_asks_and_what_is_allowed(name):
    question = importlib.import_module(f"benchmarks.{name}")
    assert question.__doc__.splitlines()[0].strip()
    assert question.UNIT
    assert question.BOUND
    assert len(set(question.SIDES)) == len(question.SIDES) > 0
    assert callable(question.rows)


@pytest.mark.parametrize("width", [32, 256])
def test_the_order_that_is_timed_is_the_one_that_is_chosen(width):
    from benchmarks import head_speed, heads

    arrays = heads.draw((64, width, 512), "bfloat16")
    with jax.set_mesh(jax.make_mesh((1,), ("x",))):
        program = str(jax.make_jaxpr(jaxent.linear_cross_entropy)(*arrays))
        assert head_speed.chosen_order(arrays) == (width == 32)
    assert ("name=_total" in program) == (width == 32)


def test_sides_of_a_head_on_a_gpu_are_one_loss_and_all_are_timed():
    from benchmarks import head_gpu, heads

    shape = 32, 8, 64
    arrays = heads.draw(shape, "bfloat16")
    found = {side: float(loss(*arrays)) for side, loss in head_gpu.losses().items()}
    np.testing.assert_allclose([*found.values()], found["naive"], rtol=2**-8)
    row = head_gpu.filled(head_gpu.named(shape), shape, 1)
    assert row.values.keys() == found.keys()
    assert row.score
    assert all("TFLOP/s" in note for note in row.notes.split("; "))


def test_sparse_targets_are_those_of_the_probabilities_beside_them():
    from benchmarks import sparse_targets

    targets = sparse_targets.targets_of(8, 40)
    logits = jax.random.normal(jax.random.key(0), (8, 40))
    losses = [jaxent.cross_entropy(logits, targets[x]) for x in ("sparse", "probabilities")]
    np.testing.assert_allclose(*losses, rtol=1e-5)
