"""Which form computes a thing, where there are several with the same result.

The library has a rule for each choice, which stands where it is made. Tests and benchmarks want
the other form, too: `forced(one_loop=True)` makes the choice for them. A program that was traced
before stays as it is.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

CHOICES = {
    "one_loop": "whether a CPU sums a row's terms in one loop (`_xla.in_one_loop`)",
    "kept_bytes": "the float32 exponentials that a CPU may keep (`can_keep` of `_xla/sums.py`)",
    "made_forward": "whether a head's gradients are made in the forward pass (`_head/sizes.py`)",
    "skip": "whether a head knows that its tokens are its own, and skips what does not count",
    "block": "how many tokens are gone over together",
}
_forced: dict[str, object] = {}


def chosen(name: str, rule: Callable[..., T], *arguments: object) -> T:
    """Return what the rule says of the arguments, unless a caller of `forced` has chosen."""
    return _forced[name] if name in _forced else rule(*arguments)  # type: ignore[return-value]


@contextlib.contextmanager
def forced(**choices: object) -> Iterator[None]:
    """Make choices, of `CHOICES`, for what is traced within this context."""
    if unknown := choices.keys() - CHOICES:
        raise ValueError(f"{sorted(unknown)} are none of {', '.join(CHOICES)}")
    before = dict(_forced)
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
