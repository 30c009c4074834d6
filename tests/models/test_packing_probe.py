"""Kinds of models: each gives packed what it gives for every example alone, or is refused before anything changes.

``MODELS`` is the table in docs/models.md: a test renders it from here.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import textbook
from helpers.runs import unlearn
from helpers.small_tokenizers import LLAMA3, byte_level
from helpers.tiny import VOCAB, Row, same_weights, tiny_llama, weights
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, TrainingArguments

import palu
from palu.data.examples import load_retain
from palu.data.packing import pack, retain_items
from palu.evaluate.scores import check_model
from palu.losses import CrossEntropyTerm, fused_linear_losses
from palu.models import attention as packed
from palu.models.attention import shares_prefix, use_packed_attention
from palu.models.checks import check_packing, choose_probe
from palu.models.head import body_of, head_of
from palu.models.lora import UnsupportedModelError

WINDOW = 8  # tokens; every text here is longer
CPU = torch.device("cpu")

# How models call their sizes.
IDS = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = IDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
LLAMA = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}
GPT2 = IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
GPT2 |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
WINDOWED: dict[str, Any] = {"sliding_window": WINDOW}
MIXED = WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]}
HEADS: dict[str, Any] = {"head_dim": 8}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "use_sliding_window": True}
QWEN_MOE |= {"shared_expert_intermediate_size": 16}
DEEPSEEK = LLAMA | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
DEEPSEEK |= {"topk_group": 1, "moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8}
DEEPSEEK |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "first_k_dense_replace": 1}
MINICPM = {"num_key_value_heads": 4, "dim_model_base": 8, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8}
MINICPM |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
GPT_NEO = IDS | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "initializer_range": 0.3, "window_size": WINDOW}
GPT_NEO |= {"attention_types": [[["global", "local"], 1]], "resid_dropout": 0.0, "embed_dropout": 0.0}
OPT = SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3, "dropout": 0.0}
LLAMA4 = LLAMA | HEADS | {"intermediate_size_mlp": 48, "attention_chunk_size": 8, "moe_layers": []}
MODERN_BERT = LLAMA | dict.fromkeys((f"{kind}_token_id" for kind in ("pad", "bos", "eos", "cls", "sep")), 0)
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


class Kind(NamedTuple):
    """A row of the table: a model, and what palu makes of it."""

    title: str
    config: str  # transformers' class
    settings: dict[str, Any]
    path: str = ""  # "packed": palu's attention, "own": transformers'; "": refused
    refused: str = ""  # a part of the message
    error: type[Exception] = UnsupportedModelError
    note: str = ""
    random: bool = False  # whether training draws random numbers, whatever the settings

    def build(self, attention: str | None = None, seed: int = 0, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.settings | changes)
        given = {} if attention is None else {"attn_implementation": attention}
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **given).eval()
        return model


SEE = "does not keep packed examples apart"
NO_BORDERS = "its masks take no notice of position ids"
STATE = "a state goes on from one example into the next"
EAGER = 'load it with attn_implementation="eager"'
UNTOLD = 'its attention is not told where examples begin; supported with `attn_implementation="eager"`'
NO_BODY = "whose get_decoder() gives no body apart from its head"
NOT_APART = "transformers gives no body apart from its head"
MODELS = [
    Kind("Llama", "LlamaConfig", LLAMA, "packed"),
    Kind("Qwen2", "Qwen2Config", LLAMA, "packed"),
    Kind("Qwen2, sliding window", "Qwen2Config", LLAMA | MIXED | {"use_sliding_window": True}, "packed"),
    Kind("Qwen2-MoE, sliding window", "Qwen2MoeConfig", LLAMA | MIXED | QWEN_MOE, "packed"),
    Kind("Qwen3", "Qwen3Config", LLAMA | HEADS, "packed"),
    Kind("Qwen3-MoE", "Qwen3MoeConfig", LLAMA | HEADS | QWEN_MOE | {"use_sliding_window": False}, "packed"),
    Kind("Mistral", "MistralConfig", LLAMA | {"sliding_window": None}, "packed"),
    Kind("Mistral, sliding window", "MistralConfig", LLAMA | WINDOWED, "packed"),
    Kind("Mixtral", "MixtralConfig", LLAMA | {"sliding_window": None, "num_local_experts": 4}, "packed"),
    Kind("Mixtral, sliding window", "MixtralConfig", LLAMA | WINDOWED | {"num_local_experts": 4}, "packed"),
    Kind("Gemma 2", "Gemma2Config", LLAMA | MIXED | HEADS | {"final_logit_softcapping": 30.0}, "own"),
    Kind("Gemma 3 (text)", "Gemma3TextConfig", LLAMA | MIXED | HEADS, "packed"),
    Kind("Phi", "PhiConfig", LLAMA | {"partial_rotary_factor": 0.5}, "packed"),
    Kind("Phi 3", "Phi3Config", LLAMA | WINDOWED, "packed"),
    Kind("Phi 3.5-MoE", "PhimoeConfig", LLAMA | WINDOWED | {"num_local_experts": 4}, "packed", random=True),
    Kind("OLMo 2", "Olmo2Config", LLAMA, "packed"),
    Kind("OLMo 3", "Olmo3Config", LLAMA | MIXED, "packed"),
    Kind("Exaone 4", "Exaone4Config", LLAMA | MIXED, "packed"),
    Kind("SmolLM3", "SmolLM3Config", LLAMA, "packed"),
    Kind("Starcoder 2", "Starcoder2Config", LLAMA | WINDOWED, "packed"),
    Kind("GPT-2", "GPT2Config", GPT2, "packed"),
    Kind("GPT-Neo", "GPTNeoConfig", GPT_NEO, "own"),
    Kind("GPT-J", "GPTJConfig", GPT2 | {"rotary_dim": 4}, "packed"),
    Kind("GPT-NeoX, Pythia", "GPTNeoXConfig", LLAMA, "packed"),
    Kind("OPT", "OPTConfig", OPT, "packed"),
    Kind("Falcon", "FalconConfig", LLAMA | {"alibi": False}, "own"),
    Kind("Falcon, ALiBi", "FalconConfig", LLAMA | {"alibi": True}, "own"),
    Kind("DeepSeek V3", "DeepseekV3Config", DEEPSEEK, "packed"),
    Kind("Granite", "GraniteConfig", LLAMA | {"logits_scaling": 6.0}, "packed"),
    Kind("Cohere, Command R", "CohereConfig", LLAMA | {"logit_scale": 0.0625}, "packed"),
    Kind("Cohere 2, sliding window", "Cohere2Config", LLAMA | MIXED | HEADS | {"logit_scale": 0.25}, "packed"),
    Kind("HyperCLOVA X", "HyperCLOVAXConfig", LLAMA | {"logits_scaling": 0.125}, "packed"),
    Kind("MiniCPM 3", "MiniCPM3Config", LLAMA | MINICPM, "packed"),
    Kind("NanoChat", "NanoChatConfig", LLAMA | {"final_logit_softcapping": 15.0}, "packed"),
    Kind("StableLM", "StableLmConfig", LLAMA, "", EAGER, ValueError, note=UNTOLD),
    Kind("Llama 4 (text)", "Llama4TextConfig", LLAMA4, "", NO_BODY, note=NOT_APART),
    Kind("ModernBERT Decoder", "ModernBertDecoderConfig", MODERN_BERT, "", NO_BODY, note=NOT_APART),
    Kind("BLOOM", "BloomConfig", SIZES, "", SEE, note=NO_BORDERS),
    Kind("MPT", "MptConfig", IDS | {"d_model": 32, "n_heads": 4, "n_layers": 2}, "", SEE, note=NO_BORDERS),
    Kind("Mamba", "MambaConfig", SIZES, "", SEE, note=STATE),
    Kind("LFM2", "Lfm2Config", LLAMA | {"layer_types": ["conv", "full_attention"]}, "", SEE, note=STATE),
    Kind("Falcon-H1", "FalconH1Config", LLAMA | MAMBA, "", SEE, note=STATE),
    Kind("gpt-oss", "GptOssConfig", LLAMA | MIXED | HEADS | EXPERTS, "", SEE, note=NO_BORDERS),
]
SUPPORTED = [kind for kind in MODELS if not kind.refused]
REFUSED = [kind for kind in MODELS if kind.refused]
# Of each kind of attention and head, one that is also run in bfloat16.
HALVES = ("Llama", "Mistral, sliding window", "Gemma 2", "Gemma 3 (text)", "OLMo 3", "Qwen3-MoE", "Granite", "NanoChat")
ANCHORED = ("Llama", "Qwen3", "Mistral, sliding window", "Gemma 2", "Phi", "OLMo 2", "GPT-2")
BY_TITLE = {kind.title: kind for kind in MODELS}


def title(kind: Kind) -> str:
    return kind.title


def rows(role: int | None = None, count: int = 2) -> list[Row]:
    """Texts of 20 and more tokens, ten of them the same. ``role``: of the answer's second half; None: its token ids."""
    generator = torch.Generator().manual_seed(3 if role is None else 4)  # no text is both forgotten and kept
    beginning = torch.randint(VOCAB, (10,), generator=generator)
    found = []
    for length in range(20, 20 + 7 * count, 7):
        ids = [*beginning.tolist(), *torch.randint(VOCAB, (length - 10,), generator=generator).tolist()]
        rest = ids[length // 2 :] if role is None else [role] * (length - length // 2)
        found.append({"input_ids": ids, "labels": [-100] * 3 + ids[3 : length // 2] + rest})
    return found


# --- Supported ---
def test_dropout_is_not_lost() -> None:
    """GPT-2 gives its probability to the attention function, and calls it by a name of its own."""
    model = BY_TITLE["GPT-2"].build(attn_pdrop=0.5).train()
    batch = pack(retain_items(load_retain(rows(), None, max_length=100).examples)).inputs()
    with torch.no_grad(), use_packed_attention(model):
        one, other = (body_of(model)(**batch).last_hidden_state for _ in range(2))
    assert not torch.equal(one, other)
    check_packing("model", model, CPU, longest=40)


def together_and_apart(model: PreTrainedModel) -> tuple[list[Tensor], list[Tensor]]:
    """The loss and all gradients of two examples: packed, through palu's losses; each alone, through the model's."""
    examples = load_retain(rows(), None, max_length=100).examples
    items = retain_items(examples)
    parameters = [p for p in model.parameters() if p.requires_grad]
    batch = pack(items, share_prefix=shares_prefix(model))
    assert any(batch.shared_lengths) == shares_prefix(model)
    at = torch.cat(batch.rows(items))
    labels = torch.cat([item.labels for item in items])
    with use_packed_attention(model):
        hidden = body_of(model)(**batch.inputs()).last_hidden_state[0][at]
        ones = torch.ones(len(at))
        loss, _ = fused_linear_losses(hidden, head_of(model), (CrossEntropyTerm(labels),), ones, chunk_bytes=2**20)
        ours = [loss.detach(), *torch.autograd.grad(loss, parameters)]
    alone = torch.zeros(())
    for item in items:
        logits = model(input_ids=item.input_ids[None], use_cache=False).logits[0, item.rows].float()
        alone = alone + F.cross_entropy(logits, item.labels, reduction="sum")
    return ours, [alone.detach(), *torch.autograd.grad(alone, parameters)]


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    whole = torch.stack([t.float().norm() for t in theirs[1:]]).norm()
    assert abs(ours[0] - theirs[0]) <= tolerance * theirs[0]
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert (one - other).float().norm() <= tolerance * (other.float().norm() + 0.01 * whole)


@pytest.mark.parametrize("kind", SUPPORTED, ids=title)
def test_packed_examples_give_what_separate_passes_give(kind: Kind) -> None:
    model = kind.build()
    with use_packed_attention(model):
        ours = model.config._attn_implementation in (packed.PLAIN, packed.MASKED)
        assert ours == (kind.path == "packed")
    assert_close(*together_and_apart(model), 2e-5)


@pytest.mark.parametrize("kind", SUPPORTED, ids=title)
def test_ten_steps_equal_a_plain_loop(kind: Kind) -> None:
    """To 1e-9 of the way that the weights go, in float64, where neither routers nor near-zero gradients can differ.

    With rows to retain and two micro-batches a step; in every second pair of kinds unlikelihood; some with anchors.
    """
    if kind.random:
        model = kind.build()
        assert unlearn(model, None, rows(-200), rows(), epochs=1, learning_rate=1e-3).summary["steps"] == 1
        assert not same_weights(model, weights(kind.build()))
        return
    tokenizer, room = None, {}
    if kind.title in ANCHORED:
        tokenizer = byte_level(LLAMA3)
        room = {name: 256 for name in ("max_position_embeddings", "n_positions") if name in kind.settings}
        room |= {"vocab_size": len(tokenizer)}
    with textbook.Doubled():
        model = kind.build(**room).double()
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")  # the default's grouped product knows no float64
        place = SUPPORTED.index(kind)
        terms: dict[str, Any] = {"kl_direction": ("forward", "reverse")[place % 2]}
        terms |= ({"local_loss": "topk_mse"}, {"probability_floor": 0.0})[place // 2 % 2]
        textbook.assert_unlearn_equals(model, tolerance=1e-9, tokenizer=tokenizer, **terms)


@pytest.mark.parametrize("name", HALVES)
def test_packed_examples_in_bfloat16(name: str) -> None:
    assert_close(*together_and_apart(BY_TITLE[name].build().bfloat16()), 0.03)


@pytest.mark.parametrize("name", ["Llama", "Mistral, sliding window", "Gemma 3 (text)", "OLMo 3", "StableLM"])
def test_transformers_own_attention_keeps_windows_and_borders(name: str) -> None:
    """Where palu's does not serve: float32 on CUDA, eager attention. It is what StableLM's refusal recommends."""
    model = BY_TITLE[name].build("eager")
    assert_close(*together_and_apart(model), 2e-5)
    check_packing("model", model, CPU, longest=40)


# --- Refused ---
def assert_refused(model: PreTrainedModel, kind: Kind, run: Any) -> str:
    """The model keeps its weights, modes and attention; no random number is drawn."""
    before, state, attention = weights(model), torch.get_rng_state(), model.config._attn_implementation
    model.train()
    next(model.modules()).eval()  # a part in evaluation mode stays so
    modes = [module.training for module in model.modules()]
    with pytest.raises(kind.error, match=re.escape(kind.refused)) as caught:
        run(model)
    assert type(caught.value) is kind.error
    assert type(model).__name__ in str(caught.value)
    assert same_weights(model, before)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    return str(caught.value)


@pytest.mark.parametrize("kind", REFUSED, ids=title)
def test_a_run_refuses_it(kind: Kind) -> None:
    assert_refused(kind.build(), kind, lambda model: unlearn(model, None, rows(-200), rows(), epochs=1))


BLOOM = BY_TITLE["BLOOM"]


def test_everything_that_packs_refuses_it() -> None:
    tokenizer, plain = byte_level(LLAMA3), tiny_llama()
    small, large = BLOOM.build(), BLOOM.build(vocab_size=len(tokenizer))
    examples = load_retain(rows(), None, max_length=100).examples
    message = assert_refused(small, BLOOM, lambda model: unlearn(plain, model, rows(-200), rows(), epochs=1))
    assert message.startswith("ref_model is a BloomForCausalLM, ")
    assert_refused(small, BLOOM, lambda model: palu.Recorder(model, rows(-200), rows()))
    assert_refused(large, BLOOM, lambda model: check_model(model, tokenizer, examples, ["row 0"]))
    arguments = TrainingArguments("/nowhere", use_cpu=True)
    assert_refused(small, BLOOM, lambda model: palu.PaluTrainer(model, arguments, forget=rows(-200), retain=rows()))


def test_longrope_keeps_to_the_length_at_which_its_angles_change() -> None:
    """Beyond it, a long example would turn the short ones beside it by its own angles."""
    half = LLAMA["hidden_size"] // LLAMA["num_attention_heads"] // 2
    factors = {"short_factor": [1.0] * half, "long_factor": [4.0] * half, "original_max_position_embeddings": 32}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0} | factors
    model = tiny_llama(rope_parameters=rope)
    check_packing("model", model, CPU, longest=32)
    with pytest.raises(ValueError, match=r"^model has longrope, .* 32 tokens, and .* 33; set max_length=32$"):
        check_packing("model", model, CPU, longest=33)


def test_palus_attention_is_told_from_the_models_own() -> None:
    """An attention of palu's that drops windows is refused, with transformers' own as the fix."""
    kind = BY_TITLE["Mistral, sliding window"]
    kind = kind._replace(refused="whose examples palu's packed attention does not keep apart (rel", error=ValueError)

    def without_window(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        return packed.packed_attention(module, query, key, value, None, **more | {"sliding_window": None})

    try:
        AttentionInterface.register(packed.MASKED, without_window)
        message = assert_refused(kind.build(), kind, lambda model: check_packing("model", model, CPU, longest=40))
        assert message.endswith('while transformers\' own does; load it with attn_implementation="eager"')
        # A window that no text exceeds does no harm, and is not probed.
        check_packing("model", kind.build(sliding_window=32), CPU, longest=32)
        with pytest.raises(ValueError, match="keep apart"):
            check_packing("model", kind.build(sliding_window=32), CPU, longest=40)
    finally:
        AttentionInterface.register(packed.MASKED, packed.packed_attention)


def test_a_layer_that_misses_its_mask_is_refused_with_the_fix() -> None:
    """As Falcon's ALiBi, which adds itself to the mask, did when transformers gave it the attention interface."""
    missed = "keep apart (AttributeError: 'NoneType' object has no attribute 'dtype')"
    kind = BY_TITLE["Llama"]._replace(refused=missed, error=ValueError)
    model = kind.build()

    def read_mask(module: Any, given: Any, named: dict[str, Any]) -> None:
        if given[0].shape[1] > 24:  # the two examples together
            assert named["attention_mask"].dtype == torch.bool

    model.model.layers[0].register_forward_pre_hook(read_mask, with_kwargs=True)
    message = assert_refused(model, kind, lambda model: check_packing("model", model, CPU, longest=40))
    assert message.endswith('load it with attn_implementation="eager"')


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_probe_tells_in_half_precision_too(dtype: torch.dtype, precision: str) -> None:
    for name in ("Llama", "Gemma 3 (text)", "Mixtral, sliding window", "Falcon"):
        check_packing("model", BY_TITLE[name].build().to(dtype), CPU, precision, longest=40)
    for kind in (BLOOM, BY_TITLE["LFM2"], BY_TITLE["gpt-oss"]):
        with pytest.raises(UnsupportedModelError, match=SEE):
            check_packing("model", kind.build().to(dtype), CPU, precision, longest=40)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_callers_autocast_counts_as_mixed_precision(precision: str) -> None:
    """Where a CPU rounds a row by how many there are (AMX does), bfloat16 products differ by more than float32's."""
    model = tiny_llama()

    def round_long_rows(module: Any, given: Any, output: Any) -> Any:
        error = 1e-3 * (output.last_hidden_state.shape[1] > 24)  # of the two examples together
        return type(output)(output.last_hidden_state * (1 + error))

    model.model.register_forward_hook(round_long_rows)
    with pytest.raises(UnsupportedModelError, match=r"1\.0e-03, in float32 at most"):
        check_packing("model", model, CPU, longest=40)
    with torch.autocast("cpu", torch.bfloat16):
        check_packing("model", model, CPU, precision, longest=40)
    with torch.no_grad():  # broken weights are for the first step to report
        model.model.norm.weight.fill_(float("nan"))
    check_packing("model", model, CPU, precision, longest=40)


@pytest.mark.parametrize(
    ("settings", "longest", "probe"),
    [
        ({}, 1000, (16, 24, 8)),
        ({"sliding_window": None}, 1000, (16, 24, 8)),
        ({"sliding_window": 4}, 1000, (16, 24, 4)),
        ({"sliding_window": 256}, 1000, (16, 512, 256)),
        ({"sliding_window": 256}, 300, (16, 300, 256)),  # as far as the run's texts go
        ({"sliding_window": 256}, 256, (16, 24, 8)),  # it never binds
        ({"sliding_window": 4096}, 1024, (16, 24, 8)),
        ({"sliding_window": 128, "attention_chunk_size": 256}, 1000, (16, 512, 256)),
        ({"max_position_embeddings": 20}, 12, (16, 20, 8)),
    ],
)
def test_lengths_of_the_probe(settings: dict[str, Any], longest: int, probe: tuple[int, int, int]) -> None:
    config = transformers.PretrainedConfig(**{"max_position_embeddings": 2048} | settings)
    assert choose_probe(config, longest) == probe


# --- docs/models.md ---
def test_the_table_of_the_guide() -> None:
    """It says what the tests above assert."""
    guide = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert table() in guide


def table() -> str:
    attention = {"packed": "palu's packed attention", "own": "transformers' own attention"}
    lines = ["| model | palu | |", "|---|---|---|"]
    for kind in MODELS:
        why = attention.get(kind.path) or kind.note
        why += "; its training draws random numbers, so steps are not compared" if kind.random else ""
        lines.append(f"| {kind.title} | {'refused' if kind.refused else 'supported'} | {why} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
