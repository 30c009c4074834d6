"""Check that models, tokenizer and sets belong together: every message names what is wrong and the mend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palu.config import UnlearnConfig
from palu.data.examples import Examples
from palu.data.files import DataError
from palu.data.tokenize import check_tokenizer
from palu.models.generation import eval_mode
from palu.models.head import body_of, head_of
from palu.models.lora import CausalLM, UnsupportedModelError, base_of, check_adapter, check_trainable, is_peft


def check_models(
    model: CausalLM,
    ref_model: CausalLM | None,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    mixed_precision: str,
) -> None:
    """Raise UnsupportedModelError or ValueError where the models or the tokenizer cannot be used together.

    ``device`` is the one to train on, ``mixed_precision`` accelerate's: "no", "bf16" or "fp16".
    """
    check_tokenizer(tokenizer)
    check_causal("model", model)
    if ref_model is not None:
        check_causal("ref_model", ref_model)
    if getattr(base_of(model), "is_quantized", False):
        kind = "base model" if is_peft(model) else "model"
        raise ValueError(f"the {kind} is quantised; load it without a quantization_config")
    check_trainable(model, ref_model is None)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model requires a gradient, so nothing could be unlearned")
    if is_peft(model) and ref_model is not None and base_of(ref_model) is base_of(model):
        raise ValueError(
            "ref_model has the model's adapter in it, since PEFT puts it there; "
            "pass None to use the model without its adapter"
        )
    if ref_model is model:
        raise ValueError(
            "ref_model is the model itself, which training would change; pass None to use its starting weights"
        )
    if mixed_precision == "fp16":
        raise ValueError(
            "mixed precision fp16 underflows in the gradient of the losses; use bf16 or no mixed precision"
        )
    if any(p.dtype == torch.float16 and p.requires_grad for p in model.parameters()) and device.type != "cpu":
        raise ValueError(
            "the model's trainable weights are in float16, in which gradients and AdamW's steps underflow; "
            "load it with dtype=torch.bfloat16 or torch.float32"
        )
    if head_of(model).weight.dtype == torch.float16 and device.type == "cpu":
        raise ValueError(
            "the model is in float16, which the CPU kernels do not support; "
            "load it with dtype=torch.bfloat16 or torch.float32"
        )

    vocab_size = head_of(model).weight.shape[0]
    if ref_model is not None and (ref_size := head_of(ref_model).weight.shape[0]) != vocab_size:
        raise ValueError(
            f"the model has a vocabulary of {vocab_size} and ref_model one of {ref_size}; "
            "the reference must be the model as it was before training"
        )
    if tokenizer is not None and len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model a vocabulary of {vocab_size}; "
            "load the tokenizer that belongs to the model"
        )


def check_causal(name: str, model: CausalLM) -> None:
    """Raise UnsupportedModelError or ValueError where this is no causal model with a linear head, wholly loaded."""
    check_adapter(name, model)
    base = base_of(model)
    if not isinstance(base, PreTrainedModel) or not isinstance(base.get_output_embeddings(), torch.nn.Linear):
        raise UnsupportedModelError(
            f"{name} is a {type(model).__name__}, which is not a causal language model with a linear head; "
            "load it with AutoModelForCausalLM.from_pretrained"
        )
    if (missing := next((path for path, p in base.named_parameters() if p.is_meta), None)) is not None:
        raise ValueError(
            f"{name} is not wholly loaded: {missing} is on the meta device; load it without offloading to CPU or disk"
        )


def check_sets(
    model: CausalLM, forget: Examples, retain: Examples, config: UnlearnConfig, *, anchored: bool = False
) -> None:
    """Raise DataError where the sets do not fit the model or the settings; ``anchored``: anchors stand for retain."""
    if not retain.examples and not anchored and (weight := config.value("lambda_retain")):
        raise DataError(
            f"the retain set is empty while lambda_retain = {weight}; give examples to keep, or set lambda_retain=0"
        )
    vocab_size = head_of(model).weight.shape[0]
    for name, examples in (("forget", forget.examples), ("retain", retain.examples)):
        for example in examples:
            low, high = int(example.input_ids.min()), int(example.input_ids.max())
            if low < 0 or high >= vocab_size:
                raise DataError(
                    f"{name} row {example.row}: token id {low if low < 0 else high} is outside the model's vocabulary "
                    f"of {vocab_size}; use the tokenizer that belongs to the model"
                )


# Fields of transformers' configurations by which a model changes what its output layer gives (MiniCPM3 and Inkling:
# what it is given), and the value that changes nothing. Found in the modeling files of transformers 5.24.
HEAD_FIELDS = {
    "final_logit_softcapping": None,  # Gemma 2, 3, 3n and 4, VaultGemma, NanoChat, Beam, Inkling 2
    "logits_soft_cap": None,  # RecurrentGemma
    "output_logit_soft_cap": None,  # xLSTM
    "logit_scale": 1,  # Cohere
    "logits_scaling": 1,  # Granite, MiniCPM3, HyperCLOVA X
    "lm_head_multiplier": 1,  # Falcon-H1
    "logits_mup_width_multiplier": 1,  # Inkling
}


@torch.no_grad()
def check_linear_head(model: CausalLM, input_ids: torch.Tensor) -> None:
    """Raise ValueError where logits are not ``hidden @ weight.T + bias`` (scaled or soft-capped heads).

    The configuration's own fields come first: at small logits a cap changes next to nothing, and training makes them
    grow. What they do not tell, a pass over a few tokens does, within the dtype's error.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    for field, neutral in HEAD_FIELDS.items():
        value = getattr(config, field, None)
        if value is not None and value != neutral:
            raise ValueError(
                f"the logits of {type(base).__name__} are scaled or capped ({field} = {value!r} in its configuration), "
                "so losses from hidden states would be wrong; PALU supports Llama-style heads"
            )
    ids = input_ids[None, :8].to(base.device)
    with eval_mode(base):  # dropout would draw differently in the two passes
        logits = base(input_ids=ids, use_cache=False).logits.float()
        linear = F.linear(body_of(base)(input_ids=ids, use_cache=False).last_hidden_state, *head_of(base)).float()
    # Both passes are the same computation up to the hidden states. NaN weights pass: the first step reports them.
    tolerance = _tolerance(base.dtype, base.device) / 4
    if logits.shape != linear.shape or (logits - linear).norm() > tolerance * linear.norm():
        raise ValueError(
            f"the logits of {type(base).__name__} are not its output layer applied to its last hidden states "
            "(they are scaled or capped), so losses from hidden states would be wrong; PALU supports Llama-style heads"
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
