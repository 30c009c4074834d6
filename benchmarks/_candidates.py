"""The candidates of bench_step.py: a training step, or its loss section, of palu and as published.

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
from _published import Padded, collate, published_loss, published_step
from _workload import make_batches, make_model
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from palu.config import UnlearnConfig
from palu.data.packing import Batch, retain_items
from palu.losses import CrossEntropyTerm, KLTerm, LocalTerm, fused_linear_losses
from palu.methods.base import ForgetSet
from palu.methods.palu import PaluMethod
from palu.models.attention import use_packed_attention
from palu.models.head import Head, body_of, head_of
from palu.ops import weight_mean
from palu.ref_model.precompute import compute_outputs
from palu.training.dataloader import UnlearnDataLoader

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
    method: PaluMethod
    loaders: list[UnlearnDataLoader]  # one batch each
    padded: list[tuple[Padded, Padded]]  # forget, retain; on the host, pinned for CUDA


def prepare(
    arguments: argparse.Namespace, make_reference: Callable[[PreTrainedModel], PreTrainedModel] | None
) -> Setup:
    """Make model, batches and reference cache.

    make_reference: makes the reference of the model; None: the model itself is it.
    """
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    model = make_model(arguments.model, device, getattr(torch, arguments.dtype))
    head_of(model).weight.requires_grad_(not arguments.frozen_head)
    # A second tree of modules over the same parameters, so that neither step resets the other's modes.
    twin = copy.deepcopy(model, {id(t): t for t in itertools.chain(model.parameters(), model.buffers())})
    if arguments.checkpointing:
        twin.gradient_checkpointing_enable({"use_reentrant": False})

    config = UnlearnConfig(
        local_loss="topk_mse",
        n=arguments.n,
        top_k=arguments.top_k,
        target="global_mean",
        batch_size=arguments.batch_size,
        retain_batch_size=arguments.retain_batch_size,
    )
    vocab_size = model.config.vocab_size
    retain_batch_size = config.retain_batch_size or config.batch_size
    batches = make_batches(vocab_size, arguments.batches, config.batch_size, retain_batch_size, arguments.seed)

    ref_model = model if make_reference is None else make_reference(twin)
    eos_token_id = vocab_size - 1
    pinned = device.type == "cuda"
    weight = head_of(ref_model).weight.detach()
    if make_reference is None and not arguments.frozen_head:
        weight = weight.clone()
    ref_head = Head(weight, None)
    loaders, padded = [], []
    with use_packed_attention(ref_model):
        for forget, retain in batches:
            items = PaluMethod.make_items(ForgetSet(forget, eos_token_id), config)
            cache = compute_outputs(ref_model, items, config, Accelerator())
            loaders.append(UnlearnDataLoader(items, retain_items(retain), cache, config, pin_memory=pinned))
            padded.append((collate(forget), collate(retain)))
    if pinned:
        padded = [(forget.pin_memory(), retain.pin_memory()) for forget, retain in padded]
    method = PaluMethod(model, config)
    method.ref_head = ref_head
    if arguments.frozen_head:
        method.weight_mean = weight_mean(head_of(model).weight)
    return Setup(device, config, eos_token_id, model, twin, method, loaders, padded)


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model and freeze the copy."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def perturbed_copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model with noise on its weights, so that the KL divergence is not zero, and freeze the copy."""
    ref_model = copy_of(model)
    with torch.no_grad():
        for parameter in ref_model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return ref_model


# --- one step, or a part of it ---
def palu_step(method: PaluMethod, loader: UnlearnDataLoader, device: torch.device) -> Tensor:
    """Compute the loss of a step of palu.unlearn, its gradients left in the model. The loader has one batch."""
    [[batch]] = loader
    total = method(batch.to(device), torch.tensor(batch.counts, device=device)).total
    total.backward()
    return total.detach()


