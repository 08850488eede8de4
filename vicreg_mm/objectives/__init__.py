"""Objectives by name: modules that take a dictionary of views' embeddings and give (loss, terms, logs).

    objective = vicreg_mm.objectives.build("vicreg", convention="official")
    loss, terms, logs = objective({"global_0": z0, "global_1": z1})

Another package offers its own through the entry-point group `vicreg_mm.objectives`.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from vicreg_mm.registry import Registry, unknown_name

OBJECTIVES = Registry("objective", group="vicreg_mm.objectives")


def names() -> list[str]:
    """All registered objectives, sorted."""
    return OBJECTIVES.names()


def build(name: str, **options: Any) -> nn.Module:
    """The objective `name`; raises ValueError with the known names, or with the options that it takes.

    "a+b" is the sum of the objectives a and b. There, `a.OPTION` is an option of a, OPTION one of every part that takes it, and
    `a.weight` what a is multiplied by (1).
    """
    parts = name.split("+")
    if len(parts) == 1:
        return OBJECTIVES.build(name, **options)
    from vicreg_mm.objectives.sums import SumObjective

    if len(set(parts)) < len(parts):
        raise ValueError(f"objective '{name}' names a part twice; give it a weight instead (PART.weight)")
    own: dict[str, dict[str, Any]] = {part: {} for part in parts}
    weights = dict.fromkeys(parts, 1.0)
    for option, value in options.items():
        part, dot, inner = option.partition(".")
        if dot and part in own and inner == "weight":
            weights[part] = value
        elif dot and part in own:
            own[part][inner] = value
        elif takers := [part for part in parts if option in OBJECTIVES.options(part)]:
            for taker in takers:
                own[taker].setdefault(option, value)
        else:
            raise unknown_name(f"option of objective '{name}'", option, sorted({o for part in parts for o in OBJECTIVES.options(part)}))
    return SumObjective({part: OBJECTIVES.build(part, **own[part]) for part in parts}, weights)


def options(name: str) -> frozenset[str]:
    """The options that the objective `name`, or a part of that sum, takes."""
    return frozenset(option for part in name.split("+") for option in OBJECTIVES.options(part))


def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that puts a builder of an objective under `name`."""
    return OBJECTIVES.register(name)


# each module registers its builder; they import OBJECTIVES from here, so they come last
from vicreg_mm.objectives import contrastive as contrastive  # noqa: E402
from vicreg_mm.objectives import crossmodal as crossmodal  # noqa: E402
from vicreg_mm.objectives import multicrop as multicrop  # noqa: E402
from vicreg_mm.objectives import vicreg as vicreg  # noqa: E402
