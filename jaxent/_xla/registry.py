"""The names of the workarounds, and their switch for tests."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

WORKAROUNDS: dict[str, Callable[..., Any]] = {}
SWITCHED_OFF: set[str] = set()


def workaround(plain: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Name a function a workaround, of which `plain` is the form for a perfect compiler."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        WORKAROUNDS[name] = function

        @functools.wraps(function)
        def call(*args: P.args, **keywords: P.kwargs) -> R:
            form = plain if name in SWITCHED_OFF else function
            return form(*args, **keywords)

        return call

    return register


@contextlib.contextmanager
def without(name: str) -> Iterator[None]:
    """Take a workaround's plain form in what is traced within this context."""
    if name not in WORKAROUNDS:
        raise ValueError(f"{name} is none of {', '.join(WORKAROUNDS)}")
    jax.clear_caches()
    SWITCHED_OFF.add(name)
    try:
        yield
    finally:
        SWITCHED_OFF.remove(name)
        jax.clear_caches()


def by_platform(on_cpu: Callable[..., R], others: Callable[..., R], *arguments: Any) -> R:
    """Return `on_cpu(*arguments)` in a program for CPUs, else `others(*arguments)`."""
    result: R = jax.lax.platform_dependent(*arguments, cpu=on_cpu, default=others)
    return result


def hidden(values: R) -> R:
    """Return the values behind a barrier, past which XLA neither fuses nor shares."""
    result: R = jax.lax.optimization_barrier(values)
    return result
