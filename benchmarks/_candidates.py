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
from typing import Any

import torch
import torch.nn.functional as F
from _published import Padded, collate, published_loss, published_step
from _workload import make_batches, make_model
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from palu.config import UnlearnConfig
from palu.data.packing import Batch, anchor_item, retain_items
from palu.methods.base import ForgetSet
from palu.methods.palu import RECIPES, PaluMethod
from palu.models.attention import shares_prefix, use_packed_attention
from palu.models.head import Head, body_of, head_of
from palu.ref_model.precompute import compute_outputs
from palu.ref_model.storage import ReferenceCache
from palu.training.dataloader import UnlearnDataLoader

Run = Callable[[], object]
PaddedPair = tuple[Padded, Padded]  # forget, retain


# --- what they share ---
@dataclass
class Setup:
    """One policy model and one set of batches, in the forms that both formulations take."""

    device: torch.device
    config: UnlearnConfig  # of palu
    published: UnlearnConfig  # of the published formulation
    model: PreTrainedModel  # with packed attention
    twin: PreTrainedModel  # the same parameters, with the attention and checkpointing of the published step
    ref_model: PreTrainedModel
    method: PaluMethod
    loaders: list[UnlearnDataLoader]  # one batch each
    padded: list[PaddedPair]  # on the host, pinned for CUDA

    def padded_on_device(self, batch: PaddedPair) -> PaddedPair:
        """Copy a batch; copies from pinned memory do not block."""
        forget, retain = (
            {name: value.to(self.device, non_blocking=True) for name, value in part.items()} for part in batch
        )
        return forget, retain

    def published_step(self, batch: PaddedPair) -> Tensor:
        """Compute the loss of a step of the published formulation, its gradients left in the model."""
        eos_token_id = self.model.config.vocab_size - 1
        forget, retain = self.padded_on_device(batch)
        total = published_step(self.twin, self.ref_model, forget, retain, self.published, eos_token_id)
        total.backward()
        return total.detach()

    def palu_step(self, loader: UnlearnDataLoader) -> Tensor:
        """Compute the loss of a step of palu.unlearn, its gradients left in the model. The loader has one batch."""
        [[batch]] = loader
        total = self.method(batch.to(self.device), torch.tensor(batch.counts, device=self.device)).total
        total.backward()
        return total.detach()


def prepare(arguments: argparse.Namespace, *, perturbed: bool = False) -> Setup:
    """Make model, batches and reference cache.

    perturbed: the reference is a copy of the model with noise on its weights, so that the KL divergence is not zero;
    otherwise it is the model itself.
    """
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    model = make_model(arguments.model, device, getattr(torch, arguments.dtype))
    head_of(model).weight.requires_grad_(not arguments.frozen_head)
    # A second tree of modules over the same parameters, so that neither step resets the other's modes.
    twin = copy.deepcopy(model, {id(t): t for t in itertools.chain(model.parameters(), model.buffers())})
    if arguments.checkpointing:
        twin.gradient_checkpointing_enable({"use_reentrant": False})

    sizes = {"batch_size": arguments.batch_size, "retain_batch_size": arguments.retain_batch_size}
    paper = RECIPES["paper"] | {"top_k": arguments.top_k, "n": arguments.n}
    published = UnlearnConfig(**paper, **sizes)
    config = published if arguments.loss == "paper" else UnlearnConfig(**sizes)
    vocab_size = model.config.vocab_size
    retain_size = arguments.retain_batch_size or arguments.batch_size
    batches = make_batches(
        vocab_size, arguments.batches, arguments.batch_size, retain_size, arguments.seed, arguments.system
    )

    ref_model = frozen_copy(twin, noise=0.02) if perturbed else model
    pinned = device.type == "cuda"
    weight = head_of(ref_model).weight.detach()
    ref_head = Head(weight if perturbed or arguments.frozen_head else weight.clone(), None)
    loaders, padded = [], []
    with use_packed_attention(ref_model):
        for forget, retain in batches:
            items = PaluMethod.make_items(ForgetSet(forget, vocab_size - 1), config)
            # The default keeps by the KL what the paper's loss keeps by cross-entropy.
            kept = [] if config is published else [anchor_item(e.input_ids, e.answer_start) for e in retain]
            anchors = ReferenceCache(extra=kept, neighbours=len(kept))
            cache = compute_outputs(ref_model, items, config, Accelerator(), anchors)
            beside = retain_items([] if kept else retain)
            loading = {"pin_memory": pinned, "share_prefix": shares_prefix(ref_model)}
            loaders.append(UnlearnDataLoader(items, beside, cache, config, **loading))
            parts = [collate(forget), collate(retain)]
            if pinned:
                parts = [{name: value.pin_memory() for name, value in part.items()} for part in parts]
            padded.append((parts[0], parts[1]))
    method = PaluMethod(model, config)
    method.ref_head = ref_head
    return Setup(device, config, published, model, twin, ref_model, method, loaders, padded)


