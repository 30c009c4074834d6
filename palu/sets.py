"""What a run is given, as it is trained on: text to tokens with roles, checked against the model and the settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from palu.adapter import CausalLM
from palu.anchors import Everyday, load_everyday
from palu.baselines import OBJECTIVES
from palu.config import UnlearnConfig
from palu.data import load_alternates, load_forget, load_retain
from palu.packing import Item, retain_items
from palu.validate import check_linear_head, check_sets


class Sets(NamedTuple):
    """The sets of a run, tokenised."""

    forget: list[Item]
    retain: list[Item]
    everyday: Everyday  # prompts to which the reference writes anchors
    counts: dict[str, int]  # for the summary


def read_sets(
    model: CausalLM,
    ref_model: CausalLM | None,
    forget: Any,
    retain: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    config: UnlearnConfig,
    processes: int,
) -> Sets:
    """The forget and retain sets with the rows that the objective looks at; see :func:`palu.unlearn`.

    ``processes``: how many take part in the run.

    Raises:
        DataError, ValueError, TypeError: something does not fit. Nothing has been changed then.
    """
    method = OBJECTIVES[config.objective]
    forget = list(forget) if isinstance(forget, Iterator) else forget  # alternate answers are read in a second pass
    forget_set = load_forget(forget, tokenizer, max_length=config.max_length)
    retain_set = load_retain(retain if retain is not None else [], tokenizer, max_length=config.max_length)
    kept = None if retain is None else len(retain_set.examples)
    everyday = load_everyday(len(forget_set.examples), kept, tokenizer, method, config, processes)
    check_sets(model, forget_set, retain_set, config, anchored=retain is None and len(everyday.prompts) > 0)
    alternates = (
        load_alternates(forget, tokenizer, forget_set.examples, max_length=config.max_length)
        if method.needs_alternates
        else []
    )
    to_forget = method.items(forget_set.examples, alternates, config, tokenizer.eos_token_id if tokenizer else None)
    to_retain = retain_items(retain_set.examples) if method.retains(config) else []
    for candidate in (model,) if ref_model is None else (model, ref_model):
        check_linear_head(candidate, to_forget[0].input_ids)
    counts = {
        "forget_examples": len(to_forget),
        "forget_without_span": forget_set.without_span,
        "forget_skipped": forget_set.skipped,
        "retain_examples": len(to_retain),
        "retain_skipped": retain_set.skipped,
        "onset_tokens": sum(item.targets for item in to_forget),
        "ordinary_tokens": sum(len(item.rows) - item.targets for item in to_forget),
    }
    return Sets(to_forget, to_retain, everyday, counts)
