"""Score texts with a model: token log-probabilities, which the metrics are made of."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palu.data.files import DataError
from palu.data.packing import Item, pack, retain_items
from palu.data.tokenize import IGNORE, Example, check_tokenizer
from palu.evaluate import metrics
from palu.models.attention import shares_prefix, use_packed_attention
from palu.models.checks import check_causal, check_linear_head, check_packing, check_vocabulary
from palu.models.generation import batches_by_length
from palu.models.head import body_of, head_of, map_logits
from palu.models.lora import CausalLM
from palu.models.positions import max_positions
from palu.version import __version__

BATCH_TOKENS = 8192  # tokens per forward pass
CHUNK_BYTES = 256 * 2**20  # of float32 logits held at once


@dataclass(frozen=True)
class TokenScores:
    """One text's labelled tokens, in order; float32 on the host."""

    log_prob: Tensor  # [n]: log-probability of the token
    correct: Tensor  # [n], bool: the token is the argmax
    mean: Tensor  # [n]: mean of log p over the vocabulary, under p
    variance: Tensor  # [n]: variance of the same

    @property
    def nll(self) -> float:
        """Mean negative log-probability, in nats."""
        return -float(self.log_prob.double().mean())

    @property
    def probability(self) -> float:
        """exp(-NLL): the geometric mean of the tokens' probabilities."""
        return math.exp(-self.nll)


def check_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    names: Iterable[str],
    *,
    name: str = "model",
) -> None:
    """Raise UnsupportedModelError or ValueError where a model cannot score these texts, or not with this tokenizer.

    DataError: a text has more tokens than the model positions. ``names``: how to call each example there; ``name``: the
    model.
    """
    check_causal(name, model)
    check_vocabulary(name, model, tokenizer)
    check_lengths(model, examples, names, name=name)
    check_linear_head(model, examples[0].input_ids)
    check_packing(name, model, model.device, longest=max(len(example.input_ids) for example in examples))


def check_lengths(
    model: CausalLM, examples: Iterable[Example], names: Iterable[str], *, name: str = "the model"
) -> None:
    """Raise DataError for a text with more tokens than the model has positions."""
    if (positions := max_positions(model)) is None:
        return
    for where, example in zip(names, examples, strict=True):
        if (length := len(example.input_ids)) > positions:
            raise DataError(f"{where} has {length} tokens and {name} {positions} positions; shorten it")


@torch.no_grad()
def token_scores(
    model: PreTrainedModel,
    examples: Sequence[Example],
    names: Sequence[str],
    *,
    batch_tokens: int,
    bar: tqdm,
    marginal: Tensor | None = None,
) -> list[TokenScores]:
    """Score every labelled token, teacher-forced, in packed passes without padding.

    So the result does not depend on the batch size, but for rounding.

    Args:
        names: how to call each example in an error: ValueError, for log-probabilities that are not finite.
        batch_tokens: tokens per pass (a longer text has a pass of its own).
        marginal: float32 [V] on the model's device, to which the distribution at each labelled token is added.
    """
    head, score_rows = head_of(model), partial(_score_rows, marginal=marginal)
    scores: dict[int, TokenScores] = {}
    with use_packed_attention(model):
        for group in batches_by_length([len(example.input_ids) for example in examples], batch_tokens):
            items = list(retain_items(examples[i] for i in group))
            hidden, labels = states_and_labels(model, items)
            table = map_logits(score_rows, hidden, head, labels, CHUNK_BYTES).T.contiguous().cpu()
            for i, part in zip(group, table.split([len(item.rows) for item in items], dim=1), strict=True):
                if not bool(part[0].isfinite().all()):
                    raise ValueError(
                        f"the model gives {names[i]} log-probabilities that are not finite, so its weights or "
                        "activations are broken; load the last sound checkpoint, or use bfloat16 or float32"
                    )
                scores[i] = TokenScores(part[0], part[1].bool(), part[2], part[3])
            bar.update(len(group))
    return [scores[i] for i in range(len(examples))]


def memorisation(score: TokenScores) -> dict[str, float]:
    """Compute the metrics of a text without its last token, which open-unlearning takes for its end; by name."""
    log_prob, mean, variance = (x[:-1].double().numpy() for x in (score.log_prob, score.mean, score.variance))
    correct = score.correct[:-1].numpy()
    return {
        "exact_memorization": metrics.exact_memorization(correct),
        "extraction_strength": metrics.extraction_strength(correct),
        "min_k": metrics.min_k(log_prob),
        "min_k_plus_plus": metrics.min_k_plus_plus(log_prob, mean, variance),
    }


def raw_examples(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, name: str, *, max_length: int | None = None
) -> list[Example]:
    """Tokenise plain texts, as :func:`raw_ids` does, as examples with every token but the first labelled."""
    check_tokenizer(tokenizer)
    examples = []
    for row, text in enumerate(texts):
        ids = raw_ids(text, tokenizer)[:max_length]
        if len(ids) < 3:
            raise DataError(f"{name} row {row}: {len(ids)} tokens cannot be scored; give a longer text")
        labels = ids.clone()
        labels[0] = IGNORE
        examples.append(Example(row, ids, labels))
    return examples


def raw_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Tokenise a plain text, without any template: [t]. An end of sequence that the tokenizer adds is not kept."""
    ids = tokenizer(text, add_special_tokens=True)["input_ids"]
    return torch.tensor(ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids, dtype=torch.int64)


def describe_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Describe what two models must share for their results to be compared, and the versions that made them."""
    config = model.config
    return {
        **({} if chat_template_kwargs is None else {"chat_template_kwargs": dict(chat_template_kwargs)}),
        "model": {
            "model_type": config.model_type,
            "layers": getattr(config, "num_hidden_layers", None),
            "hidden": getattr(config, "hidden_size", None),
            "vocabulary": len(head_of(model).weight),
        },
        "tokenizer_vocabulary": len(tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            "palu": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "rouge-score": version("rouge-score"),
        },
    }


def states_and_labels(model: PreTrainedModel, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """Compute the last hidden states [n, d] of the rows that predict a labelled token; return these tokens [n], too."""
    packed = pack(items, share_prefix=shares_prefix(model))
    states = body_of(model)(**packed.to(model.device).inputs()).last_hidden_state[0]
    rows, labels = torch.cat(packed.rows(items)), torch.cat([item.labels for item in items])
    return states.index_select(0, rows.to(model.device)), labels.to(model.device)


def _score_rows(logits: Tensor, labels: Tensor, marginal: Tensor | None) -> Tensor:
    """Compute what TokenScores holds, [n, 4], from logits [n, V]; add the distributions to marginal [V]."""
    log_p = logits.float().log_softmax(-1)
    token = log_p.gather(1, labels[:, None]).squeeze(1)
    correct = log_p.argmax(1) == labels
    p = log_p.exp()
    if marginal is not None:
        marginal += p.sum(0)
    log_p = log_p.clamp(min=-1e4)  # a token ruled out has p = 0, and 0 * inf is no number
    mean = (p * log_p).sum(1)
    variance = (p * (log_p - mean[:, None]).square()).sum(1)
    return torch.stack([token, correct.float(), mean, variance], dim=1)
