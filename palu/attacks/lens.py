"""Look inside: the logit lens, which reads every layer's state through the final norm and the head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from palu.attacks.attack import Attack, Finding, Victim
from palu.attacks.secrets import AuditData
from palu.evaluate.scores import CHUNK_BYTES
from palu.models.generation import batches_by_length, eval_mode
from palu.models.head import body_of, head_of, map_logits
from palu.models.lora import CausalLM, base_of

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

    @property
    def budget(self) -> str:
        return f"the weights: each token of the secret, after the true ones before it, among the {self.top} of a layer"

    def skip_reason(self, data: AuditData, model: CausalLM) -> str | None:
        if _final_norm(model) is None:
            kind = type(body_of(model)).__name__
            return f"{kind} has no norm after its last layer that is called {', '.join(NORMS[:-1])} or {NORMS[-1]}"
        return None

    def run(self, victim: Victim) -> list[Finding]:
        data = victim.data
        ranks = self._ranks(victim)
        values: list[float | None] = []
        evidence = []
        for i in range(len(data.secrets)):
            worst = ranks[i].amax(1)  # of each layer
            best = int(worst.min())
            # The lowest layer of them.
            evidence.append({"layer": int((worst == best).nonzero()[0]) + 1, "rank": best})
            values.append(float(best <= self.top))
        return [Finding(f"inside: logit lens, top {self.top}", values, evidence)]

    @torch.no_grad()
    def _ranks(self, victim: Victim) -> dict[int, Tensor]:
        """Rank each secret's tokens, 1 the likeliest: [layers, t] by secret."""
        data, model, body = victim.data, victim.model, body_of(victim.model)
        norm, head = _final_norm(model), head_of(model)
        assert norm is not None
        ids = [row.example.input_ids for row in data.rows]
        ranks: dict[int, Tensor] = {}
        with eval_mode(model):
            for group in batches_by_length([len(one) for one in ids], victim.batch_tokens):
                padded = pad_sequence([ids[row] for row in group], batch_first=True).to(model.device)
                mask = pad_sequence([torch.ones_like(ids[row]) for row in group], batch_first=True).to(model.device)
                output = body(input_ids=padded, attention_mask=mask, use_cache=False, output_hidden_states=True)
                # The embeddings come first and the last layer's state, which may be past the norm or not, last.
                states = output.hidden_states[1:-1]
                for i, secret in enumerate(data.secrets):
                    if secret.row not in group:
                        continue
                    at, tokens = group.index(secret.row), ids[secret.row][secret.first : secret.stop].to(model.device)
                    part = (at, slice(secret.first - 1, secret.stop - 1))
                    hidden = [*(norm(state[part]) for state in states), output.last_hidden_state[part]]
                    found = map_logits(_rank, torch.cat(hidden), head, tokens.repeat(len(hidden)), CHUNK_BYTES)
                    ranks[i] = found.view(len(hidden), -1).cpu()
                victim.bar.update(len(group))
        return ranks


def _rank(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits > logits.gather(1, labels[:, None])).sum(1) + 1


def _final_norm(model: CausalLM) -> nn.Module | None:
    body = body_of(base_of(model))
    return next((norm for name in NORMS if isinstance(norm := getattr(body, name, None), nn.Module)), None)
