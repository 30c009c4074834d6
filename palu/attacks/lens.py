"""Look inside: the logit lens, which reads every layer's state through the final norm and the head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from palu.attacks.attack import Attack, Finding, Victim
from palu.attacks.secrets import AuditData
from palu.evaluate.scores import CHUNK_BYTES
from palu.models.generation import eval_mode
from palu.models.head import body_of, head_of, map_logits
from palu.models.lora import CausalLM

TOP = 10
# What bodies of transformers call the norm after their last layer.
NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm", "norm_f")


@dataclass(frozen=True)
class LogitLens(Attack):
    """A secret is seen where, at one layer, each of its tokens is among the ``top`` likeliest.

    Every layer's state at the token before (the true words before it given) goes through the final norm and the head.
    The last layer's is what the model itself predicts.
    """

    top: int = TOP
    key = "lens"
    budget = "the weights: each token of the secret, after the true ones before it, among the {top} of a layer"

    def skip_reason(self, data: AuditData, model: CausalLM) -> str | None:
        if _final_norm(model) is None:
            kind = type(body_of(model)).__name__
            return f"{kind} has no norm after its last layer that is called {', '.join(NORMS[:-1])} or {NORMS[-1]}"
        return None

    def run(self, victim: Victim) -> list[Finding]:
        values: list[float | None] = []
        evidence = []
        for ranks in self._ranks(victim):
            worst = ranks.amax(1)  # of each layer
            best = int(worst.min())
            # The lowest layer of them.
            evidence.append({"layer": int((worst == best).nonzero()[0]) + 1, "rank": best})
            values.append(float(best <= self.top))
        return [Finding(f"inside: logit lens, top {self.top}", values, evidence)]

    @torch.no_grad()
    def _ranks(self, victim: Victim) -> list[Tensor]:
        """Rank each secret's tokens, 1 the likeliest: [layers, t] of each secret."""
        model, body, norm, head = victim.model, body_of(victim.model), _final_norm(victim.model), head_of(victim.model)
        assert norm is not None
        found = []
        with eval_mode(model):
            for secret in victim.data.secrets:
                ids = victim.data.rows[secret.row].example.input_ids[: secret.stop].to(model.device)
                output = body(input_ids=ids[None, :-1], use_cache=False, output_hidden_states=True)
                # The embeddings come first and the last layer's state, which may be past the norm or not, last.
                part = (0, slice(secret.first - 1, None))
                layers = [*(norm(state[part]) for state in output.hidden_states[1:-1]), output.last_hidden_state[part]]
                tokens = ids[secret.first :].repeat(len(layers))
                ranks = map_logits(_rank, torch.cat(layers), head, tokens, CHUNK_BYTES)
                found.append(ranks.view(len(layers), -1).cpu())
                victim.bar.update()
        return found


def _rank(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits > logits.gather(1, labels[:, None])).sum(1) + 1


def _final_norm(model: CausalLM) -> nn.Module | None:
    body = body_of(model)
    return next((norm for name in NORMS if isinstance(norm := getattr(body, name, None), nn.Module)), None)
