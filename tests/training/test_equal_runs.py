"""Runs of palu.unlearn that must be equal: by the same seed, cut in other ways, by a plain loop."""

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import textbook
from helpers.runs import ENTROPY, LOSSES, assert_same_run, result_config, unlearn
from helpers.scenarios import frozen_head
from helpers.tiny import VOCAB, forget_rows, retain_rows, same_weights, tiny_llama, weights
from safetensors.torch import load_file

import palu
from palu.config import UnlearnConfig
from palu.data.examples import load_forget
from palu.data.packing import Packed
from palu.methods import palu as palu_method
from palu.methods.base import ForgetSet
from palu.methods.palu import RECIPES, PaluMethod

HEADS = {"tied": tiny_llama, "own": functools.partial(tiny_llama, tie_word_embeddings=False), "frozen": frozen_head}
CUTS = [("palu", 8), ("palu", 60), ("npo", 30), ("simnpo", 8), ("tpo", 30), ("undial", 8)]
EQUAL: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    # A model, settings, and more of them that change nothing.
    "accumulation": (tiny_llama, {"batch_size": 8}, {"batch_size": 2, "gradient_accumulation_steps": 4}),
    "gradient checkpointing": (tiny_llama, {}, {"gradient_checkpointing": True}),
    **{
        f"chunks of {size} bytes, {head} head": (build, {"chunk_bytes": 2**20}, {"chunk_bytes": size})
        for head, build in HEADS.items()
        for size in (1, 5 * VOCAB * 8)
    },
    **{
        f"passes of {most} tokens, {name}": (tiny_llama, {"objective": name}, {"max_tokens": most})
        for name, most in CUTS
    },
}


@functools.cache
def run_of_16(build: Callable[..., Any], **settings: Any) -> palu.UnlearnResult:
    """A run on 16 forget examples, made once."""
    return unlearn(build(dtype=torch.float64), None, forget_rows(16), retain_rows(20), **settings)


@pytest.mark.parametrize("name", EQUAL)
def test_what_changes_nothing(name: str) -> None:
    """Losses are token means over a step, whatever it is cut into."""
    build, settings, more = EQUAL[name]
    assert_same_run(run_of_16(build, **settings), run_of_16(build, **settings | more), 1e-9)


@pytest.fixture
def bf16_autocast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As under `accelerate launch --mixed_precision bf16`; accelerate keeps it for the whole process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_autocast_does_not_round_the_figures(bf16_autocast: None) -> None:
    """The loss is the weighted sum of its terms to float32's precision, not to bfloat16's."""
    (record, *_) = unlearn(tiny_llama(), epochs=1, gamma=1.0, lambda_kl=0.0, lambda_retain=2.0).history
    assert record["loss"] == pytest.approx(record["local"] + 2 * record["retain"], rel=1e-5)


def test_same_seed_same_bits() -> None:
    """Also the order of the data and the dropout."""

    def run(seed: int) -> palu.UnlearnResult:
        torch.manual_seed(torch.seed() % 2**31)  # whatever was drawn before does not matter
        model = tiny_llama(attention_dropout=0.2)
        torch.rand(3)
        return unlearn(model, batch_size=3, seed=seed)

    one, same, other = run(0), run(0), run(1)
    assert [[r[k] for k in LOSSES] for r in one.history] == [[r[k] for k in LOSSES] for r in same.history]
    assert same_weights(one.model, weights(same.model))
    assert not same_weights(one.model, weights(other.model))
    assert one.history[0]["retain"] != other.history[0]["retain"]


@pytest.mark.parametrize("tied", [True, False])
def test_no_reference_is_the_model_itself_before_training(tied: bool) -> None:
    settings = {"dtype": torch.float64, "tie_word_embeddings": tied}
    model = tiny_llama(**settings)
    with_copy = unlearn(model, copy.deepcopy(model))
    without = unlearn(tiny_llama(**settings))
    assert_same_run(with_copy, without, 1e-12)
    assert with_copy.history[-1]["kl"] > 1e-6, "the reference did not stay behind"


