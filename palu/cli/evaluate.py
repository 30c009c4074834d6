"""``palu eval``: run :mod:`palu.evaluate` on a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from palu.cli.device import Device, choose_device
from palu.cli.models import Bits, Dtype, check_hub, check_names, load_model, load_tokenizer
from palu.cli.settings import TemplateKwargs
from palu.config import template_kwargs
from palu.report.layout import results_folder
from palu.writable import check_file


def evaluate(
    model: Annotated[
        str, typer.Option(help="The model: a folder (of an adapter, too), or a name on the hub.", metavar="DIR_OR_NAME")
    ],
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
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where the results go, in open-unlearning's form; they hold the benchmark's texts. [default: "
            "evaluation-....json, beside the records of the model's run, where palu report finds it, or else in the "
            "model's folder]",
            metavar="FILE",
        ),
    ] = None,
    reference_model: Annotated[
        str | None, typer.Option(help="TOFU: for the reference attack.", metavar="DIR_OR_NAME")
    ] = None,
    fluency_model: Annotated[
        str | None, typer.Option(help="TOFU: classifier of gibberish, for fluency.", metavar="DIR_OR_NAME")
    ] = None,
    language: Annotated[
        str, typer.Option(help="Of the word list for the share of words that are none, such as de; none: leave it out.")
    ] = "en",
    reference_results: Annotated[
        Path | None,
        typer.Option(help="Results of the model before unlearning; what it writes counts as words.", metavar="FILE"),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The tokenizer, if it is not the model's.", metavar="DIR_OR_NAME")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; auto: as they are stored.")] = "auto",
    device: Device = None,
    quantize: Annotated[
        Bits | None, typer.Option(help="Quantise the model as it is loaded, all but its head (bitsandbytes).")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="TOFU: bound on an answer's length. [default: 200]", min=1)
    ] = None,
    chat_template_kwargs: TemplateKwargs = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Has a model forgotten, and what does it still know?"""
    for_tofu = {"fluency_model": fluency_model, "max_new_tokens": max_new_tokens}
    for name, value in {"forget_split": forget_split, "reference_model": reference_model, **for_tofu}.items():
        if benchmark != "tofu" and value is not None:
            raise ValueError(f"--{name.replace('_', '-')} belongs to TOFU; leave it out")
    template_kwargs(chat_template_kwargs)  # says what is wrong with them
    split = forget_split or "forget05"
    check_names(model=model, tokenizer=tokenizer, reference_model=reference_model)
    for name, file in (("retain-results", retain_results), ("reference-results", reference_results)):
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"--{name} {file}: there is no such file")
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"--data {data}: there is no such folder")
    if output is None:
        if not Path(model).is_dir():
            raise ValueError(f"--model {model} is no folder that the results could go to; give --output")
        output = results_folder(model) / f"evaluation-{benchmark}{f'-{split}' * (benchmark == 'tofu')}.json"
    check_file(output, f"--output {output}")
    check_hub(model=model, tokenizer=tokenizer, reference_model=reference_model)

    import palu
    from palu.evaluate.language import WordList

    place: Any = choose_device(device)
    tokens = load_tokenizer(tokenizer or model)
    options: dict[str, Any] = {"retain_results": retain_results, "progress": progress}
    options |= {"language": None if language == "none" else language, "reference_results": reference_results}
    if options["language"] is not None:
        WordList(language)  # complaints come before a model is loaded
    options["chat_template_kwargs"] = chat_template_kwargs
    if benchmark == "tofu":
        palu.evaluate.load_tofu(split, data)  # so do these
        options |= {name: value for name, value in for_tofu.items() if value is not None}
        if reference_model is not None:
            options["reference_model"] = load_model(reference_model, dtype).to(place)
        results = palu.evaluate.tofu(
            load_model(model, dtype, quantize=quantize).to(place), tokens, split, data, **options
        )
    else:
        palu.evaluate.load_muse_news(data)
        results = palu.evaluate.muse_news(
            load_model(model, dtype, quantize=quantize).to(place), tokens, data, **options
        )
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _print(results)
    print(f"wrote {output}")


def _print(results: dict[str, Any]) -> None:
    """Print the aggregates, and for each missing one the reason."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value", "retain model", "reason for none", box=None, pad_edge=False)
    for name, entry in results.items():
        if isinstance(entry, dict) and "agg_value" in entry:
            values = (entry["agg_value"], entry.get("retain_model", {}).get("agg_value"))
            shown = ("" if value is None else f"{value:.4g}" for value in values)
            table.add_row(name, *shown, entry.get("reason", ""))
    Console(highlight=False, markup=False).print(table)
