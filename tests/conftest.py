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
    """Sum the terms of rows in both ways that a CPU has.

    By itself it takes the first for few classes, which nearly all tests have.
    """
    import jax

    jax.clear_caches()
    in_one_loop = request.param == "in one loop"
    # A mock would keep its arguments, which are traced.
    with mock.patch("jaxent._dense._is_unrolled", lambda *_: in_one_loop):  # noqa: PT008
        yield
    jax.clear_caches()