def test_no_pass_has_more_than_max_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the reference as of the training; an example that is longer has one of its own."""
    passes: list[tuple[int, ...]] = []
    original = Packed.inputs

    def inputs(self: Packed) -> dict[str, Any]:
        passes.append(self.sequence_lengths)
        return original(self)

    monkeypatch.setattr(Packed, "inputs", inputs)
    long = {"input_ids": [1] * 40, "labels": [-100] + [1, -200] * 19 + [-200]}
    monkeypatch.setattr("palu.training.datasets.check_packing", lambda *args, **kwargs: None)
    unlearn(tiny_llama(), None, [*forget_rows(7), long], max_tokens=36, epochs=1)
    assert sum(40 in one for one in passes) == 2
    assert all(one == (40,) for one in passes if 40 in one)
    # Beside what a pass has there may be the token that stands in where it has no forget example.
    assert all(sum(one) <= 36 + (one[0] == 1) for one in passes if 40 not in one)


def test_gradient_checkpointing_happens() -> None:
    def passes(checkpointing: bool) -> int:
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += torch.is_grad_enabled()

        model = tiny_llama()
        model.model.layers[0].self_attn.register_forward_hook(count)
        unlearn(model, epochs=1, gradient_checkpointing=checkpointing)
        return calls

    assert (passes(False), passes(True)) == (2, 4)


def test_mixed_precision(bf16_autocast: None) -> None:
    """Products in bfloat16, weights and their updates in float32."""
    expected = tiny_llama()
    unlearned = unlearn(tiny_llama(), epochs=2)
    assert unlearned.model.dtype == torch.float32
    config = UnlearnConfig(**ENTROPY, epochs=1, learning_rate=1e-3)
    (terms,) = textbook.train(copy.deepcopy(expected), forget_rows(), retain_rows(8), config)
    (record,) = unlearn(expected, None, forget_rows(), retain_rows(8), epochs=1, batch_size=8).history
    assert record["local"] == pytest.approx(terms["local"], rel=0.03)
    assert record["retain"] == pytest.approx(terms["retain"], rel=0.03)
    assert record["retain"] != pytest.approx(terms["retain"], rel=1e-6), "autocast had no effect"
    # The reference is the same model at this step; its logits are rounded another way at most.
    assert abs(record["kl"]) < 1e-3
    assert not same_weights(unlearned.model, weights(tiny_llama()))


def test_cached_states_are_in_the_dtype_of_the_heads_product(
    bf16_autocast: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Half of float32, and not one bit of the run is another one."""

    def run(folder: Path) -> tuple[palu.UnlearnResult, set[torch.dtype], int]:
        result = unlearn(tiny_llama(), cache_dir=str(folder))
        (path,) = folder.glob("*.safetensors")
        hidden = load_file(path)["hidden"]
        return result, {hidden.dtype}, hidden.nbytes

    one, dtypes, size = run(tmp_path / "product")
    assert dtypes == {torch.bfloat16}
    monkeypatch.setattr(palu_method, "_product_dtype", lambda hidden, head: hidden.dtype)
    other, dtypes, as_it_was = run(tmp_path / "states")
    assert dtypes == {torch.float32}
    assert as_it_was == 2 * size
    assert [[r[k] for k in LOSSES] for r in one.history] == [[r[k] for k in LOSSES] for r in other.history]
    assert same_weights(one.model, weights(other.model))


def test_kl_rows_is_the_kl_of_the_rows_drawn() -> None:
    """The same run as with all other ordinary tokens labelled as prompt."""
    model = functools.partial(tiny_llama, dtype=torch.float64)
    config = UnlearnConfig(kl_rows=3, seed=5)
    examples = load_forget(forget_rows(), None, max_length=99).examples
    masked = []
    for item, row in zip(PaluMethod.make_items(ForgetSet(examples), config), forget_rows(), strict=True):
        drawn = set((item.rows[item.targets :] + 1).tolist())
        labels = [-100 if label == -200 and i not in drawn else label for i, label in enumerate(row["labels"])]
        masked.append(row | {"labels": labels})
    assert masked != forget_rows()
    drawn_run = unlearn(model(), None, forget_rows(), config=config)
    assert_same_run(drawn_run, unlearn(model(), None, masked, seed=5), 1e-12)
    assert drawn_run.summary["ordinary_tokens"] == sum(r["labels"].count(-200) for r in masked)


@pytest.mark.parametrize(
    "settings",
    [
        {"local_loss": "topk_mse", "lambda_kl": 0},
        {"local_loss": "topk_mse", "target": "local_mean", "kl_direction": "forward", "n": -1},
        {"local_loss": "topk_mse", "target": "global_mean_detached", "top_k": 10**6, "n": 1, "weight_decay": 0.1},
        {"local_loss": "topk_mse", "target": 1.5, "max_grad_norm": 0.05, "gamma": 0},
        {"probability_floor": 1 / 64, "top_k": 10**6},
        {"n": 3, "probability_floor": 0.0, "kl_direction": "forward", "gamma": 0.3},
        {"gamma": 0, "lambda_kl": 0},
    ],
    ids=str,
)
def test_steps_equal_a_plain_loop(settings: dict[str, Any]) -> None:
    """With another model as the reference. A term of weight 0 has no part in the gradient.

    Two epochs, after which one with a floor would end.
    """
    model, ref_model = (tiny_llama(seed=s, dtype=torch.float64, tie_word_embeddings="n" in settings) for s in (0, 1))
    textbook.assert_unlearn_equals(model, ref_model=ref_model, tolerance=1e-7, epochs=2, **settings)


def test_the_papers_recipe_is_the_published_loss() -> None:
    """Records are float32; golden vectors hold the same terms to 1e-9 in float64."""
    forget, retain = forget_rows(8), retain_rows(8)
    model, ref_model = (tiny_llama(seed=seed, dtype=torch.float64) for seed in (0, 1))
    before = copy.deepcopy(model)
    sizes: dict[str, Any] = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "progress": False}
    result = palu.unlearn(model, ref_model, forget, retain, recipe="paper", **sizes)
    assert result_config(result) == UnlearnConfig(**RECIPES["paper"], **sizes)
    (expected,) = textbook.train(
        before.to(model.device), forget, retain, result_config(result), ref_model.to(model.device)
    )
    for name in ("local", "kl", "retain"):
        assert result.history[0][name] == pytest.approx(expected[name], rel=1e-6)
    # What is given beside it comes after it, and it comes after a configuration.
    given = UnlearnConfig(lambda_kl=7.0, n=1)
    mixed = result_config(palu.unlearn(model, None, forget, retain, config=given, recipe="paper", n=2, **sizes)).method
    assert (mixed.lambda_kl, mixed.top_k, mixed.n) == (1.0, 5000, 2)
    with pytest.raises(ValueError, match="recipe = 'papers'"):
        palu.unlearn(model, None, forget, retain, recipe="papers")
