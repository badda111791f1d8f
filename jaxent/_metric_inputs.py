"""What a metric is given: keywords, misspelt or not, and arrays beside the tokens."""

import difflib
import math
from collections.abc import Iterable
from typing import Any, TypedDict

import jax.numpy as jnp
from jax.typing import ArrayLike

from ._arguments import ArrayOrList, read_array
from ._axes import AxisName
from ._exact_sums import MOST_TERMS


class StatsKeywords(TypedDict, total=False):
    """The keywords of `jaxent.token_stats`."""

    ignore_index: int | None
    axis: int | None
    class_mask: ArrayOrList | None
    logit_scale: ArrayLike
    softcap: float | None
    class_axis_name: AxisName


OF_STATS = tuple(StatsKeywords.__annotations__)
OUTPUTS = ("logits", "targets", "labels", "sample_weight", "mask")


def check_size(shape: tuple[int, ...]) -> None:
    if (size := math.prod(shape)) > MOST_TERMS:
        raise ValueError(
            f"tokens are {list(shape)}: {size} are more than the {MOST_TERMS} that one call adds "
            "exactly; add parts of them"
        )


def read_like(name: str, value: Any, shape: tuple[int, ...]) -> Any:
    array = read_array(name, value)
    got = array.shape
    if got and (len(got) != len(shape) or any(a not in (1, b) for a, b in zip(got, shape))):
        hint = "; of a table (C,), pass its entries at the targets" if name == "num_bytes" else ""
        raise ValueError(
            f"{name} is {list(got)}: it must be a scalar, or broadcast to the tokens' "
            f"{list(shape)}, with as many dimensions{hint}"
        )
    return array


def with_mask(outputs: dict[str, Any]) -> dict[str, Any]:
    """Return the outputs, the mask of `nnx.MultiMetric.update` being a weight."""
    mask, weight = outputs.get("mask"), outputs.get("sample_weight")
    if mask is None:
        return outputs
    return {
        **outputs,
        "sample_weight": mask if weight is None else jnp.asarray(weight) * jnp.asarray(mask),
    }


def logits_and_targets(outputs: dict[str, Any], otherwise: str = "") -> tuple[Any, Any]:
    targets = outputs.get("targets")
    targets = outputs.get("labels") if targets is None else targets
    if outputs.get("logits") is None or targets is None:
        raise TypeError(
            f"logits and targets (or labels) are needed{otherwise}, got {', '.join(outputs)}"
        )
    return outputs["logits"], targets


def check_names(given: Iterable[str], known: tuple[str, ...], only: bool = False) -> None:
    """Raise where a name is misspelt; where `only` these are known, where it is another one."""
    for name in given:
        like = difflib.get_close_matches(name, known, 1, 0.8)
        if name not in known and (only or like):
            hint = f"did you mean {like[0]}?" if like else f"it may be {', '.join(known)}"
            raise TypeError(f"{name} is not known; {hint}")


def taken(outputs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: outputs[name] for name in names if name in outputs}
