"""Run the frozen reference once, before the first step, and keep what training will need of it.

The reference is the model before training, so what it gives never changes. For PALU that is the indices of the K
highest logits at each onset token, the last hidden state at each ordinary token, and the head. After that pass the
reference's body is not needed any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate, chain

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from palu.config import UnlearnConfig
from palu.data.packing import Item, pack
from palu.distributed import all_ranks, autocast, raise_on_all_ranks
from palu.methods.base import Method, ReferenceFn, RefField, RefRows
from palu.models.attention import use_packed_attention
from palu.models.generation import eval_mode
from palu.models.head import Head, body_of, head_of
from palu.models.lora import CausalLM, base_of, without_adapter
from palu.ref_model.anchors import AnchorPrompts, generate_anchors
from palu.ref_model.cache import ReferenceCache, ReferenceOutputs, count_rows, read_cache
from palu.ref_model.storage import CacheFile, Write

TOKENS_PER_PASS = 4096  # packed tokens per forward of the reference


def precompute_reference(
    ref_model: CausalLM,
    model: CausalLM,
    items: Sequence[Item],
    anchor_prompts: AnchorPrompts,
    method: type[Method],
    config: UnlearnConfig,
    accelerator: Accelerator,
    *,
    file: CacheFile | None = None,
    progress: bool = False,
) -> tuple[ReferenceCache, Head | None]:
    """Have the reference write the anchors and give the method's fields; return these, and its head if it is needed.

    Where a file holds them the reference does not run. Where the reference is the model itself, it runs without its
    adapter, if it has one. Its body is sent back to where it was. All processes must call it.

    Args:
        ref_model: the reference, perhaps the model itself.
        items: the forget set, as the method looks at it.
        anchor_prompts: the prompts to which anchors are written.
        file: where the outputs are kept; ``None``: in memory.
        progress: show progress bars.

    Raises:
        CacheError: the file cannot be read or written.
        DataError: the reference answers none of the prompts.
    """
    if not method.needs_ref_head and not method.ref_fields:
        return ReferenceCache([{}] * len(items)), None
    own = ref_model is model
    home = ref_model.device
    with raise_on_all_ranks(accelerator):
        cache = read_cache(file, method.ref_fields, items) if file is not None else None
    if not all_ranks(cache is not None, accelerator):  # else all have found it
        anchors = generate_anchors(ref_model, anchor_prompts, accelerator, adapter=not own, progress=progress)
        base = base_of(ref_model.to(accelerator.device))
        with (
            eval_mode(base),
            autocast(accelerator),
            use_packed_attention(base, accelerator.mixed_precision),
            without_adapter(ref_model) if own else nullcontext(),
        ):
            cache = compute_outputs(
                body_of(ref_model),
                accelerator.device,
                items,
                method.ref_fields,
                method.reference_fn(head_of(ref_model), config),
                anchors=anchors,
                file=file,
                progress=progress,
            )
    assert cache is not None
    head = _frozen_head(ref_model, own, accelerator) if method.needs_ref_head else None
    if not own:
        ref_model.to(home)  # type: ignore[arg-type]
    return cache, head


def _frozen_head(ref_model: CausalLM, own: bool, accelerator: Accelerator) -> Head:
    """Return the reference's head, copied only where training will change it or mixed precision casts it."""
    head = head_of(ref_model)
    will_change = own and head.weight.requires_grad
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else head.weight.dtype
    return head._replace(
        weight=head.weight.detach().to(accelerator.device, dtype, copy=will_change),
        bias=None if head.bias is None else head.bias.detach().to(accelerator.device, dtype, copy=will_change),
    )


@torch.no_grad()
def compute_outputs(
    body: nn.Module,
    device: torch.device,
    items: Sequence[Item],
    fields: Sequence[RefField],
    reference_fn: ReferenceFn,
    *,
    anchors: Sequence[Item] = (),
    file: CacheFile | None = None,
    progress: bool = False,
) -> ReferenceCache:
    """Run the reference's body once over the forget set and the anchors, and keep the fields of their rows.

    Args:
        body: the reference without its head; called with input_ids and position_ids [1, T].
        device: the body's.
        items: the forget set.
        fields: what is kept.
        reference_fn: gives the fields of rows, from their last hidden states.
        anchors: items that the fields are computed for, too.
        file: where the outputs are written to, and then mapped from; one that has been written in the meantime is
            taken as it is. ``None``: they stay in memory.
        progress: show a progress bar.

    Raises:
        CacheError: the file cannot be written or read.
    """
    with file.locked(progress=progress) if file is not None else nullcontext():
        if file is not None and (found := read_cache(file, fields, items)) is not None:
            return found
        both = [*items, *anchors]
        lengths = {field.name: sum(count_rows(both, field.rows)) for field in fields}
        outputs = _run(body, device, both, reference_fn, progress)
        first = next(outputs)
        like = {name: output[:0].cpu() for name, output in first.items()}
        if file is None:
            tensors = {name: like[name].new_empty(length, *like[name].shape[1:]) for name, length in lengths.items()}
            _fill(lambda name, row, rows: tensors[name][row : row + len(rows)].copy_(rows), first, outputs)
            return ReferenceCache(ReferenceOutputs(tensors, fields, both), anchors)
        about = {"anchors": [(item.input_ids.tolist(), int(item.rows[0]) + 1) for item in anchors]}
        with file.writing(like, lengths, about) as write:
            _fill(write, first, outputs)
        written = read_cache(file, fields, items)
        assert written is not None
        return written


def _run(
    body: nn.Module, device: torch.device, items: Sequence[Item], reference_fn: ReferenceFn, progress: bool
) -> Iterator[dict[str, Tensor]]:
    """Yield the fields of a few items at a time."""
    with tqdm(total=len(items), desc="reference", disable=not progress, leave=False) as bar:
        for group in _groups(items):
            states = body(**pack(group).to(device).inputs()).last_hidden_state[0]
            starts = accumulate((len(item.input_ids) for item in group), initial=0)
            rows = [item.rows + start for item, start in zip(group, starts, strict=False)]  # a start too many
            targets, others = _split(rows, group, device)
            yield reference_fn(
                RefRows(states[targets], states[others], *_split([item.labels for item in group], group, device))
            )
            bar.update(len(group))


def _split(parts: Sequence[Tensor], items: Sequence[Item], device: torch.device) -> tuple[Tensor, Tensor]:
    """(values of the target rows, values of the other rows) of all items, from each item's [rows]."""
    targets = [part[: item.targets] for part, item in zip(parts, items, strict=True)]
    others = [part[item.targets :] for part, item in zip(parts, items, strict=True)]
    return torch.cat(targets).to(device), torch.cat(others).to(device)


def _fill(write: Write, first: dict[str, Tensor], others: Iterator[dict[str, Tensor]]) -> None:
    """Write outputs as they come, each field's rows after those before."""
    done = dict.fromkeys(first, 0)
    for outputs in chain([first], others):
        for name, rows in outputs.items():
            write(name, done[name], rows)
            done[name] += len(rows)


def _groups(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Group items so that each group has TOKENS_PER_PASS tokens at most, or one longer item."""
    group: list[Item] = []
    tokens = 0
    for item in items:
        if group and tokens + len(item.input_ids) > TOKENS_PER_PASS:
            yield group
            group, tokens = [], 0
        group.append(item)
        tokens += len(item.input_ids)
    if group:
        yield group
