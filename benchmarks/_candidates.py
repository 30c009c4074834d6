"""The candidates of benchmarks/step.py: a step, or a part of it, of palu and of the published formulation.

Both share one policy model and see the same examples.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from _workload import make_batches, make_model
from published import Padded, collate, published_loss, published_step
from torch import Tensor
from transformers import PreTrainedModel

from palu.attention import using_packed_attention
from palu.cache import build_cache
from palu.config import UnlearnConfig
from palu.feed import Feed
from palu.losses import CrossEntropyTerm, Head, KLTerm, LocalTerm, head_losses
from palu.objective import PaluObjective, body_of, head_of
from palu.packing import Batch, forget_items, retain_items

Run = Callable[[], object]


# --- what they share ---
@dataclass
class Setup:
    """One policy model and one set of batches, in the forms that both formulations take."""

    device: torch.device
    config: UnlearnConfig
    eos_token_id: int
    model: PreTrainedModel  # with packed attention
    twin: PreTrainedModel  # the same parameters, with the attention and checkpointing of the published step
    objective: PaluObjective
    feeds: list[Feed]
    padded: list[tuple[Padded, Padded]]  # forget, retain; on the host, pinned for CUDA
    lengths: str


def prepare(arguments: argparse.Namespace, reference: Callable[[PreTrainedModel], PreTrainedModel] | None) -> Setup:
    """Model, batches and reference cache. reference: makes the reference; None: the model itself is it."""
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    model = make_model(arguments.model, device, getattr(torch, arguments.dtype))
    head_of(model).weight.requires_grad_(not arguments.frozen_head)
    # A second tree of modules over the same parameters, so that neither step resets the other's modes.
    twin = copy.deepcopy(model, {id(t): t for t in itertools.chain(model.parameters(), model.buffers())})
    if arguments.checkpointing:
        twin.gradient_checkpointing_enable({"use_reentrant": False})

    config = UnlearnConfig(
        n=arguments.n,
        top_k=arguments.top_k,
        target="global_mean",
        normalize=False,
        batch_size=arguments.batch_size,
        retain_batch_size=arguments.retain_batch_size,
    )
    vocab_size = model.config.vocab_size
    retain_batch_size = config.retain_batch_size or config.batch_size
    batches, lengths = make_batches(
        arguments.data, vocab_size, arguments.batches, config.batch_size, retain_batch_size, arguments.seed
    )

    teacher = model if reference is None else reference(twin)
    eos_token_id = vocab_size - 1
    pinned = device.type == "cuda"
    weight = head_of(teacher).weight.detach()
    if reference is None and not arguments.frozen_head:
        weight = weight.clone()
    ref_head = Head(weight, None)
    feeds, padded = [], []
    with using_packed_attention(teacher):
        for forget, retain in batches:
            items = forget_items(forget, config.n, eos_token_id)
            cache = build_cache(body_of(teacher), device, items, PaluObjective.ask(ref_head, config))
            feeds.append(Feed(items, retain_items(retain), cache, config, pin_memory=pinned))
            padded.append((collate(forget), collate(retain)))
    if pinned:
        padded = [(forget.pin_memory(), retain.pin_memory()) for forget, retain in padded]
    objective = PaluObjective(model, ref_head, config)
    return Setup(device, config, eos_token_id, model, twin, objective, feeds, padded, lengths)


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen model of its own weights."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def perturbed_copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen model with other weights, so that the KL divergence from it is not zero."""
    reference = copy_of(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return reference


# --- one step, or a part of it ---
def palu_step(objective: PaluObjective, feed: Feed, device: torch.device) -> Tensor:
    """Loss of a step of palu.unlearn, its gradients left in the model. The feed holds one batch."""
    [[batch]] = feed
    dtype = torch.promote_types(head_of(objective.model).weight.dtype, torch.float32)
    total = objective(batch.to(device), torch.tensor(batch.counts, dtype=dtype, device=device)).total
    total.backward()
    return total.detach()


def palu_section(
    hidden: Tensor,
    head: Head,
    ref_head: Head,
    weight_mean: Tensor | None,
    batch: Batch,
    config: UnlearnConfig,
) -> tuple[Tensor, ...]:
    """Gradients for the hidden states [R, d] of the rows with a role, and for the head."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    index, _, ref_hidden = batch.reference
    row_weight = [
        torch.full((count,), weight / max(count, 1), dtype=dtype, device=hidden.device)
        for weight, count in zip(config.weights, batch.counts[:3], strict=True)
    ]
    terms = (
        LocalTerm(index, config.target),
        KLTerm(ref_hidden, ref_head, reverse=config.kl_direction == "reverse"),
        CrossEntropyTerm(batch.labels[len(batch.item) :]),
    )
    total, _ = head_losses(
        hidden, head, terms, torch.cat(row_weight), chunk_bytes=config.chunk_bytes, weight_mean=weight_mean
    )
    return torch.autograd.grad(total, [t for t in (hidden, head.weight) if t.requires_grad])


def published_section(
    hidden: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    ref_weight: Tensor,
    forget: Padded,
    retain: Padded,
    config: UnlearnConfig,
    eos_token_id: int,
) -> tuple[Tensor, ...]:
    """Gradients for the hidden states [B, T, d] of :func:`published_states`, and for the head."""
    current, reference, kept = hidden
    total = published_loss(
        F.linear(current, weight),
        F.linear(reference, ref_weight),
        forget.labels,
        F.linear(kept, weight),
        retain.labels,
        config,
        eos_token_id,
    )
    return torch.autograd.grad(total, [t for t in (current, kept, weight) if t.requires_grad])


# --- candidates: one run per batch ---
def run_published(setup: Setup, reference: PreTrainedModel, batch: tuple[Padded, Padded]) -> Tensor:
    """Loss of a step of the published formulation, its gradients left in the model."""
    forget, retain = (part.to(setup.device) for part in batch)
    total = published_step(setup.twin, reference, forget, retain, setup.config, setup.eos_token_id)
    total.backward()
    return total.detach()


def published_runs(setup: Setup, reference: PreTrainedModel) -> list[Run]:
    return [freeing(setup, partial(run_published, setup, reference, batch)) for batch in setup.padded]


def palu_runs(setup: Setup) -> list[Run]:
    return [freeing(setup, partial(palu_step, setup.objective, feed, setup.device)) for feed in setup.feeds]


def body_runs(setup: Setup) -> list[Run]:
    def run(batch: Batch, gradient: Tensor) -> None:
        body_of(setup.model)(**batch.packed.inputs()).last_hidden_state.backward(gradient)

    runs = []
    for feed in setup.feeds:
        [[batch]] = feed
        gradient = states(1, sum(batch.packed.sequence_lengths), like=head_of(setup.model).weight)
        runs.append(freeing(setup, partial(run, batch.to(setup.device), gradient.detach())))
    return runs


def palu_section_runs(setup: Setup) -> list[Run]:
    head = head_of(setup.model)
    runs: list[Run] = []
    for feed in setup.feeds:
        [[batch]] = feed
        hidden = states(len(batch.rows), like=head.weight)
        reference = setup.objective.ref_head, setup.objective.weight_mean
        runs.append(partial(palu_section, hidden, head, *reference, batch.to(setup.device), setup.config))
    return runs


def published_section_runs(setup: Setup) -> list[Run]:
    weight, ref_weight = head_of(setup.model).weight, setup.objective.ref_head.weight
    runs: list[Run] = []
    for batch in setup.padded:
        forget, retain = (part.to(setup.device) for part in batch)
        hidden = published_states(forget, retain, weight)
        runs.append(
            partial(
                published_section,
                hidden,
                weight,
                ref_weight,
                forget,
                retain,
                setup.config,
                setup.eos_token_id,
            )
        )
    return runs


def published_states(forget: Padded, retain: Padded, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of the model (forget), the reference and the model (retain)."""
    return (
        states(*forget.labels.shape, like=weight),
        states(*forget.labels.shape, like=weight).detach(),
        states(*retain.labels.shape, like=weight),
    )


def states(*shape: int, like: Tensor) -> Tensor:
    """Hidden states [..., d] as a final norm leaves them, for a head of that dtype and device."""
    return torch.randn(*shape, like.shape[1], dtype=like.dtype, device=like.device, requires_grad=True)


def freeing(setup: Setup, run: Run) -> Run:
    """The run, then the model's gradients freed."""

    def both() -> None:
        run()
        setup.model.zero_grad(set_to_none=True)

    return both
