"""RMU (arXiv 2403.03218): the states of one layer are steered to a random vector, and held where all is to be kept.

With ``h`` the output of the layer ``layer_id`` at a token of an answer, ``h_ref`` the frozen reference's, and ``u`` a
vector of uniform numbers in [0, 1), drawn by ``seed``, over its 2-norm::

    forget = mean over the tokens of forget answers of |h - steering_coeff * u|^2 / d
    retain = mean over the tokens of retain answers of |h - h_ref|^2 / d
    loss   = gamma * forget + lambda_retain * retain

Settings and means over the width d are open-unlearning's; it averages each answer first, here all tokens count alike.
As there, all weights up to the layer are trained, where they require a gradient. The paper trains the MLP's down
projections of this layer and of the two below, with steering_coeff=6.5 and lambda_retain=1200 for Zephyr-7B: freeze all
other parameters for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from palu.data.packing import Batch, Items, Packed, answer_items
from palu.methods.base import ForgetSet, Method, MethodSettings, Reference, RefField, Shares, WeightedTerm
from palu.models.head import Head, body_of, layers_of, to_acc_dtype
from palu.models.lora import CausalLM
from palu.settings import RunSettings, count, positive


@dataclass(frozen=True)
class RMUSettings(MethodSettings):
    """Settings of RMU.

    Attributes:
        layer_id: the layer, from 0, whose output is steered. No weight above it is trained.
        steering_coeff: the 2-norm of the random vector that it is steered to.
    """

    layer_id: int = count(7, zero=True)
    steering_coeff: float = positive(2.0)


class RMU(Method):
    """``gamma * forget + lambda_retain * retain``, of one layer's states; the layers above run, and do not train."""

    Settings = RMUSettings
    title = "RMU"
    reaches_all = False

    @staticmethod
    def check(model: CausalLM, config: RunSettings) -> None:
        """Raise ValueError where the model has no such layer, or nothing up to it is trained."""
        body: Any = body_of(model)
        layers, shown = layers_of(body), f"layer_id = {config.method.layer_id}"
        if not layers:
            raise ValueError(
                f"objective = 'rmu': {type(body).__name__} has no one list of as many layers as its configuration says "
                "(num_hidden_layers); use another objective"
            )
        if config.method.layer_id >= len(layers):
            raise ValueError(f"{shown}: the model has {len(layers)} layers; give one of 0 to {len(layers) - 1}")
        reached = [body.get_input_embeddings(), *layers[: config.method.layer_id + 1]]
        if not any(p.requires_grad for module in reached for p in module.parameters()):
            raise ValueError(
                f"{shown}: no parameter of the layers up to it requires a gradient, so nothing could be unlearned; "
                "train some of them, or give a higher layer"
            )

    @staticmethod
    def make_items(forget: ForgetSet, config: RunSettings) -> Items:
        """Make the items of the forget set: every answer token is a target."""
        return answer_items(forget.examples)

    @staticmethod
    def reference(config: RunSettings) -> Reference:
        """Return: the layer's output at the tokens of the retain answers, where their loss has a weight."""
        return Reference(
            (RefField("state", "others"),) if config.method.lambda_retain > 0 else (),
            lambda rows, head: {"state": rows.others},
            {"layer_id": config.method.layer_id},
            of_retain=True,
        )

    @staticmethod
    def hidden_states(body: nn.Module, packed: Packed, config: RunSettings) -> Tensor:
        """Run the body; return the layer's output at the token that each row predicts.

        So it is the answer's tokens whose states count, as in open-unlearning, whose labels are not shifted here.
        """
        outputs: list[Any] = []
        layer = layers_of(body)[config.method.layer_id]
        with layer.register_forward_hook(lambda module, given, output: outputs.append(output)):
            body(**packed.inputs())
        output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]  # some layers give a tuple
        return output[0].roll(-1, 0)

    def compute_losses(self, hidden: Tensor, head: Head, batch: Batch, shares: Shares) -> list[WeightedTerm]:
        """Return the distances of one layer's states from the random vector, and from the reference's."""
        gamma, lambda_retain = self.settings.gamma, self.settings.lambda_retain
        states = to_acc_dtype(hidden)
        forgotten, kept = states.split([batch.counts.targets, batch.counts.retain])
        terms: list[WeightedTerm] = []
        if gamma > 0:
            forget = (forgotten - self.steering_vector(states)).square().mean(-1).sum() * shares.targets
            terms.append(("forget", forget, gamma))
        if lambda_retain > 0:
            retain = (kept - batch.reference["state"].to(states.dtype)).square().mean(-1).sum() * shares.retain
            terms.append(("retain", retain, lambda_retain))
        return terms

    def steering_vector(self, like: Tensor) -> Tensor:
        """Draw the vector [d] that forget states are steered to: the same one whenever it is asked for."""
        drawn = torch.rand(like.shape[-1], generator=torch.Generator().manual_seed(self.config.seed))
        return (self.settings.steering_coeff * drawn / drawn.norm()).to(like)
