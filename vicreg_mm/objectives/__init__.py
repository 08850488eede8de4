"""Objectives by name: modules that take a dictionary of views' embeddings and give (loss, terms, logs).

    objective = vicreg_mm.objectives.build("vicreg", convention="official")
    loss, terms, logs = objective({"global_0": z0, "global_1": z1})

Another package offers its own through the entry-point group `vicreg_mm.objectives`.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from vicreg_mm.registry import Registry

OBJECTIVES = Registry("objective", group="vicreg_mm.objectives")


def names() -> list[str]:
    """All registered objectives, sorted."""
    return OBJECTIVES.names()


def build(name: str, **options: Any) -> nn.Module:
    """The objective `name`; raises ValueError with the known names, or with the options that it takes."""
    return OBJECTIVES.build(name, **options)


def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that puts a builder of an objective under `name`."""
    return OBJECTIVES.register(name)


# each module registers its builder; they import OBJECTIVES from here, so they come last
from vicreg_mm.objectives import crossmodal as crossmodal  # noqa: E402
from vicreg_mm.objectives import multicrop as multicrop  # noqa: E402
from vicreg_mm.objectives import vicreg as vicreg  # noqa: E402
