"""What XLA and JAX made us write otherwise, whole: each place a function that says why.

The rest of the library reads as if the compiler were perfect. A docstring here says what happens
without the function, where that was seen, and what the function costs. Each has a plain form,
which `without(name)` takes instead: `tests/test_workarounds.py` shows what then breaks, on the
newest JAX, and a workaround without which nothing breaks is to be taken out.

CPU means XLA's CPU compiler. Others (GPU, TPU) get the formula unless a function says otherwise.
"""

from .blocks import row_max
from .classes import (
    add_at_class,
    class_numbers,
    is_inside,
    is_last,
    one_hot,
    put_at_class,
    sum_classes,
    take_class,
    zeros_like,
)
from .heads import (
    add_parts,
    add_slice,
    gather_parts,
    is_widened_on_cpu,
    scatter_slice,
    slice_of_bits,
    take_slice,
    transposed,
    with_cpu_plan,
)
from .kept import (
    computed_again,
    mapped_alike,
    once_per_row,
    packed,
    rounded,
    sums_of,
    unpacked,
)
from .mass import mass_sums
from .one_loop import in_one_loop, sum_at_once
from .registry import SWITCHED_OFF, WORKAROUNDS, without
from .sums import apart_and_others, moment_of_others, sum_form

__all__ = [
    "SWITCHED_OFF",
    "WORKAROUNDS",
    "add_at_class",
    "add_parts",
    "add_slice",
    "apart_and_others",
    "class_numbers",
    "computed_again",
    "gather_parts",
    "in_one_loop",
    "is_inside",
    "is_last",
    "is_widened_on_cpu",
    "mapped_alike",
    "mass_sums",
    "moment_of_others",
    "once_per_row",
    "one_hot",
    "packed",
    "put_at_class",
    "rounded",
    "row_max",
    "scatter_slice",
    "slice_of_bits",
    "sum_at_once",
    "sum_classes",
    "sum_form",
    "sums_of",
    "take_class",
    "take_slice",
    "transposed",
    "unpacked",
    "with_cpu_plan",
    "without",
    "zeros_like",
]
