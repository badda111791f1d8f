"""Eight host devices, set before JAX is imported, and the same examples in every CI run."""

import os

import hypothesis
import pytest

collect_ignore = ["typing_user"]  # for type checkers alone

FLAG = "--xla_force_host_platform_device_count"
if FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}=8".strip()

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
# For `tools/mutate.py`: what fails is not made smaller, and a busy machine is no failure.
hypothesis.settings.register_profile(
    "mutants",
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")
elif profile := os.environ.get("HYPOTHESIS_PROFILE"):
    hypothesis.settings.load_profile(profile)


@pytest.fixture(scope="module", params=["in one loop", "one by one"])
def sums(request):
    """Sum the terms of rows in both ways that a CPU has.

    By itself it takes the first for few classes, which nearly all tests have.
    """
    import jax

    from jaxent._forms import forced

    jax.clear_caches()
    with forced(one_loop=request.param == "in one loop"):
        yield
    jax.clear_caches()
