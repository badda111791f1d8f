"""Faults that others reported of their losses, each with its inputs, on ours.

docs/design/bugs_of_others.md has the reports; each test bears the number of one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxent

RANDOM = np.random.default_rng(0)
HIDDEN = jnp.asarray(RANDOM.normal(size=(8, 6)), jnp.float32)
KERNEL = jnp.asarray(RANDOM.normal(size=(6, 10)), jnp.float32)
TARGETS = jnp.asarray([3, 1, -100, 9, 0, -100, -100, 5])
LOGITS = HIDDEN @ KERNEL


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), a, b)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 4}])
def test_maxtext_4699_the_loss_scales_the_gradient_of_the_hidden_states_too(options):
    def loss(hidden, kernel, scale):
        return scale * jaxent.linear_cross_entropy(hidden, kernel, TARGETS, **options)

    one = jax.grad(loss, (0, 1))(HIDDEN, KERNEL, 1.0)
    small = jax.grad(loss, (0, 1))(HIDDEN, KERNEL, 1 / 65528)
    close(small, jax.tree.map(lambda g: g / 65528, one))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 4}])
def test_liger_1298_losses_of_tokens_take_a_cotangent_each(options):
    weight = jnp.arange(8.0)

    def of_head(hidden, kernel):
        losses = jaxent.linear_cross_entropy(hidden, kernel, TARGETS, reduction="none", **options)
        return jnp.sum(weight * losses)

    def of_logits(hidden, kernel):
        losses = jaxent.reference.cross_entropy(hidden @ kernel, TARGETS, reduction="none")
        return jnp.sum(weight * losses)

    close(*(jax.grad(f, (0, 1))(HIDDEN, KERNEL) for f in (of_head, of_logits)))


def test_liger_421_losses_of_tokens_are_an_array():
    assert jaxent.cross_entropy(LOGITS, TARGETS, reduction="none").shape == (8,)
    assert jaxent.linear_cross_entropy(HIDDEN, KERNEL, TARGETS, reduction="none").shape == (8,)


def test_olmo_core_702_to_ask_for_the_normalizer_adds_no_z_loss():
    plain = jaxent.linear_cross_entropy(HIDDEN, KERNEL, TARGETS)
    loss, stats = jaxent.linear_cross_entropy(HIDDEN, KERNEL, TARGETS, return_stats=True)
    close(loss, plain)
    z = jnp.sum(stats.log_normalizer**2) / stats.counted.sum()
    close(jaxent.linear_cross_entropy(HIDDEN, KERNEL, TARGETS, z_loss=0.1), plain + 0.1 * z)


def test_olmo_760_the_z_loss_is_a_mean_over_the_tokens_that_count():
    counted = TARGETS != -100
    kept = jaxent.cross_entropy(LOGITS[counted], TARGETS[counted], z_loss=0.1)
    close(jaxent.cross_entropy(LOGITS, TARGETS, z_loss=0.1), kept)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_verl_7200_no_partition_into_micro_batches_changes_the_mean(parts):
    batches = list(zip(jnp.split(LOGITS, parts), jnp.split(TARGETS, parts)))
    total = sum(jaxent.cross_entropy(x, y, reduction="sum") for x, y in batches)
    by = sum(jaxent.total_weight(y) for _, y in batches)
    close(total / by, jaxent.cross_entropy(LOGITS, TARGETS))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_verl_2656_log_probabilities_of_the_head_are_those_of_its_logits(scale):
    keywords = {"logit_scale": scale}
    of_head = jaxent.linear_token_stats(HIDDEN, KERNEL, TARGETS, chunk_size=4, **keywords)
    of_logits = jaxent.token_stats(LOGITS, TARGETS, **keywords)
    assert jnp.all(of_head.log_prob <= 0)
    close((of_head.log_prob, of_head.entropy), (of_logits.log_prob, of_logits.entropy))


def test_transformers_18297_the_mean_of_devices_is_not_the_mean_of_their_means():
    x, y = LOGITS.reshape(4, 2, 10), TARGETS.reshape(4, 2)
    means = jax.vmap(lambda x, y: jaxent.cross_entropy(x, y, axis_name="i"), axis_name="i")(x, y)
    close(means, jnp.full(4, jaxent.cross_entropy(LOGITS, TARGETS)))
    assert not np.allclose(jax.vmap(jaxent.cross_entropy)(x, y).mean(), means[0])


def test_trl_5617_the_entropy_is_of_the_tokens_that_are_trained_on():
    stats = jaxent.token_stats(LOGITS, TARGETS)
    p = jax.nn.softmax(LOGITS[TARGETS != -100])
    close(stats.entropy.sum() / stats.counted.sum(), -(p * jnp.log(p)).sum(-1).mean())


def test_optax_896_and_1762_an_infinite_logit_of_another_class_is_no_nan():
    logits, labels = jnp.array([-jnp.inf, 0.0, 0.0]), jnp.array([0.0, 1.0, 0.0])
    close(jaxent.cross_entropy(logits, labels, axis=-1), np.log(2))
    close(jax.grad(jaxent.cross_entropy)(logits, labels, axis=-1), jnp.array([0, -0.5, 0.5]))
    forward = jax.jacfwd(lambda x: jaxent.reference.cross_entropy(x, labels, axis=-1))(logits)
    close(forward, jnp.array([0, -0.5, 0.5]))


@pytest.mark.parametrize("label", [4, -1])
def test_optax_1185_a_label_out_of_range_is_found(label):
    logits, labels = jnp.array([[0.2, 0.1, 0.4, 0.6]]), jnp.array([label])
    assert jnp.isnan(jaxent.cross_entropy(logits, labels))
    with pytest.raises(ValueError, match=rf"targets\[0\] is {label}, outside \[0, 4\)"):
        jaxent.check_targets(labels, 4)


def test_jax_40384_a_small_gradient_is_the_other_one_negated():
    with jax.enable_x64(True):
        z = jnp.asarray([37.42994775023705, 0.0])
        gradient = jax.grad(lambda z: jaxent.log_softmax(z)[0])(z)
    np.testing.assert_allclose(gradient, [5.551115123125776e-17, -5.551115123125776e-17], 1e-14)


def test_jax_40409_float16_logits_of_many_classes_have_a_finite_gradient():
    x = jnp.zeros(70_000, jnp.float16).at[7].set(8)
    gradient = jax.grad(lambda x: jaxent.log_softmax(x).astype(jnp.float32).sum())(x)
    exact = np.asarray(x, np.float64)
    exact = 1 - 70_000 * np.exp(exact) / np.exp(exact).sum()
    np.testing.assert_allclose(gradient, exact, rtol=2e-3)


@pytest.mark.parametrize("size", [1.0, 1e4, 1e8, 1e20])
def test_mlx_4169_two_equal_logits_have_half_of_the_mass_whatever_their_size(size):
    close(jaxent.log_softmax(jnp.full((1, 2), size)), jnp.full((1, 2), -np.log(2)))


def test_ml_cross_entropy_59_a_target_of_another_shard_is_no_column_of_padding():
    def of_shard(kernel, mask):
        return jaxent.linear_cross_entropy(
            HIDDEN, kernel, TARGETS, class_mask=mask, class_axis_name="i"
        )

    padded = jnp.pad(KERNEL, ((0, 0), (0, 2))).reshape(6, 3, 4)
    mask = (jnp.arange(12) < 10).reshape(3, 4)
    found = jax.vmap(of_shard, in_axes=(1, 0), axis_name="i")(padded, mask)
    close(found, jnp.full(3, jaxent.cross_entropy(LOGITS, TARGETS)))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 4}])
def test_ml_cross_entropy_52_a_bias_is_added_to_the_logits(options):
    bias = 10 * jnp.asarray(RANDOM.normal(size=10), jnp.float32)
    keywords = {"bias": bias, "reduction": "none"} | options
    losses = jaxent.linear_cross_entropy(HIDDEN, KERNEL, TARGETS, **keywords)
    assert jnp.all(losses >= 0)
    close(losses, jaxent.cross_entropy(LOGITS + bias, TARGETS, reduction="none"))
