"""The recipes of `docs/recipes` do what they say: each against the plain formula on logits."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

PAGES = {
    page.stem: page.read_text()
    for page in (pathlib.Path(__file__).parent.parent / "docs" / "recipes").glob("[a-z]*.md")
}
B, T, D, C = 3, 6, 5, 11
RANDOM = np.random.default_rng(0)
HIDDEN = jnp.asarray(RANDOM.normal(size=(B, T, D)), jnp.float32)
KERNEL = jnp.asarray(RANDOM.normal(size=(D, C)), jnp.float32)
TOKENS = jnp.asarray(RANDOM.integers(0, C, (B, T)))
# Padding at the ends, and a row that is nothing else.
TARGETS = TOKENS.at[0, 4:].set(-100).at[1, :2].set(-100).at[2].set(-100)
COUNTED = TARGETS != -100


@functools.cache
def recipe(page):
    """What the page's blocks define."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    block = "\n".join(blocks)
    namespace = {"__name__": page}
    exec(compile(block, f"{page}.md", "exec"), namespace)
    return namespace


def log_probs(hidden, kernel, targets):
    """Log p of all classes, and of the targets; of an ignored one, of class 0."""
    log_p = jax.nn.log_softmax(hidden @ kernel)
    index = jnp.where(targets == -100, 0, targets)
    return log_p, jnp.take_along_axis(log_p, index[..., None], -1)[..., 0]


def mean_of(values, counted):
    return jnp.sum(jnp.where(counted, values, 0)) / jnp.maximum(jnp.sum(counted), 1)


def mean_loss(hidden, kernel, targets):
    return mean_of(-log_probs(hidden, kernel, targets)[1], targets != -100)


def assert_same(actual, expected, *arguments):
    """The same values and gradients by all arguments, which are floats."""
    numbers = tuple(range(len(arguments)))
    for got, wanted in zip(
        *(jax.jit(jax.value_and_grad(f, numbers))(*arguments) for f in (actual, expected))
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, wanted
        )


@pytest.mark.parametrize("page", PAGES)
def test_a_recipe_is_short_and_has_a_test(page):
    text = PAGES[page]
    assert len(text.splitlines()) <= 55
    assert "**Memory.**" in text
    assert f"test_{page}" in globals()


def test_offline_distillation():
    functions = recipe("offline_distillation")
    teacher = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, C)), jnp.float32)
    indices, probabilities = functions["top_k"](spoilt(teacher), COUNTED, 4)

    def plain(hidden, kernel):
        smallest_kept = jax.lax.top_k(teacher, 4)[0][..., -1:]
        q = jax.nn.softmax(jnp.where(teacher >= smallest_kept, teacher, -jnp.inf))
        losses = -jnp.sum(q * jax.nn.log_softmax(hidden @ kernel), -1)
        return mean_of(losses, COUNTED)

    def loss(hidden, kernel):
        return functions["distillation_loss"](spoilt(hidden), kernel, indices, probabilities)

    assert_same(loss, plain, HIDDEN, KERNEL)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
def test_teacher_distillation(beta):
    random = np.random.default_rng(1)
    teacher_hidden = jnp.asarray(random.normal(size=(B, T, 7)), jnp.float32)
    teacher_kernel = jnp.asarray(random.normal(size=(7, C)), jnp.float32)

    def loss(hidden, kernel):
        teacher = spoilt(teacher_hidden), teacher_kernel
        function = recipe("teacher_distillation")["distillation_loss"]
        return function(spoilt(hidden), kernel, teacher, TARGETS, beta=beta)

    def plain(hidden, kernel):
        p = jax.nn.softmax(teacher_hidden @ teacher_kernel / 2)
        q = jax.nn.softmax(hidden @ kernel / 2)
        m = beta * p + (1 - beta) * q
        both = {0.0: [(1, p, q)], 1.0: [(1, q, p)]}.get(beta, [(beta, p, m), (1 - beta, q, m)])
        losses = sum(share * jnp.sum(a * jnp.log(a / b), -1) for share, a, b in both)
        return 0.5 * mean_loss(hidden, kernel, TARGETS) + 0.5 * 4 * mean_of(losses, COUNTED)

    assert_same(loss, plain, HIDDEN, KERNEL)
    log_p, log_q = (
        jax.nn.log_softmax(x)[COUNTED] for x in (teacher_hidden @ teacher_kernel, HIDDEN @ KERNEL)
    )
    _, metrics = jax.jit(recipe("teacher_distillation")["distillation_and_metrics"])(
        spoilt(HIDDEN), KERNEL, (spoilt(teacher_hidden), teacher_kernel), TARGETS
    )
    wanted = {
        "agreement": jnp.mean(jnp.argmax(log_p, -1) == jnp.argmax(log_q, -1)),
        "entropy": -jnp.mean(jnp.sum(jnp.exp(log_q) * log_q, -1)),
        "teacher_entropy": -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, -1)),
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


