"""Check that models, tokenizer and sets belong together: every message names what is wrong and the fix."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palu.data.packing import Item, pack
from palu.data.tokenize import check_tokenizer
from palu.models.attention import shares_prefix, use_packed_attention
from palu.models.generation import eval_mode
from palu.models.head import body_of, head_of
from palu.models.lora import CausalLM, UnsupportedModelError, base_of, check_adapter, check_trainable, is_peft
from palu.models.quantized import check_placement, check_quantized, quantized_by
from palu.models.root import on_device


def check_models(
    model: CausalLM,
    ref_model: CausalLM | None,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    mixed_precision: str,
    *,
    sharded: bool = False,
    empty: bool = False,
) -> None:
    """Raise UnsupportedModelError or ValueError where the models or the tokenizer cannot be used together.

    ``device``: the one to train on. ``mixed_precision``: accelerate's "no", "bf16" or "fp16". ``sharded``: whether the
    engine shards weights. ``empty``: whether this process may have no weights, since another one has them.
    """
    check_tokenizer(tokenizer)
    given = {"model": model} | ({} if ref_model is None else {"ref_model": ref_model})
    for name, one in given.items():
        check_causal(name, one, empty=empty)
        check_quantized(name, one, device, trained=name == "model", sharded=sharded)
    check_trainable(model, ref_model is None)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model requires a gradient, so nothing could be unlearned")
    if ref_model is not None and base_of(ref_model) is base_of(model):
        raise ValueError(
            "ref_model has the model's adapter in it, since PEFT puts it there; "
            "pass None to use the model without its adapter"
            if is_peft(model)
            else "ref_model is the model itself, which training would change; pass None to use its starting weights"
        )
    if mixed_precision == "fp16":
        raise ValueError(
            "mixed precision fp16 underflows in the gradient of the losses; use bf16 or no mixed precision"
        )
    weights = (p for p in model.parameters() if p.requires_grad)
    if any(weight.dtype == torch.float16 for weight in (head_of(model).weight, *weights)):
        raise ValueError(
            "the model is in float16, in which gradients and AdamW's steps underflow, those of an adapter on it, too; "
            "load it with dtype=torch.bfloat16 or torch.float32"
        )

    vocab_size = head_of(model).weight.shape[0]
    if ref_model is not None and (ref_size := head_of(ref_model).weight.shape[0]) != vocab_size:
        raise ValueError(
            f"the model has a vocabulary of {vocab_size} and ref_model one of {ref_size}; "
            "the reference must be the model as it was before training"
        )
    if tokenizer is not None:
        check_vocabulary("the model", model, tokenizer)


def check_vocabulary(name: str, model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where a tokenizer has tokens that the model does not know."""
    if len(tokenizer) > (vocab_size := head_of(model).weight.shape[0]):
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and {name} a vocabulary of {vocab_size}; "
            "load the tokenizer that belongs to the model"
        )


def check_causal(name: str, model: CausalLM, *, empty: bool = False) -> None:
    """Raise UnsupportedModelError or ValueError where this is no causal model with a linear head, wholly loaded."""
    check_adapter(name, model)
    base = base_of(model)
    if not isinstance(base, PreTrainedModel) or not isinstance(base.get_output_embeddings(), torch.nn.Linear):
        raise UnsupportedModelError(
            f"{name} is a {type(model).__name__}, which is not a causal language model with a linear head; "
            "load it with AutoModelForCausalLM.from_pretrained"
        )
    # Llama 4's is the model itself, ModernBertDecoder's the output layer.
    if base.get_output_embeddings() in base.get_decoder().modules():
        raise UnsupportedModelError(
            f"{name} is a {type(base).__name__}, whose get_decoder() gives no body apart from its head; "
            "load a model of a kind that docs/models.md lists as supported"
        )
    check_placement(name, base)
    missing = next((path for path, p in base.named_parameters() if p.is_meta), None)
    if missing is not None and not empty:
        raise ValueError(
            f"{name} is not wholly loaded: {missing} is on the meta device; load it without offloading to CPU or disk"
        )


@torch.no_grad()
def check_linear_head(model: CausalLM, input_ids: torch.Tensor) -> None:
    """Raise ValueError where a model's logits are not those that :func:`palu.models.head.head_of` leads to.

    A pass over a few tokens tells, within the dtype's error. At small logits a cap changes next to nothing, and
    training makes them grow; so in a second pass they are enlarged to 1000, beyond usual caps.
    """
    base = base_of(model)
    layer = base.get_output_embeddings()
    ids = input_ids[None, :8].to(base.device)
    with eval_mode(base):  # dropout would draw differently in the two passes
        hidden = body_of(base)(input_ids=ids, use_cache=False).last_hidden_state
        product = head_of(base).product(hidden)
        # Both are the same computation up to the hidden states. NaN weights pass: the first step reports them.
        tolerance = _tolerance(product.dtype, base.device) / 4  # under autocast not the weights' dtype
        largest = float(product.abs().max())
        for factor in (1.0, 1000 / largest if largest > 0 else 1.0):
            with layer.register_forward_hook(lambda module, given, output, by=factor: output * by):
                theirs = base(input_ids=ids, use_cache=False).logits.float()
            head = head_of(base)  # again, since ZeRO-3 drops weights after a module's pass
            ours = head._replace(scale=factor * head.scale).logits(hidden).float()
            if theirs.shape != ours.shape or (theirs - ours).norm() > tolerance * ours.norm():
                raise ValueError(
                    f"the logits of {type(base).__name__} are not its output layer applied to its last hidden states, "
                    f"scaled by {head.scale:g} and {f'capped at {head.softcap:g}' if head.softcap else 'not capped'} "
                    "as its configuration says, so losses from hidden states would be wrong; load a model of a kind "
                    "that docs/models.md lists as supported"
                )


