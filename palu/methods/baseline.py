"""What the methods share that PALU is compared with: a loss on whole forget answers, cross-entropy on the retain set.

Each loss is ``gamma * forget + lambda_retain * retain``. Preferences are averaged over the examples of the whole
optimisation step, exactly. All answer tokens reach the head at once: these are baselines, not the fast path. Where the
papers leave a choice, it is that of open-unlearning.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from palu.data.packing import Batch, Items, answer_items
from palu.methods.base import ForgetSet, Method, RowTerm, Shares, WeightedTerm, retain_term
from palu.models.head import Head
from palu.settings import RunSettings


class Baseline(Method):
    """A forget loss on the logits of whole answers, and the cross-entropy of the retain set."""

    @staticmethod
    def make_items(forget: ForgetSet, config: RunSettings) -> Items:
        """Make the items of the forget set: every answer token is a target."""
        return answer_items(forget.examples)

    def compute_losses(self, hidden: Tensor, head: Head, batch: Batch, shares: Shares) -> list[WeightedTerm]:
        """Return the forget loss and the cross-entropy."""
        answers, gamma = len(batch.item), self.settings.gamma
        terms: list[WeightedTerm] = []
        if gamma > 0:
            terms.append(("forget", self.forget_term(hidden[:answers], head, batch, shares), gamma))
        if self.settings.lambda_retain > 0:
            terms.append(("retain", retain_term(batch), self.settings.lambda_retain))
        return terms

    def forget_term(self, hidden: Tensor, head: Head, batch: Batch, shares: Shares) -> RowTerm | Tensor:
        """Return the forget loss, from the hidden states [R, d] of target and other rows."""
        return self.forget_loss(head.logits(hidden), batch, shares)

    def forget_loss(self, logits: Tensor, batch: Batch, shares: Shares) -> Tensor:
        """Compute the forget loss from the logits [R, V] of target and other rows."""
        raise NotImplementedError


def preference(advantage: Tensor, beta: float, shares: Shares) -> Tensor:
    """Compute -2/beta * log sigmoid(beta * advantage [items]), averaged over items."""
    return (-2 / beta * F.logsigmoid(beta * advantage)).sum() * shares.examples


def true_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """Pick the label's logit from logits [R, V]: [R]."""
    return logits.gather(-1, labels[:, None])[:, 0]


def per_item(values: Tensor, item: Tensor, items: int) -> Tensor:
    """Sum the values [R] of each item: [items]. ``item``: [R], the item that each value belongs to."""
    return values.new_zeros(items).index_add(0, item, values)


def item_means(values: Tensor, item: Tensor, items: int) -> Tensor:
    """Average the values [R] of each item, as :func:`per_item` sums them: [items]; NaN for one without values."""
    return per_item(values, item, items) / per_item(torch.ones_like(values), item, items)