def spoilt(hidden, counted=COUNTED):
    """Hidden states that are NaN where nothing is counted."""
    return jnp.where(counted[..., None], hidden, jnp.nan)


def test_instruction_tuning():
    loss = recipe("instruction_tuning")["instruction_loss"]
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0], [0] * 6])
    is_answer = jnp.array([[0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0], [0] * 6], bool)

    def plain(hidden, kernel):
        same = segment_ids[:, 1:] == segment_ids[:, :-1]
        _, log_p = log_probs(hidden[:, :-1], kernel, TOKENS[:, 1:])
        return mean_of(-log_p, is_answer[:, 1:] & same)

    def packed(hidden, kernel):
        return loss(hidden, kernel, TOKENS, is_answer, segment_ids)

    assert_same(packed, plain, HIDDEN, KERNEL)
    counted = np.zeros((B, T), bool)
    counted[0, [0, 1, 3, 4]] = counted[1, [1, 2]] = True
    value, gradient = jax.value_and_grad(packed, 1)(spoilt(HIDDEN, counted), KERNEL)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_gradient_accumulation():
    page = recipe("gradient_accumulation")
    expected, gradient = jax.value_and_grad(mean_loss, 1)(HIDDEN, KERNEL, TARGETS)
    loss, accumulated = jax.jit(page["accumulated"])(KERNEL, spoilt(HIDDEN), TARGETS)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(accumulated, gradient, atol=1e-6)
    kernel = page["multi_steps"](KERNEL, spoilt(HIDDEN), TARGETS, optax.sgd(0.5))
    np.testing.assert_allclose(kernel, KERNEL - 0.5 * gradient, atol=1e-6)
    nothing = jnp.full_like(TARGETS, -100)
    np.testing.assert_array_equal(page["accumulated"](KERNEL, HIDDEN, nothing)[1], 0)


def test_dpo():
    loss = recipe("dpo")["dpo_loss"]
    hidden = jnp.stack([HIDDEN, HIDDEN[:, ::-1]])
    reference = jnp.flip(hidden, -1), KERNEL[::-1]
    targets = jnp.stack([TARGETS, (TARGETS + 1).at[0, 2:].set(-100)])
    targets = jnp.where(targets < 0, -100, targets % C)

    def plain(hidden, kernel):
        def answers(hidden, kernel):
            return jnp.where(targets == -100, 0, log_probs(hidden, kernel, targets)[1]).sum(-1)

        policy, frozen = answers(hidden, kernel), answers(*reference)
        margins = [policy[0, i] - frozen[0, i] - (policy[1, i] - frozen[1, i]) for i in range(B)]
        return sum(jnp.log1p(jnp.exp(-0.3 * margin)) for margin in margins) / B

    def streamed(hidden, kernel):
        return loss(hidden, kernel, *reference, targets, beta=0.3)

    assert_same(streamed, plain, hidden, KERNEL)
    gradients = jax.grad(loss, (2, 3))(hidden, KERNEL, *reference, targets)
    assert not any(np.any(gradient) for gradient in gradients)
    assert np.isfinite(streamed(spoilt(hidden, targets != -100), KERNEL))


def test_policy_gradient():
    page = recipe("policy_gradient")
    old = log_probs(HIDDEN, 0.7 * KERNEL, TARGETS)[1]
    old = jnp.where(COUNTED, old, -jnp.inf)
    rewards = jnp.array([[1.0, 0.0, 5.0]])
    advantages = page["group_advantages"](rewards).reshape(B, 1)
    np.testing.assert_allclose(advantages[:, 0], (rewards[0] - 2) / np.std(rewards), rtol=1e-5)
    np.testing.assert_array_equal(page["group_advantages"](jnp.ones((2, 3))), 0)

    def streamed(hidden, kernel):
        return page["policy_loss"](
            hidden, kernel, TARGETS, old, advantages, temperature=0.8, entropy_bonus=0.1
        )

    def plain(hidden, kernel):
        log_p, of_target = log_probs(hidden, kernel / 0.8, TARGETS)
        ratio = jnp.exp(of_target - jnp.where(COUNTED, old, 0))
        surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages)
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
        return -mean_of(surrogate + 0.1 * entropy, COUNTED)

    assert_same(streamed, plain, HIDDEN, KERNEL)
    value, gradient = jax.value_and_grad(streamed, 1)(spoilt(HIDDEN), KERNEL)
    np.testing.assert_allclose(value, streamed(HIDDEN, KERNEL), rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_multi_token_prediction():
    loss = recipe("multi_token_prediction")["multi_token_loss"]
    hidden = jnp.stack([HIDDEN, HIDDEN[::-1], 2 * HIDDEN])
    segment_ids = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1], [1, 2, 2, 2, 2, 3]])
    tokens = np.array(TOKENS)
    tokens[1, 4:] = -100
    pairs = []
    for depth in range(3):
        for row, t in np.ndindex(B, T - depth - 1):
            after = t + depth + 1
            if segment_ids[row, t] == segment_ids[row, after] and tokens[row, after] >= 0:
                pairs.append((depth, row, t, tokens[row, after]))

    def plain(hidden, kernel):
        return -jnp.mean(jax.nn.log_softmax(hidden @ kernel)[tuple(np.transpose(pairs))])

    assert_same(lambda h, k: loss(h, k, tokens, segment_ids), plain, hidden, KERNEL)


