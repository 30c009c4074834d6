"""``palu eval``: run :mod:`palu.evaluate` on a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from palu.cli.device import Device, choose_device
from palu.cli.models import Bits, Dtype, check_hub, check_names, load_model, load_tokenizer
from palu.cli.options import TemplateKwargs
from palu.quiet import hide_progress_bars
from palu.report.layout import QUESTIONS, results_folder
from palu.settings import template_kwargs
from palu.writable import check_file

if TYPE_CHECKING:
    from palu.models.lora import CausalLM


OWN = "Your own questions"
SHOWN = 20  # rows of them that are printed


def evaluate(
    model: Annotated[
        str, typer.Option(help="The model: a folder (of an adapter, too), or a name on the hub.", metavar="DIR_OR_NAME")
    ],
    rows: Annotated[
        Path | None,
        typer.Option(
            help="Questions in place of a benchmark: rows with the true answer, perhaps a secret or spans, and kind "
            "(forget or retain) (JSONL, JSON, CSV, TSV or Parquet).",
            metavar="FILE",
            rich_help_panel=OWN,
        ),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(help="The model before unlearning, beside it.", metavar="DIR_OR_NAME", rich_help_panel=OWN),
    ] = None,
    retain_model: Annotated[
        str | None,
        typer.Option(
            help="A model that never saw the forget set, beside it.", metavar="DIR_OR_NAME", rich_help_panel=OWN
        ),
    ] = None,
    benchmark: Annotated[
        Literal["tofu", "muse-news"] | None, typer.Option(help="The benchmark. [default: tofu]")
    ] = None,
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
        str, typer.Option(help="Of the word list for the share of broken words, such as de; none: leave it out.")
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
        int | None,
        typer.Option(
            help="TOFU and --rows: bound on an answer's length. [default: 200; with --rows twice the longest true "
            "answer, at most 200]",
            min=1,
        ),
    ] = None,
    chat_template_kwargs: TemplateKwargs = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Has a model forgotten, and what does it still know?"""
    if rows is not None:
        benchmarks: dict[str, Any] = {"benchmark": benchmark, "forget_split": forget_split, "data": data}
        benchmarks |= {"retain_results": retain_results, "reference_model": reference_model}
        for name, value in (benchmarks | {"fluency_model": fluency_model}).items():
            if value is not None:
                raise ValueError(f"--{name.replace('_', '-')} belongs to a benchmark; leave it out, or --rows")
        names = {"model": model, "original": original, "retain_model": retain_model}
        _evaluate_rows(
            rows,
            {name: value for name, value in names.items() if value is not None},
            output,
            tokenizer,
            dtype,
            device,
            quantize,
            max_new_tokens,
            chat_template_kwargs,
            progress,
        )
        return
    for name, value in {"original": original, "retain_model": retain_model}.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} stands beside a model on --rows; give them, or leave it out")
    benchmark = benchmark or "tofu"
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
    output = _output(output, model, f"evaluation-{benchmark}{f'-{split}' * (benchmark == 'tofu')}.json")
    check_hub(model=model, tokenizer=tokenizer, reference_model=reference_model)

    import palu
    from palu.evaluate.language import WordList

    if not progress:
        hide_progress_bars()
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


def _output(output: Path | None, model: str, name: str) -> Path:
    """Return where the results go, a file that can be written."""
    if output is None:
        if not Path(model).is_dir():
            raise ValueError(f"--model {model} is no folder that the results could go to; give --output")
        output = results_folder(model) / name
    check_file(output, f"--output {output}")
    return output


def _evaluate_rows(
    rows: Path,
    names: dict[str, str],
    output: Path | None,
    tokenizer: str | None,
    dtype: Dtype,
    device: str | None,
    quantize: Bits | None,
    max_new_tokens: int | None,
    chat_template_kwargs: Any,
    progress: bool,
) -> None:
    """Evaluate the models (by "model", "original", "retain_model") on the user's own questions."""
    template_kwargs(chat_template_kwargs)  # says what is wrong with them
    check_names(tokenizer=tokenizer, **names)
    if not rows.is_file():
        raise FileNotFoundError(f"--rows {rows}: there is no such file")
    output = _output(output, names["model"], QUESTIONS)
    check_hub(tokenizer=tokenizer, **names)

    from palu.evaluate.questions import QuestionRows, evaluate_models

    if not progress:
        hide_progress_bars()
    place: Any = choose_device(device)
    # Complaints about the data come before a large model is loaded.
    asked = QuestionRows(rows, load_tokenizer(tokenizer or names["model"]), chat_template_kwargs)

    def loader(name: str) -> Callable[[], CausalLM]:
        return lambda: load_model(name, dtype, quantize=quantize).to(place)

    loaders = {role: loader(name) for role, name in names.items()}
    results = evaluate_models(loaders, asked, max_new_tokens=max_new_tokens, progress=progress)
    output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _print_rows(results)
    print(f"wrote {output}, which holds your questions and what was answered")


def _print_rows(results: dict[str, Any]) -> None:
    """Print each row's figures, model by model, and their means."""
    from rich.console import Console
    from rich.table import Table

    from palu.evaluate.questions import table_of

    found = table_of(results)
    columns = ("told", "probability", "ROUGE-L", "extraction")
    table = Table("row", "kind", "question", *columns, box=None, pad_edge=False)
    for row in found["rows"][:SHOWN]:
        question = " ".join(row["question"].split())
        question = question if len(question) <= 40 else f"{question[:39]}…"
        table.add_row(str(row["number"]), row["kind"], question, *row["cells"])
    for mean in found["means"]:
        table.add_row("mean", mean["kind"], f"{mean['count']} rows", *mean["cells"])
    console = Console(highlight=False, markup=False)
    if len(found["models"]) > 1:
        console.print(" / ".join(found["models"]))
    console.print(table)
    if len(found["rows"]) > SHOWN:
        console.print(f"{len(found['rows']) - SHOWN} more rows are in the file")


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
