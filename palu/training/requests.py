"""Requests in sequence: what earlier runs were asked to forget, and whether a model is the one that they left.

A run leaves in its folder the rows of all requests so far (``private/forget.jsonl``, the newest request first), and a
ledger of these requests (``private/ledger.json``, the oldest first): a run that goes on from it needs no other folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palu.config import UnlearnConfig
from palu.data.examples import Examples, load_forget
from palu.data.files import DataError, json_lines
from palu.data.rows import iterate_rows
from palu.layout import FORGET, LEDGER, MODEL, PRIVATE, check_finished
from palu.models.lora import CausalLM
from palu.ref_model.fingerprint import Fingerprints
from palu.ref_model.shared import TokenPair

Request = dict[str, Any]  # an entry of the ledger


@dataclass(frozen=True)
class Earlier:
    """What the run in a folder and those before it were asked to forget."""

    run: Path
    requests: list[Request]  # the oldest first
    rows: list[dict[str, Any]]  # the newest request's first

    def check(self, model: CausalLM, config: UnlearnConfig) -> None:
        """Raise ValueError where the model, without its adapter, is another one, or the settings will not do."""
        if config.method.ends_below is None:
            raise ValueError(
                'after: only local_loss = "unlikelihood" with a probability_floor above 0 tells whether earlier '
                "requests stay forgotten; go on with that"
            )
        if Fingerprints(model, None, [], []).reference != self.requests[-1]["weights_after"]:
            raise ValueError(
                f"after = {os.fspath(self.run)!r}: the model is not the one that this run left, by its fingerprint; "
                f"load {self.run / MODEL}, in the dtype in which it is stored"
            )

    @property
    def shared(self) -> set[TokenPair]:
        """What a secret may begin with that was left alone (:mod:`palu.ref_model.shared`)."""
        # A run before there were any left nothing alone, and its ledger does not say so.
        pairs = (pair for request in self.requests for pair in request.get("shared_beginnings", []))
        return {(before, token) for before, token in pairs}

    def load(self, tokenizer: Any, **settings: Any) -> Examples:
        """Tokenise the rows; the arguments and errors are :func:`palu.data.load_forget`'s."""
        try:
            return load_forget(self.rows, tokenizer, **settings)
        except DataError as error:
            raise DataError(f"earlier requests, in {self.run / PRIVATE / FORGET}: {error}") from None


def read_earlier(run_dir: str | os.PathLike[str]) -> Earlier:
    """Read what a finished run and those before it were asked to forget.

    Raises ValueError where the folder is no run's, the run has not finished or has left an adapter alone, or what it
    left has changed.
    """
    run = Path(run_dir)
    try:
        check_finished(run)
    except ValueError as error:
        raise ValueError(f"after: {error}") from None
    if (run / MODEL / "adapter_config.json").exists():
        raise ValueError(
            f"after: {run / MODEL} is an adapter, whose reference would be its base, which has forgotten nothing; "
            "make that run without --lora, so that its adapter is merged"
        )
    requests, lines = read_requests(run / PRIVATE)
    return Earlier(run, requests, [json.loads(line) for line in lines])


def read_requests(private: Path) -> tuple[list[Request], list[str]]:
    """Read a run's ledger, and the lines of its rows. Raises ValueError where one is missing, or they do not fit."""
    try:
        requests = json.loads((private / LEDGER).read_text(encoding="utf-8"))["requests"]
        lines = (private / FORGET).read_text(encoding="utf-8").split("\n")[:-1]
        first = 0
        for request in reversed(requests):
            own = lines[first : first + request["rows"]]
            first += request["rows"]
            if request["rows_sha256"] != lines_digest(own):
                raise ValueError(f"the rows of request {request['number']} are others")
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing; restore it, or run again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{private / FORGET} and {LEDGER} are not as the run left them ({error}); restore them"
        ) from None
    return requests, lines


def row_lines(forget: Any) -> list[str]:
    """Write a forget set's rows as lines of JSON, which are read as the same rows."""
    return json_lines(columns for _, _, columns in iterate_rows(forget, "forget"))


def lines_digest(lines: Sequence[str]) -> str:
    """Hash lines as ``sha256sum`` does a file of them."""
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
