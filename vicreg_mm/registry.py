"""Names for builders: `register("name")` puts a function under a name, `build("name", **options)` calls it.

A third-party package offers its own builders through a package entry point of the registry's group; they are
imported only when the names are listed or asked for.
"""

import difflib
import inspect
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any


def unknown_name(kind: str, name: str, known: list[str], limit: int = 40) -> ValueError:
    """One line that names the thing, the value and what exists (the closest ones, where there are many)."""
    if len(known) > limit:
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
        return ValueError(f"unknown {kind} '{name}'; closest of {len(known)} known: {', '.join(close) or 'none'}")
    return ValueError(f"unknown {kind} '{name}'; known: {', '.join(known)}")


class Registry:
    """Builders of one kind by name.

    kind: the word that error messages use. group: the entry-point group that other packages use, or None.
    """

    def __init__(self, kind: str, group: str | None = None):
        self.kind = kind
        self.group = group
        self._builders: dict[str, Callable[..., Any]] = {}
        self._plugins_loaded = group is None

    def register(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator that puts a builder under `name`; raises ValueError if the name is taken by another builder."""

        def put(builder: Callable[..., Any]) -> Callable[..., Any]:
            if not name or "+" in name:
                raise ValueError(f"{self.kind} '{name}': a name is not empty and has no '+', which joins names")
            taken = self._builders.get(name)
            if taken is not None and taken is not builder:
                raise ValueError(
                    f"{self.kind} '{name}' of {builder.__module__} clashes with the one that {taken.__module__} registered; "
                    "choose another name"
                )
            self._builders[name] = builder
            return builder

        return put

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load_plugins()
        return sorted(self._builders)

    def builder(self, name: str) -> Callable[..., Any]:
        """The builder registered as `name`; raises ValueError with the known names."""
        if name not in self._builders:
            self._load_plugins()
        if name not in self._builders:
            raise unknown_name(self.kind, name, self.names())
        return self._builders[name]

    def options(self, name: str) -> tuple[str, ...]:
        """The names of the options that the builder of `name` takes."""
        return tuple(inspect.signature(self.builder(name)).parameters)

    def build(self, name: str, **options: Any) -> Any:
        """Call the builder of `name`; an option that it does not take is a ValueError that lists those it does."""
        builder = self.builder(name)
        parameters = inspect.signature(builder).parameters
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            for option in options:
                if option not in parameters:
                    raise unknown_name(f"option of {self.kind} '{name}'", option, list(parameters))
        return builder(**options)

    def _load_plugins(self) -> None:
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        for point in entry_points(group=self.group or ""):
            loaded = point.load()
            if self._builders.get(point.name) is not loaded:
                self.register(point.name)(loaded)
