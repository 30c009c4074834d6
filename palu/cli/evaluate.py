"""``palu eval``: :mod:`palu.evaluate` on a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from palu.cli.models import Dtype, check_name, load_model, load_tokenizer


def evaluate(
    model: Annotated[
        str, typer.Option(help="The model: a folder (of an adapter, too), or a name on the hub.", metavar="DIR_OR_NAME")
    ],
    output: Annotated[Path, typer.Option(help="Where the results go, as open-unlearning's JSON.", metavar="FILE")],
    benchmark: Annotated[Literal["tofu", "muse-news"], typer.Option(help="The benchmark.")] = "tofu",
    forget_split: Annotated[
        str | None, typer.Option(help="TOFU: the split that was to be forgotten. [default: forget05]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="The benchmark's folder; without it, its public name is loaded.", metavar="DIR"),
    ] = None,
    retain_results: Annotated[
        Path | None,
        typer.Option(help="Results of the model that never saw the forget set (.json, .json.gz).", metavar="FILE"),
    ] = None,
    reference_model: Annotated[
        str | None, typer.Option(help="TOFU: for the reference attack.", metavar="DIR_OR_NAME")
    ] = None,
    fluency_model: Annotated[
        str | None, typer.Option(help="TOFU: classifier of gibberish, for fluency.", metavar="DIR_OR_NAME")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The tokenizer, if it is not the model's.", metavar="DIR_OR_NAME")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; auto: as they are stored.")] = "auto",
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Has a model forgotten, and what does it still know?"""
    only_tofu = {"forget_split": forget_split, "reference_model": reference_model, "fluency_model": fluency_model}
    for name, value in only_tofu.items():
        if benchmark != "tofu" and value is not None:
            raise ValueError(f"--{name.replace('_', '-')} belongs to TOFU; leave it out")
    for option, name_or_none in {
        "--model": model,
        "--tokenizer": tokenizer,
        "--reference-model": reference_model,
    }.items():
        if name_or_none is not None:
            check_name(name_or_none, option)
    if retain_results is not None and not retain_results.is_file():
        raise FileNotFoundError(f"--retain-results {retain_results}: there is no such file")
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"--data {data}: there is no such folder")
    if not output.resolve().parent.is_dir():
        raise FileNotFoundError(f"--output {output}: there is no folder {output.parent}")

    from accelerate import PartialState

    import palu

    device = PartialState().device
    tokens = load_tokenizer(tokenizer or model)
    options: dict[str, Any] = {"retain_results": retain_results, "progress": progress}
    if benchmark == "tofu":
        palu.evaluate.load_tofu(forget_split or "forget05", data)  # complaints come before a model is loaded
        reference = None if reference_model is None else load_model(reference_model, dtype).to(device)
        results = palu.evaluate.tofu(
            load_model(model, dtype).to(device),
            tokens,
            forget_split or "forget05",
            data,
            reference_model=reference,
            fluency_model=fluency_model,
            **options,
        )
    else:
        results = palu.evaluate.muse_news(load_model(model, dtype).to(device), tokens, data, **options)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _print(results)
    print(f"wrote {output}")


def _print(results: dict[str, Any]) -> None:
    """The aggregates, or why there is none."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value", "reason for none", box=None, pad_edge=False)
    for name, entry in results.items():
        if isinstance(entry, dict) and "agg_value" in entry:
            value = entry["agg_value"]
            table.add_row(name, "" if value is None else f"{value:.4g}", entry.get("reason", ""))
    Console(highlight=False, markup=False).print(table)
