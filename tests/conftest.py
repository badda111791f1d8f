"""Eight host devices, set before JAX is imported, and the same examples in every CI run."""

import os
from unittest import mock

import hypothesis
import pytest

collect_ignore = ["typing_user"]  # for type checkers alone

FLAG = "--xla_force_host_platform_device_count"
if FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}=8".strip()

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="module", params=["in one loop", "one by one"])
def sums(request):
    """Both ways in which a CPU sums the terms of rows; by itself it takes the first for few
    classes, which nearly all tests have."""
    import jax

    jax.clear_caches()
    with mock.patch("jaxent._dense._is_unrolled", lambda *_: request.param == "in one loop"):
        yield
    jax.clear_caches()