def test_lora_head():
    page = recipe("lora_head")
    adapter = KERNEL[:, :2] / 3, KERNEL[:2] / 5

    def plain(adapter, hidden):
        a, b = adapter
        return mean_loss(hidden, KERNEL + 2 * a @ b, TARGETS)

    assert_same(lambda a, h: page["lora_loss"](a, h, KERNEL, TARGETS), plain, adapter, HIDDEN)
    actual = page["adapter_gradients"](adapter, HIDDEN, KERNEL, TARGETS)
    expected = jax.grad(plain, (0, 1))(adapter, HIDDEN)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), actual, expected)
    assert not np.any(jax.grad(page["lora_loss"], 2)(adapter, HIDDEN, KERNEL, TARGETS))


def test_frozen_head():
    page = recipe("frozen_head")
    expected = jax.grad(mean_loss)(HIDDEN, KERNEL, TARGETS)
    actual = page["hidden_gradient"](HIDDEN, KERNEL, TARGETS)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert not np.any(jax.grad(page["frozen_head_loss"], 1)(HIDDEN, KERNEL, TARGETS))


def test_sequence_means():
    page = recipe("sequence_means")

    def plain(hidden, kernel):
        log_p = log_probs(hidden, kernel, TARGETS)[1]
        return jnp.stack([mean_of(-log_p[i], COUNTED[i]) for i in range(B)])

    means = page["sequence_means"](spoilt(HIDDEN), KERNEL, TARGETS)
    np.testing.assert_allclose(means, plain(HIDDEN, KERNEL), rtol=1e-6)
    assert_same(
        lambda h, k: page["mean_of_sequence_means"](h, k, TARGETS),
        lambda h, k: jnp.sum(plain(h, k)) / 2,  # the third sequence is empty
        HIDDEN,
        KERNEL,
    )


def test_focal_loss():
    loss = recipe("focal_loss")["focal_loss"]
    for gamma in (0, 0.5, 2):

        def plain(logits, gamma=gamma):
            p = jnp.exp(log_probs(logits, jnp.eye(C), TARGETS)[1])
            return mean_of(-((1 - p) ** gamma) * jnp.log(p), COUNTED)

        assert_same(functools.partial(loss, targets=TARGETS, gamma=gamma), plain, HIDDEN @ KERNEL)
    gradient = jax.grad(loss)(spoilt(HIDDEN @ KERNEL), TARGETS, 0.5)
    assert np.isfinite(gradient).all()


def test_perplexity():
    evaluate = recipe("perplexity")["evaluate"]
    token_bytes = jnp.arange(1, C + 1)
    log_p = np.asarray(log_probs(HIDDEN, KERNEL, TARGETS)[1])[COUNTED]
    batches = [(spoilt(HIDDEN)[i], TARGETS[i]) for i in range(B)]
    perplexity, bits = evaluate(batches, KERNEL, token_bytes)
    np.testing.assert_allclose(perplexity, np.exp(-log_p.mean()), rtol=1e-5)
    text_bytes = np.asarray(token_bytes)[np.asarray(TARGETS)[COUNTED]].sum()
    np.testing.assert_allclose(bits, -log_p.sum() / np.log(2) / text_bytes, rtol=1e-5)


def test_evaluation():
    functions = recipe("evaluation")
    logits = HIDDEN @ KERNEL
    found = functions["evaluate"]([(logits[:1], TARGETS[:1]), (logits[1:], TARGETS[1:])])
    log_p, of_targets = log_probs(HIDDEN, KERNEL, TARGETS)
    best = jnp.argmax(log_p, -1)
    among = (jnp.argsort(log_p, -1)[..., -5:] == TARGETS[..., None]).any(-1)
    p, right = (np.asarray(x, float)[COUNTED] for x in (jnp.exp(log_p.max(-1)), best == TARGETS))
    bins = np.ceil(15 * p)
    gaps = [abs(sum(p[bins == b] - right[bins == b])) for b in range(16)]
    expected = {
        "perplexity": jnp.exp(mean_of(-of_targets, COUNTED)),
        "accuracy": mean_of(best == TARGETS, COUNTED),
        "top_5_accuracy": mean_of(among, COUNTED),
        "calibration_error": sum(gaps) / len(p),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5)

    def loss(temperature):
        return mean_of(-log_probs(HIDDEN / temperature, KERNEL, TARGETS)[1], COUNTED)

    fitted = functions["temperature"](logits, TARGETS)
    # These logits say nothing, the best temperature is infinite, and the loss flat to a rounding.
    least = min(loss(fitted * 1.05), loss(fitted / 1.05))
    assert loss(fitted) <= least * (1 + 4 * np.finfo("float32").eps)