def palu_section(
    hidden: Tensor, head: Head, ref_head: Head, weight_mean: Tensor | None, batch: Batch, config: UnlearnConfig
) -> tuple[Tensor, ...]:
    """Compute the gradients for the hidden states [R, d] of the rows with a role, and for the head."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    own = config.method
    weights = own.gamma, own.lambda_kl, own.lambda_retain
    row_weight = [
        torch.full((count,), weight / max(count, 1), dtype=dtype, device=hidden.device)
        for weight, count in zip(weights, batch.counts[:3], strict=True)
    ]
    terms = (
        LocalTerm(batch.reference["index"], own.target),
        KLTerm(batch.reference["hidden"], ref_head, reverse=own.kl_direction == "reverse"),
        CrossEntropyTerm(batch.labels[len(batch.item) :]),
    )
    total, _ = fused_linear_losses(
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
    """Compute the gradients for the hidden states [B, T, d] of :func:`published_states`, and for the head."""
    current, frozen, kept = hidden
    total = published_loss(
        F.linear(current, weight),
        F.linear(frozen, ref_weight),
        forget.labels,
        F.linear(kept, weight),
        retain.labels,
        config,
        eos_token_id,
    )
    return torch.autograd.grad(total, [t for t in (current, kept, weight) if t.requires_grad])


# --- candidates: one run per batch ---
def run_published(setup: Setup, ref_model: PreTrainedModel, batch: tuple[Padded, Padded]) -> Tensor:
    """Compute the loss of a step of the published formulation, its gradients left in the model."""
    forget, retain = (part.to(setup.device) for part in batch)
    total = published_step(setup.twin, ref_model, forget, retain, setup.config, setup.eos_token_id)
    total.backward()
    return total.detach()


def published_runs(setup: Setup, ref_model: PreTrainedModel) -> list[Run]:
    """A step of the published formulation, on each batch."""
    return [freeing(setup, partial(run_published, setup, ref_model, batch)) for batch in setup.padded]


def palu_runs(setup: Setup) -> list[Run]:
    """A step of palu.unlearn, on each batch."""
    return [freeing(setup, partial(palu_step, setup.method, loader, setup.device)) for loader in setup.loaders]


def body_runs(setup: Setup) -> list[Run]:
    """Forward and backward pass of the packed body alone, on each batch."""

    def run(batch: Batch, gradient: Tensor) -> None:
        body_of(setup.model)(**batch.packed.inputs()).last_hidden_state.backward(gradient)

    runs = []
    for loader in setup.loaders:
        [[batch]] = loader
        gradient = states(1, sum(batch.packed.sequence_lengths), like=head_of(setup.model).weight)
        runs.append(freeing(setup, partial(run, batch.to(setup.device), gradient.detach())))
    return runs


def palu_section_runs(setup: Setup) -> list[Run]:
    """Head and losses of palu, from random hidden states for each batch."""
    head = head_of(setup.model)
    runs: list[Run] = []
    for loader in setup.loaders:
        [[batch]] = loader
        hidden = states(len(batch.rows), like=head.weight)
        ref_head, mean = setup.method.ref_head, setup.method.weight_mean
        assert ref_head is not None
        runs.append(partial(palu_section, hidden, head, ref_head, mean, batch.to(setup.device), setup.config))
    return runs


def published_section_runs(setup: Setup) -> list[Run]:
    """Head and losses as published, from random hidden states for each batch."""
    weight, ref_head = head_of(setup.model).weight, setup.method.ref_head
    assert ref_head is not None
    runs: list[Run] = []
    for batch in setup.padded:
        forget, retain = (part.to(setup.device) for part in batch)
        hidden = published_states(forget, retain, weight)
        runs.append(
            partial(
                published_section, hidden, weight, ref_head.weight, forget, retain, setup.config, setup.eos_token_id
            )
        )
    return runs


def published_states(forget: Padded, retain: Padded, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw hidden states [B, T, d] of the model (forget), of the reference (forget) and of the model (retain)."""
    return (
        states(*forget.labels.shape, like=weight),
        states(*forget.labels.shape, like=weight).detach(),
        states(*retain.labels.shape, like=weight),
    )


def states(*shape: int, like: Tensor) -> Tensor:
    """Draw hidden states [..., d] as a final norm leaves them, with the dtype and device of a head [V, d]."""
    return torch.randn(*shape, like.shape[1], dtype=like.dtype, device=like.device, requires_grad=True)


def freeing(setup: Setup, run: Run) -> Run:
    """Return a run that frees the model's gradients at its end."""

    def both() -> None:
        run()
        setup.model.zero_grad(set_to_none=True)

    return both
