"""Quantise: round the weights as a server would, and ask again, with the model's utility beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import mean

import torch
from torch import Tensor, nn

from palu.attacks.attack import Attack, Finding, Victim
from palu.attacks.secrets import AuditData
from palu.data.tokenize import IGNORE, Example
from palu.models.head import body_of
from palu.models.lora import CausalLM, unmerged_layers
from palu.models.quantized import quantized_by
from palu.ref_model.anchors import ANSWER_TOKENS, anchor_texts

INT4_GROUP, NF4_BLOCK = 128, 64
# Quantiles of the normal distribution, scaled to [-1, 1], 0 among them (arXiv 2305.14314): those of bitsandbytes.
NF4_LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928, -0.52507293, -0.39491743, -0.28444132, -0.1847734, -0.091049977, 0.0),
        *(0.079580314, 0.16093014, 0.24611226, 0.33791512, 0.44070974, 0.56261688, 0.72295666, 1.0),
    ]
)
LEAST_SHARE = 0.5  # of the weights: where less can be rounded, the answers would say nothing of a rounded model
BROKEN = 0.5  # a model that keeps less than this share of its utility when it is rounded is broken, and tells nothing


@dataclass(frozen=True)
class Quantise(Attack):
    """Ask greedily after rounding to the nearest: the weights of linear layers and experts, not head and embeddings.

    A model with an adapter is asked twice: after the adapter is merged and the sum rounded, and with the adapter as it
    is on a rounded base (as QLoRA serves it).

    Utility is the mean probability (exp of minus the mean NLL) of the answers of ``utility_rows`` retain rows; without
    retain rows, of what the model itself answers to as many everyday prompts before it is rounded.
    """

    scheme: str
    max_new_tokens: int
    utility_rows: int
    reads_retain = True

    @property
    def key(self) -> str:
        return f"quantise-{self.scheme}"

    @property
    def budget(self) -> str:
        return f"linear layers rounded to {SCHEMES[self.scheme][0]}; 1 greedy answer of {self.max_new_tokens} tokens"

    def skip_reason(self, data: AuditData, model: CausalLM) -> str | None:
        if method := quantized_by(model):
            return f"the model is quantised already, by {method}, and every other row is of it in this form"
        if (share := _linear_share(model)) < LEAST_SHARE:
            where = "in torch.nn.Linear and in experts of transformers, which alone can be rounded"
            return f"only {share:.0%} of the weights of {type(model).__name__} are {where}"
        return None

    def run(self, victim: Victim) -> list[Finding]:
        examples = self._utility_examples(victim)
        kind = "retain row" if victim.data.retain else "answer to everyday prompt"
        names = [f"{kind} {i}" for i in range(len(examples))]

        def utility() -> float:
            return mean(score.probability for score in victim.scores(examples, names))

        unrounded, name, findings = utility(), f"quantise: {self.scheme}", []
        apart = {f"{name}, adapter merged": True, f"{name}, under the adapter": False}
        for row, merge in (apart if unmerged_layers(body_of(victim.model)) else {name: True}).items():
            with rounded(victim.model, self.scheme, merge=merge):
                figures = {"utility unrounded": unrounded, "utility": utility()}
                finding = victim.ask(row, victim.data.prompts, self.max_new_tokens)
            findings.append(replace(finding, figures=figures))
        return findings

    def _utility_examples(self, victim: Victim) -> list[Example]:
        data, count = victim.data, self.utility_rows
        if data.retain:
            return data.retain_examples(data.retain[:count])
        prompts = data.encode_prompts({"question": text} for text in anchor_texts()[:count])
        examples = []
        for i, (prompt, answer) in enumerate(zip(prompts, victim.generate(prompts, ANSWER_TOKENS), strict=True)):
            ids = torch.cat([prompt, torch.tensor(answer.ids)])
            examples.append(Example(i, ids, torch.where(torch.arange(len(ids)) < len(prompt), IGNORE, ids)))
        return examples


def _linear_layers(model: CausalLM, *, merged: bool = True) -> list[nn.Module]:
    """List the linear layers of a model's body, without a LoRA adapter's factors, and its experts.

    Layers that the adapter replaces whole (``modules_to_save``) are the model's own once it is ``merged``.
    """
    of_adapter = (".lora_",) if merged else (".lora_", ".modules_to_save.")
    modules = [(f".{path}", module) for path, module in body_of(model).named_modules() if _weights(module)]
    return [module for path, module in modules if not any(part in path for part in of_adapter)]


def _weights(module: nn.Module) -> list[Tensor]:
    """List the weights of a linear layer [out, in], or of a mixture's experts [experts, out, in]; [] of others."""
    if isinstance(module, nn.Linear):
        return [module.weight]
    # transformers says so of its experts, whose weights may be [experts, in, out].
    stacked = hasattr(module, "is_transposed")
    return [p for p in module.parameters(recurse=False) if p.ndim == 3] if stacked else []


