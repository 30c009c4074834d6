"""Run the frozen reference once, before the first step, and keep what training will need of it.

The reference is the model before training, so what it gives never changes. For PALU that is the indices of the K
highest logits at each onset token, the last hidden state at each ordinary token, and the head. After that pass the
reference's body is not needed any more.

Of many processes each runs a share of the passes, and all get everything. A sharded model (FSDP2) stays sharded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from itertools import chain, islice

import torch
from accelerate import Accelerator
from torch import Tensor, distributed
from tqdm.auto import tqdm

from palu.config import UnlearnConfig
from palu.data.packing import Item, Items, pack, split_roles
from palu.distributed import autocast, gather_values, raise_on_all_ranks
from palu.methods.base import RefField, RefRows
from palu.models.attention import shares_prefix, use_packed_attention
from palu.models.generation import eval_mode
from palu.models.head import Head, body_of, head_of
from palu.models.lora import CausalLM, base_of, without_adapter
from palu.models.root import ModelRoot, on_device
from palu.ref_model.anchors import AnchorPrompts, Writer, generate_anchors, generate_neighbours, generate_variants
from palu.ref_model.shared import drop_shared_targets, shared_pairs
from palu.ref_model.storage import CacheFile, ReferenceCache, ReferenceOutputs, Write

TOKENS_PER_PASS = 4096  # packed tokens per forward of the reference


def precompute_reference(
    reference: ModelRoot,
    items: Sequence[Item],
    anchor_prompts: AnchorPrompts,
    config: UnlearnConfig,
    accelerator: Accelerator,
    *,
    own: bool,
    earlier: Sequence[Item] = (),
    file: CacheFile | None = None,
    progress: bool = False,
) -> tuple[ReferenceCache, Head | None]:
    """Have the reference write the neighbours, variants and anchors, and give the method's fields.

    Where a file holds them the reference does not run. If it is not sharded, it runs on the accelerator's device and is
    sent back to where it was. All processes must call it.

    Args:
        reference: holds the reference, whole or sharded.
        items: the forget set, as the method looks at it.
        anchor_prompts: what the reference answers.
        own: whether the reference is the model to train, which runs without its adapter, if it has one.
        earlier: rows of earlier requests, whose fields it gives, too.
        file: where the outputs are kept; ``None``: in memory.

    Returns the outputs, and the head; None where the loss needs none, and where it is the model's own and stays frozen
    in a sharded model. Raises CacheError where the file cannot be read or written, DataError where the reference
    answers none of the prompts.
    """
    needed = config.reference
    if not needed.head and not needed.fields:
        return ReferenceCache([{}] * len(items)), None
    model, base = reference.model, base_of(reference.model)
    cache = _read(file, items, config, accelerator)
    if cache is None:
        with on_device(model, accelerator.device):
            writer = Writer(reference, accelerator, adapter=not own, chunk_bytes=config.chunk_bytes, progress=progress)
            neighbours = generate_neighbours(writer, items, anchor_prompts, config.seed)
            shared = shared_pairs(neighbours)
            variants = generate_variants(writer, items, anchor_prompts, config.onset_length, config.seed)
            everyday = generate_anchors(writer, items, anchor_prompts)
            written = [*neighbours, *drop_shared_targets(variants, shared), *everyday, *earlier]
            extra = ReferenceCache((), written, len(neighbours), len(variants), len(earlier))
            with (
                eval_mode(base),
                autocast(accelerator),
                use_packed_attention(base, accelerator.mixed_precision),
                without_adapter(model) if own else nullcontext(),
            ):
                cache = reference.run(
                    lambda: compute_outputs(model, items, config, accelerator, extra, file=file, progress=progress)
                )
    return cache, _frozen_head(reference, own, accelerator) if needed.head else None


def _read(
    file: CacheFile | None, items: Sequence[Item], config: UnlearnConfig, accelerator: Accelerator
) -> ReferenceCache | None:
    """Read the cache, if all processes find it."""
    with raise_on_all_ranks(accelerator):
        cache = file.read(config.reference.fields, items) if file is not None else None
    return cache if all(gather_values(cache is not None, accelerator)) else None


def _frozen_head(reference: ModelRoot, own: bool, accelerator: Accelerator) -> Head | None:
    """Return the reference's head, copied only where training will change it or mixed precision casts it."""
    parts = head_of(reference.model)
    will_change = own and any(part is not None and part.requires_grad for part in (parts.weight, parts.bias))
    if reference.sharded and own and not will_change:
        return None  # gathered in each forward pass anyway
    copied = will_change or reference.sharded  # what FSDP2 has gathered does not last

    def copy() -> Head:
        head = head_of(reference.model)
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else head.weight.dtype
        return head._replace(
            weight=head.weight.detach().to(accelerator.device, dtype, copy=copied),
            bias=None if head.bias is None else head.bias.detach().to(accelerator.device, dtype, copy=copied),
        )

    return reference.run(copy)