def frozen_copy(model: PreTrainedModel, noise: float = 0.0) -> PreTrainedModel:
    """Copy a model, add noise to the copy's weights, and freeze it."""
    ref_model = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in ref_model.parameters() if noise else ():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return ref_model


# --- candidates: one run per batch ---
def palu_runs(setup: Setup) -> list[Run]:
    """A step of palu."""
    return [partial(setup.palu_step, loader) for loader in setup.loaders]


def published_runs(setup: Setup) -> list[Run]:
    """A step as published; from here on there is a reference model."""
    setup.ref_model = frozen_copy(setup.twin)
    # palu's copy of the reference's head is not the published step's to carry.
    setup.method.ref_head = head_of(setup.ref_model)
    return [partial(setup.published_step, batch) for batch in setup.padded]


def body_runs(setup: Setup) -> list[Run]:
    """Forward and backward pass of the packed body alone, on each batch."""

    def run(batch: Batch, gradient: Tensor) -> None:
        body_of(setup.model)(**batch.packed.inputs()).last_hidden_state.backward(gradient)

    runs: list[Run] = []
    for loader in setup.loaders:
        [[batch]] = loader
        gradient = states(1, sum(batch.packed.sequence_lengths), like=head_of(setup.model).weight)
        runs.append(partial(run, batch.to(setup.device), gradient.detach()))
    return runs


def palu_section_runs(setup: Setup) -> list[Run]:
    """Head and losses of palu, from random hidden states of each batch; a run computes the gradients."""
    weight = head_of(setup.model).weight

    def run(method: PaluMethod, batch: Batch, counts: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(method(batch, counts).total, [t for t in (hidden, weight) if t.requires_grad])

    runs: list[Run] = []
    for loader in setup.loaders:
        [[batch]] = loader
        hidden = states(sum(batch.packed.sequence_lengths), like=weight)
        method: Any = copy.copy(setup.method)  # its body is not run
        method.hidden_states = partial(_given, hidden)
        counts = torch.tensor(batch.counts, device=setup.device)
        runs.append(partial(run, method, batch.to(setup.device), counts, hidden))
    return runs


def _given(hidden: Tensor, *_: object) -> Tensor:
    return hidden


def published_section_runs(setup: Setup) -> list[Run]:
    """Head and losses as published, from random hidden states [B, T, d] of each batch; a run computes the gradients."""
    weight, ref_head = head_of(setup.model).weight, setup.method.ref_head
    assert ref_head is not None

    def run(batch: PaddedPair, current: Tensor, frozen: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        logits, retain_logits = F.linear(current, weight), F.linear(kept, weight)
        ref_logits, (labels, retain_labels) = F.linear(frozen, ref_head.weight), (part["labels"] for part in batch)
        given = logits, ref_logits, labels, retain_logits, retain_labels
        total = published_loss(*given, setup.published, setup.model.config.vocab_size - 1)
        return torch.autograd.grad(total, [t for t in (current, kept, weight) if t.requires_grad])

    runs: list[Run] = []
    for batch in map(setup.padded_on_device, setup.padded):
        shapes = [part["labels"].shape for part in (batch[0], *batch)]
        current, frozen, kept = (states(*shape, like=weight) for shape in shapes)
        runs.append(partial(run, batch, current, frozen.detach(), kept))
    return runs


def states(*shape: int, like: Tensor) -> Tensor:
    """Draw hidden states [..., d] as a final norm leaves them, with the dtype and device of a head [V, d]."""
    return torch.randn(*shape, like.shape[1], dtype=like.dtype, device=like.device, requires_grad=True)


CANDIDATES: dict[str, Callable[[Setup], list[Run]]] = {
    "palu": palu_runs,
    "body": body_runs,
    "published": published_runs,
    "loss-palu": palu_section_runs,
    "loss-published": published_section_runs,
}
