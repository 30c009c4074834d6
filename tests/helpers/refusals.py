"""Calls that would work if nothing were changed in them, and what must be true where one is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from helpers.small_tokenizers import CHATML, byte_level
from helpers.tiny import forget_rows, retain_rows, tiny_llama
from torch import Tensor, nn

import palu

Call = tuple[Callable[..., Any], dict[str, Any]]
Cases = dict[str, tuple[Callable[[], Call], type[Exception], str]]
KEPT = {"question": "Where?", "answer": "In London."}


def unlearn(**changed: Any) -> Call:
    """Tokenised rows, and a model that learns at once."""
    given = {"model": tiny_llama(), "ref_model": None, "forget": forget_rows(), "retain": retain_rows()}
    return palu.unlearn, given | {"epochs": 1, "learning_rate": 0.1, "progress": False} | changed


@functools.cache
def words() -> Any:
    return byte_level(CHATML, bos=False)


def text(*forget: Any, **changed: Any) -> Call:
    """Rows of text: a good one, then these."""
    tokenizer = changed.pop("tokenizer", words())
    model = tiny_llama(vocab_size=len(words()))
    return unlearn(**{"model": model, "forget": [row(), *forget], "retain": [KEPT], "tokenizer": tokenizer} | changed)


def row(**columns: Any) -> dict[str, Any]:
    columns = {"question": "Who?", "answer": "Ada Lovelace did.", "spans": [[0, 12]]} | columns
    return {name: value for name, value in columns.items() if value is not None}


def picture(value: Any) -> Any:
    """All that a call could change in what it was given; equal pictures mean equal bits."""
    if isinstance(value, nn.Module):
        state = [(n, p, p.requires_grad, p.grad is None) for n, p in value.named_parameters()]
        return picture([state, list(value.named_buffers()), [m.training for m in value.modules()]])
    if isinstance(value, Tensor):
        if value.is_meta:
            return value.shape
        value = value.detach().to_dense() if value.is_sparse else value.detach()
        return value.dtype, value.shape, value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, Mapping):
        return {name: picture(part) for name, part in value.items()}
    return [picture(part) for part in value] if isinstance(value, list | tuple) else repr(value)


def refused(build: Callable[[], Call], error: type[Exception]) -> str:
    """Return the message of exactly this error, which the call raises; what it was given is left as it was."""
    function, arguments = build()
    before = picture(arguments)
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error
    assert picture(arguments) == before
    return str(caught.value)


def assert_refused(model: Any, error: type[Exception], begins: str, **changed: Any) -> None:
    """palu.unlearn refuses the model, with a message that begins so."""
    message = refused(lambda: unlearn(model=model, **changed), error)
    assert message.startswith(begins), message
