"""Load, tokenise and check a run's forget and retain sets, and choose its anchor prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from palu.config import UnlearnConfig
from palu.data.duplicates import answers_of, secrets_of, warn_of_told_secrets
from palu.data.examples import Examples, load_alternates, load_forget, load_other_prompts, load_retain
from palu.data.packing import Items, retain_items, with_other_prompts
from palu.data.rows import iterate_rows
from palu.methods import METHODS
from palu.models.checks import check_linear_head, check_packing, check_sets
from palu.models.lora import CausalLM
from palu.models.positions import max_positions
from palu.models.root import ModelRoot
from palu.ref_model.anchors import ANSWER_TOKENS, AnchorPrompts, encode_anchor_prompts


@dataclass(frozen=True)
class RunData:
    """The sets of a run, tokenised."""

    forget: Items
    retain: Items
    anchor_prompts: AnchorPrompts
    asked: Items  # the forget set as the reference sees it, and the retain set where the method needs it
    longest: int  # tokens of the longest text of the run
    counts: dict[str, int]  # examples and tokens, for the summary


def prepare_datasets(
    model: CausalLM,
    forget: Any,
    retain: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    config: UnlearnConfig,
    *,
    processes: int,
) -> RunData:
    """Load, tokenise and validate a run's forget and retain sets; see :func:`palu.unlearn`.

    ``processes``: how many take part in the run.

    Raises:
        DataError, ValueError, TypeError: something does not fit. Nothing has been changed then.
    """
    method = METHODS[config.objective]
    method.check(model, config)
    rendering: dict[str, Any] = {
        "max_length": config.max_length,
        "chat_template_kwargs": config.chat_template_kwargs,
    }
    forget_set = load_forget(
        forget,
        tokenizer,
        allow_cut_spans=config.allow_cut_spans,
        warn=True,
        positions=max_positions(model),
        **rendering,
    )
    # Rows that no term reads are not tokenised.
    read = retain if retain is not None and method.uses_retain(config) else []
    retain_set = load_retain(read, tokenizer, warn=True, **rendering)
    kept = None if retain is None else len(retain_set.examples) or int(_has_rows(retain))
    anchor_prompts = encode_anchor_prompts(len(forget_set.examples), kept, tokenizer, method, config, processes)
    check_sets(model, forget_set, retain_set, config, anchored=retain is None and len(anchor_prompts.prompts) > 0)
    if retain_set.examples:
        warn_of_told_secrets(secrets_of(forget_set.source), answers_of(retain_set.source))
    alternates = (
        load_alternates(forget_set.source, tokenizer, forget_set.examples, **rendering)
        if method.needs_alternates
        else []
    )
    eos_token_id = tokenizer.eos_token_id if tokenizer else None
    forget_items = method.make_items(forget_set.examples, alternates, config, eos_token_id)
    kept_items = retain_items(retain_set.examples)
    asked = forget_items
    if method.uses_other_prompts(config):
        others = load_other_prompts(forget_set.source, tokenizer, forget_set.examples, **rendering)
        asked = with_other_prompts(forget_items, forget_set.examples, others)
    asked = asked + kept_items if method.asks_of_retain else asked
    texts = [min(len(prompt) + ANSWER_TOKENS, config.max_length) for prompt in anchor_prompts.prompts]
    longest = max(forget_items.longest(), kept_items.longest(), asked.longest(), *texts)
    counts = {
        "forget_examples": len(forget_items),
        "forget_without_span": forget_set.without_span,
        "forget_spans_cut": len(forget_set.cut_rows),
        "forget_all_spans_cut": forget_set.all_spans_cut,
        "forget_skipped": forget_set.skipped,
        "retain_examples": len(kept_items),
        "retain_skipped": retain_set.skipped,
        "onset_tokens": int(forget_items.targets.sum()),
        "ordinary_tokens": int(forget_items.others.sum()),
    }
    return RunData(forget_items, kept_items, anchor_prompts, asked, longest, counts)


def check_forward_passes(
    root: ModelRoot,
    reference: ModelRoot,
    data: RunData,
    config: UnlearnConfig,
    device: torch.device,
    mixed_precision: str,
) -> None:
    """Raise ValueError or UnsupportedModelError where a model's passes are not what the losses take them for.

    ``root`` holds the model to train, ``reference`` the reference, perhaps the same one; ``device`` and
    ``mixed_precision`` (accelerate's) are the run's. All processes must call it: each runs the same passes.
    """

    def check(name: str, model: CausalLM) -> None:
        check_linear_head(model, data.forget[0].input_ids)
        if name == "model" or METHODS[config.objective].used_ref_fields(config):  # else a reference does not run
            check_packing(name, model, device, mixed_precision, longest=data.longest)

    root.run(lambda: check("model", root.model))
    if reference is not root:
        reference.run(lambda: check("ref_model", reference.model))


def _has_rows(source: Any) -> bool:
    """Whether a set has a row at all."""
    rows: Any = source.examples if isinstance(source, Examples) else iterate_rows(source, "retain")
    return any(True for _ in rows)