def _tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Return the relative error of a row of hidden states that the dtype explains, in two ways to compute it.

    In SmolLM2-135M (30 layers, on a CPU) SDPA and eager attention differ by 6e-7 in float32 and by 1.3e-2 in bfloat16.
    Examples that see each other make 0.34 to 0.60 there, a window left out 0.35.
    """
    if dtype in (torch.bfloat16, torch.float16):
        return 8 * torch.finfo(dtype).eps
    if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return 8 * 2**-10  # TensorFloat-32 keeps ten bits
    return 1000 * torch.finfo(torch.float32).eps  # for float64, too: norms and softmax round to float32


_WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size", "window_size")


def choose_probe(config: Any, longest: int) -> tuple[int, int, int]:
    """Choose the lengths of the two examples of :func:`check_packing`, for a text configuration.

    The third number is the token of the second example from which on a window leaves something out. A window that is
    wider than the run's longest text never binds, and is not probed. For the others the second example is twice as long
    as the widest of them, or as that text: so the probe costs about as much as the body's pass over it.
    """
    given = [getattr(config, name, None) for name in _WINDOWS]
    windows = [window for window in given if isinstance(window, int) and 0 < window < longest]
    length = max([24, *(min(2 * window, longest) for window in windows)])
    positions = getattr(config, "max_position_embeddings", None) or length
    return min(16, positions), min(length, positions), max(windows, default=8)


@torch.no_grad()
def check_packing(
    name: str, model: CausalLM, device: torch.device, mixed_precision: str = "no", *, longest: int
) -> None:
    """Raise UnsupportedModelError or ValueError where packed examples do not give what separate passes give.

    Two examples of random tokens, which begin alike, go through the body in one sequence, with the run's attention,
    device and precision, and each one alone with the model's own attention. The model's modes, attention and device
    stay as they were, and so do the random numbers. Only the forward pass is compared.

    ``name``: "model" or "ref_model", for the message. ``device``: the run's; the model is moved there and back.
    ``longest``: tokens of the run's longest text.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    switch = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    if switch is not None and longest > switch:
        raise ValueError(
            f"{name} has longrope, which turns all examples of a row by other angles once one is longer than {switch} "
            f"tokens, and the longest text has {longest}; set max_length={switch}"
        )
    *lengths, bound = choose_probe(config, longest)
    generator = torch.Generator().manual_seed(0)
    vocab_size = head_of(base).weight.shape[0]
    ids = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
    alike = lengths[0] // 2
    ids[1][:alike] = ids[0][:alike]
    borders = 0, alike, bound  # where the second one's states are looked at
    items = [Item(i, torch.arange(len(i))) for i in ids]
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    if half is None and torch.is_autocast_enabled(device.type):  # the caller's
        half = torch.get_autocast_dtype(device.type)
    # LLM.int8 rounds activations by what else is in the row.
    dtype = torch.bfloat16 if quantized_by(base) else half or base.dtype
    body = body_of(base)
    with (
        on_device(base, device),
        eval_mode(base),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, half) if half is not None else nullcontext(),
    ):
        alone = [body(input_ids=i[None].to(device), use_cache=False).last_hidden_state[0] for i in ids]
        own = base.config._attn_implementation
        with use_packed_attention(base, mixed_precision):
            switched = base.config._attn_implementation != own
            wrong = _packing_error(body, items, alone, borders, dtype, share_prefix=shares_prefix(base))
        mendable = wrong and switched and not _packing_error(body, items, alone, borders, dtype)
    if not wrong:
        return
    kind = type(base).__name__
    if mendable:
        raise ValueError(
            f"{name} is a {kind}, whose examples palu's packed attention does not keep apart ({wrong}), while "
            'transformers\' own does; load it with attn_implementation="eager"'
        )
    raise UnsupportedModelError(
        f"{name} is a {kind}, which does not keep packed examples apart ({wrong}); "
        "palu packs examples into one row, so load a model of a kind that docs/models.md lists as supported"
    )


def _packing_error(
    body: torch.nn.Module,
    items: list[Item],
    alone: list[torch.Tensor],
    borders: tuple[int, ...],
    dtype: torch.dtype,
    *,
    share_prefix: bool = False,
) -> str:
    """Say how the packed sequence's hidden states differ from those of the examples alone; "" where they do not."""
    packed, device = pack(items, share_prefix=share_prefix), alone[0].device
    try:
        states = body(**packed.to(device).inputs()).last_hidden_state[0]
        together = [states[rows.to(device)] for rows in packed.rows(items)]
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    first, second = (
        (p.float() - a.float()).norm(dim=1) / a.float().norm(dim=1) for p, a in zip(together, alone, strict=True)
    )
    # What a convolution or a recurrent state carries across a border fades, and a window binds from its width on.
    # Means, since in a mixture of experts rounding may send single tokens to another expert.
    parts = [first, *(second[i : i + 8] for i in borders[:-1]), second[borders[-1] :]]
    difference = float(torch.stack([part.mean() for part in parts if len(part)]).max())
    tolerance = _tolerance(dtype, device)
    if not difference > tolerance:  # NaN weights pass: the first step reports them
        return ""
    name = str(dtype).removeprefix("torch.")
    return (
        f"relative difference of hidden states to separate passes {difference:.1e}, in {name} at most {tolerance:.1e}"
    )