@torch.no_grad()
def compute_outputs(
    model: CausalLM,
    items: Sequence[Item],
    config: UnlearnConfig,
    accelerator: Accelerator,
    written: ReferenceCache = ReferenceCache(),  # noqa: B008  # immutable
    *,
    file: CacheFile | None = None,
    progress: bool = False,
) -> ReferenceCache:
    """Run the reference's body once over the forget set and the extra items, and keep the method's fields.

    All processes must call it, with the same items: each runs its share of the passes, of ``config.max_tokens`` tokens
    or TOKENS_PER_PASS, if these are fewer; a longer item has a pass of its own.

    ``written``: the extra items, without outputs. ``file``: where the outputs are written to, and then mapped from, by
    one process on each machine; one that has been written in the meantime is taken as it is. ``None``: they stay in
    memory, in each process. Raises CacheError where the file cannot be written or read.
    """
    fields = config.reference.fields
    writes = file is not None and accelerator.is_local_main_process
    with ExitStack() as stack:
        if file is not None:
            with raise_on_all_ranks(accelerator):
                if writes:
                    stack.enter_context(file.locked(progress=progress))
            if (found := _read(file, items, config, accelerator)) is not None:
                return found
        items, extra = drop_shared_targets(items, written.shared), written.extra
        outputs = _run(model, items, extra, config, accelerator, progress)
        first = next(outputs)
        outputs = chain([first], outputs)
        like = {name: output[:0].cpu() for name, output in first.items()}
        lengths = {field.name: _count(items, field) + _count(extra, field) for field in fields}
        if file is None:
            tensors = {name: one.new_empty(lengths[name], *one.shape[1:]) for name, one in like.items()}
            _fill(lambda name, row, rows: tensors[name][row : row + len(rows)].copy_(rows), outputs, accelerator)
            return replace(written, outputs=ReferenceOutputs(tensors, fields, items, extra))
        with ExitStack() as closing:
            with raise_on_all_ranks(accelerator):
                write = closing.enter_context(file.writing(like, lengths, written)) if writes else None
            _fill(write, outputs, accelerator)
            with raise_on_all_ranks(accelerator):
                closing.close()
        found = _read(file, items, config, accelerator)
        assert found is not None
        return found


def _run(
    model: CausalLM,
    items: Sequence[Item],
    extra: Sequence[Item],
    config: UnlearnConfig,
    accelerator: Accelerator,
    progress: bool,
) -> Iterator[dict[str, Tensor]]:
    """Yield the fields of a few items at a time: those of the first process's pass, of the second's, and so on."""
    compute, body, processes = config.reference.compute, body_of(model), accelerator.num_processes
    device = next(body.parameters()).device
    groups = _groups(chain(items, extra), min(TOKENS_PER_PASS, config.max_tokens or TOKENS_PER_PASS))
    token = Item(items[0].input_ids[:1], items[0].rows[:0])  # where no group is left
    with tqdm(total=len(items) + len(extra), desc="reference", disable=not progress, leave=False) as bar:
        while passes := list(islice(groups, processes)):
            own = passes[accelerator.process_index] if accelerator.process_index < len(passes) else [token]
            packed = pack(own, share_prefix=shares_prefix(base_of(model)))
            states = body(**packed.to(device).inputs()).last_hidden_state[0]
            rows, labels = packed.rows(own), [item.labels for item in own]
            targets, others = (torch.cat(part).to(device) for part in split_roles(rows, own))
            looked_at = RefRows(
                states[targets], states[others], *(torch.cat(part).to(device) for part in split_roles(labels, own))
            )
            # ZeRO-3 drops a head that is tied to the embeddings after their pass, so it is asked for again.
            outputs = compute(looked_at, head_of(model)) if compute is not None else {}
            for rank, group in enumerate(passes):
                given = outputs
                if processes > 1:
                    given = {
                        field.name: _broadcast(outputs[field.name], rank, _count(group, field), accelerator)
                        for field in config.reference.fields
                    }
                yield given
                bar.update(len(group))


def _broadcast(own: Tensor, rank: int, rows: int, accelerator: Accelerator) -> Tensor:
    """Give a process's tensor, of so many rows, to all others."""
    tensor = own.contiguous() if accelerator.process_index == rank else own.new_empty(rows, *own.shape[1:])
    if tensor.numel():
        distributed.broadcast(tensor.view(torch.uint8), rank)  # bytes: gloo does not know every dtype
    return tensor


def _count(items: Sequence[Item], field: RefField) -> int:
    """Count the rows that a field has entries for."""
    return int(getattr(Items.of(items), field.rows).sum())


def _fill(write: Write | None, outputs: Iterator[dict[str, Tensor]], accelerator: Accelerator) -> None:
    """Write outputs as they come, each field's rows after those before; ``None``: let another process write them."""
    done: Counter[str] = Counter()
    for few in outputs:
        with raise_on_all_ranks(accelerator):
            for name, rows in few.items():
                if write is not None:
                    write(name, done[name], rows)
                done[name] += len(rows)


def _groups(items: Iterable[Item], most: int) -> Iterator[list[Item]]:
    """Group items so that each group has ``most`` tokens at most, or one longer item."""
    group: list[Item] = []
    tokens = 0
    for item in items:
        if group and tokens + len(item.input_ids) > most:
            yield group
            group, tokens = [], 0
        group.append(item)
        tokens += len(item.input_ids)
    if group:
        yield group
