"""Prepare a run: check its models and settings, load and tokenise its sets, and choose its anchor prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from palu.config import UnlearnConfig
from palu.data.duplicates import check_disjoint, warn_of_told_secrets
from palu.data.examples import Examples, load_alternates, load_forget, load_retain
from palu.data.files import DataError
from palu.data.packing import Items, retain_items
from palu.data.rows import iterate_rows, load_marked_texts, text_rows
from palu.data.tokenize import Example
from palu.methods.base import ForgetSet
from palu.models.attention import shares_prefix
from palu.models.checks import check_linear_head, check_models, check_packing
from palu.models.head import head_of
from palu.models.lora import CausalLM, base_of
from palu.models.positions import fit_max_length, max_positions
from palu.models.root import ModelRoot
from palu.ref_model.anchors import ANSWER_TOKENS, AnchorPrompts, encode_anchor_prompts
from palu.ref_model.fingerprint import Fingerprints
from palu.ref_model.shared import drop_shared_targets
from palu.ref_model.storage import ReferenceCache
from palu.training.dataloader import UnlearnDataLoader
from palu.training.requests import Earlier


@dataclass(frozen=True)
class RunData:
    """The sets of a run, tokenised, and its settings."""

    config: UnlearnConfig  # with a max_length for which the models have positions
    forget: Items
    retain: Items
    earlier: Items  # the rows of earlier requests
    anchor_prompts: AnchorPrompts
    longest: int  # tokens of the longest text of the run
    device: torch.device
    mixed_precision: str  # accelerate's
    counts: dict[str, int]  # examples and tokens, for the summary

    def fingerprints(self, model: CausalLM, ref_model: CausalLM | None) -> Fingerprints:
        """Return the fingerprints of what the run starts from."""
        return Fingerprints(model, ref_model, self.forget, self.retain, self.anchor_prompts, self.earlier)

    def loader(self, cache: ReferenceCache, accelerator: Accelerator, model: CausalLM) -> UnlearnDataLoader:
        """Return the data loader of this process, for the model as it is trained."""
        return UnlearnDataLoader(
            self.forget,
            self.retain,
            cache,
            self.config,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
            share_prefix=shares_prefix(base_of(model)),
        )


def prepare_run(
    model: CausalLM,
    ref_model: CausalLM | None,
    forget: Any,
    retain: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    config: UnlearnConfig,
    *,
    device: torch.device,
    mixed_precision: str,
    processes: int,
    sharded: bool,
    empty: bool,
    warn: bool,
    earlier: Earlier | None = None,
) -> RunData:
    """Check a run's models and settings, and load, tokenise and check its sets; see :func:`palu.unlearn`.

    ``sharded`` and ``empty``: see :func:`palu.models.checks.check_models`; a process that is ``empty`` leaves it to the
    others to check that the model is the one that ``earlier`` left. ``warn``: of what looks wrong in the sets. Raises
    DataError, ValueError or TypeError where something does not fit; nothing has been changed then.
    """
    check_models(model, ref_model, tokenizer, device, mixed_precision, sharded=sharded, empty=empty)
    config = config.replace(max_length=fit_max_length(config.max_length, model, ref_model))
    rendering: dict[str, Any] = {
        "max_length": config.max_length,
        "chat_template_kwargs": config.chat_template_kwargs,
        "positions": max_positions(model),
    }
    cut = config.allow_cut_spans
    forget_set = load_forget(forget, tokenizer, allow_cut_spans=cut, warn=warn, **rendering)
    # Rows that no term reads are not tokenised.
    read = retain if retain is not None and config.method.lambda_retain > 0 else []
    retain_set = load_retain(read, tokenizer, warn=warn, **rendering)
    kept = None if retain is None else len(retain_set.examples) or int(_has_rows(retain))
    sources = forget_set.source, earlier.rows if earlier else ()
    secrets, earlier_secrets = (load_marked_texts(rows, told_by_question=False) for rows in sources)
    all_secrets = [*secrets, *earlier_secrets]
    anchor_prompts = encode_anchor_prompts(forget_set, kept, tokenizer, config, processes, secrets=all_secrets)
    check_sets(model, forget_set, retain_set, config, anchored=retain is None and len(anchor_prompts.prompts) > 0)
    earlier_items = Items()
    eos_token_id = tokenizer.eos_token_id if tokenizer else None
    if earlier is not None:
        if ref_model is not None:
            raise ValueError("after: the reference is the model as that run left it; leave ref_model out")
        if not empty:
            earlier.check(model, config)
        earlier_set = earlier.load(tokenizer, allow_cut_spans=cut, **rendering)
        check_disjoint(earlier_set.hashes, retain_set.hashes, "earlier forget")
        secrets = {text: f"earlier {row}" for text, row in earlier_secrets.items()} | secrets
        earlier_items = config.method_class.make_items(ForgetSet(earlier_set.examples, eos_token_id), config)
        earlier_items = Items.of(drop_shared_targets(earlier_items, earlier.shared))
    if warn and retain_set.examples:
        answers = ((text, where) for where, _, text in text_rows(retain_set.source, "retain") if text is not None)
        warn_of_told_secrets(secrets.items(), answers)

    def alternates() -> Sequence[Example]:
        return load_alternates(forget_set.source, tokenizer, forget_set.examples, **rendering)

    forget_items = config.method_class.make_items(ForgetSet(forget_set.examples, eos_token_id, alternates), config)
    kept_items = retain_items(retain_set.examples)
    texts = [min(len(prompt) + ANSWER_TOKENS, config.max_length) for prompt in anchor_prompts.prompts]
    longest = max(forget_items.longest(), kept_items.longest(), earlier_items.longest(), *texts)
    counts = {
        "forget_examples": len(forget_items),
        "forget_without_span": forget_set.without_span,
        "forget_spans_cut": len(forget_set.cut_rows),
        "forget_spans_in_question": forget_set.told_by_question,
        "forget_all_spans_cut": forget_set.all_spans_cut,
        "forget_skipped": forget_set.skipped,
        "earlier_examples": len(earlier_items),
        "retain_examples": len(kept_items),
        "retain_skipped": retain_set.skipped,
        "onset_tokens": int(forget_items.targets.sum()),
        "ordinary_tokens": int(forget_items.others.sum()),
    }
    sets = forget_items, kept_items, earlier_items
    return RunData(config, *sets, anchor_prompts, longest, device, mixed_precision, counts)


def check_sets(model: CausalLM, forget: Examples, retain: Examples, config: UnlearnConfig, *, anchored: bool) -> None:
    """Raise DataError where the sets do not fit the model, the settings or each other.

    ``anchored``: anchors stand for retain.
    """
    check_disjoint(forget.hashes, retain.hashes)
    if not retain.examples and not anchored and (weight := config.method.lambda_retain):
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


def check_forward_passes(root: ModelRoot, reference: ModelRoot, data: RunData) -> None:
    """Raise ValueError or UnsupportedModelError where a model's passes are not what the losses take them for.

    ``root`` holds the model to train, ``reference`` the reference, perhaps the same one. All processes must call it.
    """

    def check(name: str, model: CausalLM) -> None:
        check_linear_head(model, data.forget[0].input_ids)
        if name == "model" or data.config.reference.fields:  # else a reference does not run
            check_packing(name, model, data.device, data.mixed_precision, longest=data.longest)

    root.run(lambda: check("model", root.model))
    if reference is not root:
        reference.run(lambda: check("ref_model", reference.model))


def _has_rows(source: Any) -> bool:
    """Whether a set has a row at all."""
    rows: Any = source.examples if isinstance(source, Examples) else iterate_rows(source, "retain")
    return any(True for _ in rows)