def _matrices(weight: Tensor, module: nn.Module) -> Iterable[Tensor]:
    """Return a weight's matrices [out, in], as views: itself, or one for each expert."""
    if weight.ndim == 2:
        return [weight]
    return weight.mT if module.is_transposed else weight


def _linear_share(model: CausalLM) -> float:
    """Compute which share of its body's weights, embeddings and a LoRA adapter's factors aside, linear layers hold."""
    body = body_of(model)
    embedded = {p for module in body.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    own = {p for path, p in body.named_parameters() if ".lora_" not in f".{path}"} - embedded
    linear = {weight for layer in _linear_layers(model) for weight in _weights(layer)}
    return sum(p.numel() for p in linear) / max(sum(p.numel() for p in own), 1)


@contextmanager
def rounded(model: CausalLM, scheme: str, *, merge: bool = True) -> Iterator[None]:
    """Round the weights of linear layers and experts within the block; afterwards they are bit by bit as before.

    A copy of the weights is kept in the host's memory meanwhile.

    Args:
        merge: round what a LoRA adapter makes of them, as if it had been merged; else it stays apart, and unrounded.
    """
    _, function = SCHEMES[scheme]
    layers, adapted = _linear_layers(model, merged=merge), unmerged_layers(body_of(model)) if merge else []
    # By parameter, since PEFT may give one other data; biases, too, to which an adapter may add.
    kept = {p: p.detach().to("cpu", copy=True) for layer in layers for p in layer.parameters(recurse=False)}
    try:
        for layer in adapted:
            layer.merge()
        layer_of = {weight: layer for layer in layers for weight in _weights(layer)}  # shared ones once
        for weight, layer in layer_of.items():
            for matrix in _matrices(weight.detach(), layer):
                matrix.copy_(function(matrix.float()))
        yield
    finally:
        for layer in adapted:
            if layer.merged:
                layer.unmerge()
        for p, before in kept.items():
            p.detach().copy_(before)


def round_int8(weight: Tensor) -> Tensor:
    """Round a weight [out, in] to 8 bits: a row shares one scale, its largest magnitude / 127."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return torch.where(scale > 0, (weight / scale).round() * scale, weight)


def round_int4(weight: Tensor) -> Tensor:
    """Round a weight [out, in] to 4 bits: INT4_GROUP neighbours of a row share a scale and a zero point.

    The 16 levels reach from the group's least to its largest number, 0 among them. A row's last group may be shorter.
    """

    def of_groups(group: Tensor) -> Tensor:
        low, high = group.amin(-1, keepdim=True).clamp(max=0), group.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 15).clamp(min=torch.finfo(group.dtype).tiny)
        zero = (-low / scale).round()
        return (((group / scale).round() + zero).clamp(0, 15) - zero) * scale

    return torch.cat([of_groups(group) for group in weight.split(INT4_GROUP, dim=1)], dim=1)


def round_nf4(weight: Tensor) -> Tensor:
    """Round a weight to NormalFloat4 (arXiv 2305.14314): NF4_BLOCK numbers, row after row, share their magnitude."""
    flat = weight.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = NF4_LEVELS.to(weight.device)
    index = torch.bucketize(blocks / torch.where(largest > 0, largest, 1), (levels[1:] + levels[:-1]) / 2)
    return (levels[index] * largest).flatten()[: len(flat)].view_as(weight)


SCHEMES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "int8": ("8 bits, a scale for each row", round_int8),
    "int4": (f"4 bits in groups of {INT4_GROUP}", round_int4),
    "nf4": (f"NF4 in blocks of {NF4_BLOCK}", round_nf4),
}
