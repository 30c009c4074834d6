"""Errors that leave the model untouched."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.tiny import forget_rows, retain_rows, same_weights, weights

import palu


def assert_refused(
    model: Any,
    error: type[Exception],
    begins: str,
    *,
    ref_model: Any = None,
    forget: Any = None,
    retain: Any = None,
    **settings: Any,
) -> None:
    """The message begins so; the model's weights and its state are bitwise what they were."""
    before = weights(model)
    training = model.training
    forget = forget_rows() if forget is None else forget
    retain = retain_rows() if retain is None else retain
    with pytest.raises(error) as caught:
        palu.unlearn(
            model, ref_model, forget, retain, **{"epochs": 1, "learning_rate": 0.1, "progress": False} | settings
        )
    assert type(caught.value) is error
    assert str(caught.value).startswith(begins), caught.value
    assert same_weights(model, before)
    assert model.training == training
    assert all(parameter.grad is None for parameter in model.parameters())
