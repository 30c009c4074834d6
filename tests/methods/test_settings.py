"""Settings are those of every run and of the method alone; a method may be a class of the user's."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from helpers.tiny import forget_rows, retain_rows, same_weights, tiny_llama, weights
from torch import Tensor

import palu
from palu.config import UnlearnConfig, readers_of
from palu.data.packing import Batch
from palu.methods import METHODS
from palu.methods.base import MethodSettings, Shares
from palu.methods.baseline import Baseline
from palu.methods.gradient_ascent import GradientDifference
from palu.methods.palu import RECIPES
from palu.settings import field_names, positive


@dataclass(frozen=True)
class ScaledSettings(MethodSettings):
    """A setting of its own, and a default of its own."""

    lambda_retain: float = 0.0
    scale: float = positive(1.0)


class Scaled(GradientDifference):
    """A method of somebody else's."""

    Settings = ScaledSettings

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        return self.settings.scale * super().forget_loss(logits, batch, shares)


@pytest.mark.parametrize("objective", METHODS)
def test_a_method_reads_no_setting_of_another(objective: str) -> None:
    own = field_names(METHODS[objective].Settings)
    others = {name: kind for kind in METHODS.values() for name in field_names(kind.Settings) if name not in own}
    for name, kind in others.items():
        value = UnlearnConfig(kind).values()[name]
        with pytest.raises(ValueError, match=rf"^{name} = .* does not read it \({', '.join(readers_of(name))} would\)"):
            UnlearnConfig(objective, **{name: value})


def test_another_objective_takes_over_what_was_given() -> None:
    assert UnlearnConfig(gamma=3.0).replace(objective="simnpo").method.gamma == 3.0
    assert UnlearnConfig().replace(objective="simnpo").method.gamma == 0.125
    assert UnlearnConfig().replace(objective="npo").method.lora_rank is None
    assert UnlearnConfig(lora_rank=8).replace(epochs=3).replace(objective="npo").method.lora_rank == 8, "PALU's default"
    with pytest.raises(ValueError, match="n = 2: objective = 'npo' does not read it"):
        UnlearnConfig(n=2).replace(objective="npo")


def test_a_recipe_is_of_palu() -> None:
    class Own(METHODS["palu"]):
        """A PALU of somebody else's."""

    assert (
        UnlearnConfig(Own).replace("paper", n=2).values() == UnlearnConfig(Own, **RECIPES["paper"] | {"n": 2}).values()
    )
    assert UnlearnConfig("npo").replace("paper", objective="palu") == UnlearnConfig(**RECIPES["paper"])
    for config, given in ((UnlearnConfig("npo"), {}), (UnlearnConfig(), {"objective": "npo"})):
        with pytest.raises(ValueError, match=r"^recipe = 'paper' is of objective = 'palu'; leave one of them out$"):
            config.replace("paper", **given)


def test_a_class_as_the_objective() -> None:
    def run(objective: str | type, **settings: float) -> palu.UnlearnResult:
        return palu.unlearn(
            tiny_llama(), None, forget_rows(4), retain_rows(4), objective=objective, epochs=2, learning_rate=1e-3,
            progress=False, **settings,
        )  # fmt: skip

    ours, half, known = run(Scaled), run(Scaled, scale=0.5), run("ga")
    assert same_weights(ours.model, weights(known.model))
    assert half.history[0]["forget"] == pytest.approx(0.5 * ours.history[0]["forget"])
    assert ours.summary["config"]["objective"] == f"{__name__}.Scaled"
    assert half.summary["config"]["scale"] == 0.5


def test_what_is_no_method() -> None:
    for objective in (int, Baseline.compute_losses):
        with pytest.raises(ValueError, match=r"^objective = .*: give one of palu, ga"):
            UnlearnConfig(objective)  # type: ignore[arg-type]


def test_every_name_has_one_kind_of_value() -> None:
    """A flag serves all methods that read it."""
    for name in {name for kind in METHODS.values() for name in field_names(kind.Settings)}:
        kinds = {kind.Settings.__annotations__.get(name) for kind in METHODS.values()} - {None}
        assert len(kinds) <= 1, name
