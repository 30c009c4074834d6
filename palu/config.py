"""``palu.UnlearnConfig``: the settings of a run and of its method, in one flat set of names."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from palu.methods import METHODS, Method
from palu.methods.base import Reference
from palu.methods.palu import RECIPES, PaluMethod
from palu.settings import RunSettings, field_names, field_values


@dataclass(frozen=True, init=False)
class UnlearnConfig(RunSettings):
    """Settings of :func:`palu.unlearn`: those of every run (:class:`palu.settings.RunSettings`) and of the method.

    All are given by name: ``UnlearnConfig(objective="npo", beta=0.2, epochs=5)``. ``palu unlearn --help`` lists them.
    Raises :class:`ValueError`, naming the field, where one is not valid or is not read by the method, and TypeError on
    a name that is no setting.

    Attributes:
        objective: ``"palu"``, a method that it is compared with (``"ga"``, gradient ascent; ``"gd"``, gradient
            difference; ``"dpo"``, ``"npo"``, ``"simnpo"``, ``"tpo"``, ``"satimp"``, ``"undial"``), or a class: a
            :class:`palu.methods.Method` of your own (docs/methods.md).
        method: the settings of the method, an instance of its ``Settings``.
    """

    objective: str | type[Method] = "palu"

    def __init__(self, objective: str | type[Method] = "palu", **settings: Any):
        self._given: frozenset[str]
        method = find_method(objective)
        object.__setattr__(self, "objective", objective)
        own = {name: settings.pop(name) for name in field_names(method.Settings) if name in settings}
        object.__setattr__(self, "_given", frozenset(own))  # of the method's settings; for replace
        for name in sorted(settings.keys() - set(field_names(RunSettings))):
            if not (readers := readers_of(name)):
                known = ["objective", *field_names(RunSettings), *field_names(method.Settings)]
                raise TypeError(f"{name!r} is no setting of palu.unlearn; the settings are {', '.join(sorted(known))}")
            raise ValueError(
                f"{name} = {settings[name]!r}: objective = {self.name!r} does not read it "
                f"({', '.join(readers)} would); leave it out"
            )
        super().__init__(method=method.Settings(**own), **settings)

    def replace(self, recipe: str | None = None, **overrides: Any) -> UnlearnConfig:
        """Return this configuration with the settings of RECIPES[recipe], if one is given, and then the overrides.

        With another ``objective``, its method has its own defaults, but for what this one's was given. Raises
        ValueError as :class:`UnlearnConfig` does, and where the recipe is none or not of this objective.
        """
        own = {name: value for name, value in field_values(self.method).items() if name in self._given}
        fields = {"objective": self.objective, **own, **field_values(self)}
        if recipe is not None:
            if recipe not in RECIPES:
                raise ValueError(f"recipe = {recipe!r}: give one of {', '.join(RECIPES)}, or None")
            if not issubclass(find_method(overrides.get("objective", self.objective)), PaluMethod):
                raise ValueError(f"recipe = {recipe!r} is of objective = 'palu'; leave one of them out")
            fields |= RECIPES[recipe]
        return UnlearnConfig(**fields | overrides)

    def values(self) -> dict[str, Any]:
        """Return every setting's value by its name; the objective by its name, too."""
        return copy.deepcopy({"objective": self.name, **field_values(self.method), **field_values(self)})

    @property
    def name(self) -> str:
        """The objective's name; of a class that is not in METHODS, its module and name."""
        given = self.objective
        return given if isinstance(given, str) else f"{given.__module__}.{given.__qualname__}"

    @property
    def onset_length(self) -> int:
        """How many tokens of each span the method acts on; -1: all."""
        return getattr(self.method, "n", -1)

    @property
    def reference(self) -> Reference:
        """What the run needs of the reference."""
        return self.method_class.reference(self)

    @property
    def method_class(self) -> type[Method]:
        """The method's class."""
        return find_method(self.objective)


def find_method(objective: Any) -> type[Method]:
    """Return the class of a method that is given by its name, or as a class. Raises ValueError."""
    if isinstance(objective, type) and issubclass(objective, Method):
        return objective
    if not isinstance(objective, str) or objective not in METHODS:
        raise ValueError(f"objective = {objective!r}: give one of {', '.join(METHODS)}, or a class of method")
    return METHODS[objective]


def readers_of(name: str) -> list[str]:
    """List the methods that have a setting of this name."""
    return [method for method, kind in METHODS.items() if name in field_names(kind.Settings)]
