"""``palu eval``: run :mod:`palu.evaluate` on a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from palu.cli.device import Device, choose_device
from palu.cli.models import Bits, Dtype, check_hub, check_names, load_model, load_tokenizer, model_loaders
from palu.cli.options import RunFolder, TemplateKwargs, Tokenizer, check_files, flag, of_run
from palu.quiet import hide_progress_bars
from palu.report.layout import QUESTIONS, results_folder
from palu.settings import template_kwargs
from palu.writable import check_file

OWN = "Your own questions"
SHOWN = 20  # rows of them that are printed


def evaluate(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Option(help="The model: a folder (of an adapter, too), or a name on the hub.", metavar="DIR_OR_NAME")
    ],
    run: RunFolder = None,
    rows: Annotated[
        list[Path] | None,
        typer.Option(
            help="Questions in place of a benchmark: rows with the true answer, perhaps a secret or spans, and kind "
            "(forget or retain) (JSONL, JSON, CSV, TSV or Parquet); perhaps several times.",
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
    tokenizer: Tokenizer = None,
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
    for_tofu = {"fluency_model": fluency_model, "max_new_tokens": max_new_tokens}
    if benchmark is not None and run is not None:  # its rows are asked where no benchmark is named
        rows = None if of_run(ctx, "rows") else rows
        original = None if of_run(ctx, "original") else original
    if rows:
        of_benchmarks: dict[str, Any] = {"benchmark": benchmark, "forget_split": forget_split, "data": data}
        of_benchmarks |= {"retain_results": retain_results, "reference_results": reference_results}
        of_benchmarks |= {"reference_model": reference_model, "fluency_model": fluency_model}
        _refuse(of_benchmarks, "belongs to a benchmark; leave it out, or --rows")
    else:
        beside = {"original": original, "retain_model": retain_model}
        _refuse(beside, "stands beside a model on --rows; give them, or leave it out")
    if benchmark == "muse-news":
        others = {"forget_split": forget_split, "reference_model": reference_model, **for_tofu}
        _refuse(others, "belongs to TOFU; leave it out")
    template_kwargs(chat_template_kwargs)  # says what is wrong with them
    models = {"model": model, "original": original, "retain_model": retain_model}
    names = models | {"reference_model": reference_model, "tokenizer": tokenizer}
    check_names(**names)
    for file in rows or []:
        check_files(rows=file)
    check_files(retain_results=retain_results, reference_results=reference_results)
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"--data {data}: there is no such folder")
    split = forget_split or "forget05"
    of_benchmark = f"evaluation-{benchmark}.json" if benchmark == "muse-news" else f"evaluation-tofu-{split}.json"
    output = _output(output, model, QUESTIONS if rows else of_benchmark)
    check_hub(**names)

    from palu import evaluate as evaluations
    from palu.data.rows import iterate_rows
    from palu.evaluate.language import WordList
    from palu.evaluate.questions import QuestionRows, evaluate_models

    if not progress:
        hide_progress_bars()
    place: Any = choose_device(device)
    loaders = model_loaders(models, dtype, place, quantize)
    tokens = load_tokenizer(tokenizer or model)
    # Complaints about the data come before a large model is loaded.
    if rows:
        # A single file is read by QuestionRows itself, whose complaints name it.
        read = rows[0] if len(rows) == 1 else [row for file in rows for *_, row in iterate_rows(file, "evaluation")]
        asked = QuestionRows(read, tokens, chat_template_kwargs)
        results = evaluate_models(loaders, asked, max_new_tokens=max_new_tokens, progress=progress)
    else:
        options: dict[str, Any] = {"retain_results": retain_results, "progress": progress}
        options |= {"language": None if language == "none" else language, "reference_results": reference_results}
        options["chat_template_kwargs"] = chat_template_kwargs
        if options["language"] is not None:
            WordList(language)
        if benchmark == "muse-news":
            evaluations.load_muse_news(data)
            results = evaluations.muse_news(loaders["model"](), tokens, data, **options)
        else:
            evaluations.load_tofu(split, data)
            options |= {name: value for name, value in for_tofu.items() if value is not None}
            if reference_model is not None:
                options["reference_model"] = load_model(reference_model, dtype).to(place)
            results = evaluations.tofu(loaders["model"](), tokens, split, data, **options)
    output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if rows:
        _print_rows(results)
        print(f"wrote {output}, which holds your questions and what was answered")
    else:
        _print(results)
        print(f"wrote {output}")


def _refuse(options: Mapping[str, Any], why: str) -> None:
    """Raise ValueError where one of these options is given."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{flag(name)} {why}")


def _output(output: Path | None, model: str, name: str) -> Path:
    """Return where the results go, a file that can be written."""
    if output is None:
        if not Path(model).is_dir():
            raise ValueError(f"--model {model} is no folder that the results could go to; give --output")
        output = results_folder(model) / name
    check_file(output, f"--output {output}")
    return output


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
