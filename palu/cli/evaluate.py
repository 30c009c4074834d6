"""``palu eval``: run :mod:`palu.evaluate` on a model."""

from __future__ import annotations

import functools
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from palu.cli import options as shared
from palu.cli.models import base_name, check_names, choose_device, is_adapter, load_tokenizer, model_loaders
from palu.cli.options import (
    NAME,
    check_files,
    check_output_file,
    check_unchanged,
    flag,
    given_by,
    option,
    print_table,
)
from palu.layout import MODEL, PRIVATE, QUESTIONS
from palu.quiet import hide_progress_bars
from palu.settings import template_kwargs
from palu.writable import check_folder, write_private

if TYPE_CHECKING:
    from palu.evaluate.questions import QuestionRows

_own = functools.partial(option, rich_help_panel="Your own questions")
SHOWN = 20  # rows of them that are printed
FOR_TOFU = ("forget_split", "max_new_tokens")
FOR_BENCHMARKS = ("benchmark", "data", "retain_results", "forget_split")
FOR_A_MODEL = ("original", "retain_model", "retain_results", "output", "language", "dtype", "device", "quantize")


def evaluate(
    ctx: typer.Context,
    model: shared.Name,
    run: shared.RunFolder = None,
    rows: Annotated[list[Path] | None, _own("FILE")] = None,
    original: Annotated[str | None, _own(NAME)] = None,
    retain_model: Annotated[str | None, _own(NAME)] = None,
    benchmark: Literal["tofu", "muse-news", "muse-books"] | None = None,
    forget_split: str | None = None,
    data: Annotated[Path | None, option("DIR")] = None,
    retain_results: shared.OptionalFile = None,
    output: shared.OptionalFile = None,
    write_lm_eval: Annotated[Path | None, option("DIR")] = None,
    language: str = "en",
    tokenizer: shared.Tokenizer = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = None,
    quantize: shared.Bits | None = None,
    max_new_tokens: Annotated[int | None, option(min=1)] = None,
    chat_template_kwargs: shared.TemplateKwargs = None,
    progress: shared.Progress = True,
) -> None:
    """Has a model forgotten, and what does it still know?

    Args:
        model: The model: a folder (of an adapter, too), or a name on the hub.
        rows: Questions in place of a benchmark: rows with the true answer, perhaps a secret or spans, and kind (forget
            or retain) (JSONL, JSON, CSV, TSV or Parquet); perhaps several times.
        original: The model before unlearning, beside it.
        retain_model: A model that never saw the forget set, beside it.
        benchmark: The benchmark. [default: tofu]
        forget_split: TOFU: the split that was to be forgotten. [default: forget05]
        data: The benchmark's folder; without it, its public name is loaded.
        retain_results: Results of the model that never saw the forget set (.json, .json.gz).
        output: Where the results go, in open-unlearning's form; they hold the benchmark's texts. [default:
            evaluation-....json, beside the records of the model's run, where palu report finds it, or else in the
            model's folder]
        write_lm_eval: Evaluate nothing; write the questions, or TOFU's truth ratios, to this new folder as tasks for
            lm-eval (EleutherAI's lm-evaluation-harness). It holds the secrets.
        language: Of the word list for the share of broken words, such as de; none: leave it out.
        quantize: Quantise the model as it is loaded, all but its head (bitsandbytes).
        max_new_tokens: TOFU and --rows: bound on an answer's length. [default: 200; with --rows twice the longest true
            answer, at most 200]
    """
    of_benchmark = any(given_by(ctx, name) == "COMMANDLINE" for name in FOR_BENCHMARKS)
    if of_benchmark and given_by(ctx, "rows") == "DEFAULT_MAP":
        rows = None  # of a run, which are asked where nothing of a benchmark is given
    if rows:
        _refuse(ctx, FOR_BENCHMARKS, "belongs to a benchmark; leave it out, or --rows")
    else:
        _refuse(ctx, ("original", "retain_model"), "stands beside a model on --rows; give them, or leave it out")
    corpus = None if benchmark in (None, "tofu") else benchmark.removeprefix("muse-")  # of MUSE
    if corpus:
        _refuse(ctx, FOR_TOFU, "belongs to TOFU; leave it out")
    template_kwargs(chat_template_kwargs)  # says what is wrong with them
    for file in rows or []:
        check_files(rows=file)
    check_unchanged(ctx, "rows", *(rows or []))
    check_files(retain_results=retain_results)
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"--data {data}: there is no such folder")
    split = forget_split or "forget05"
    if write_lm_eval is not None:
        _refuse(ctx, FOR_A_MODEL, "belongs to an evaluation, and --write-lm-eval makes none; leave it out")
        if not rows:
            _refuse(ctx, ("max_new_tokens",), "bounds answers, and the tasks of TOFU generate none; leave it out")
        if corpus:
            raise ValueError("--write-lm-eval has no tasks for MUSE; give --rows or --benchmark tofu")
        check_names(model=model, tokenizer=tokenizer)
        check_folder(write_lm_eval, subject := f"--write-lm-eval {write_lm_eval}")
        if write_lm_eval.is_dir() and any(write_lm_eval.iterdir()):
            raise ValueError(f"{subject} is not empty; give a new folder")

        from palu.evaluate import harness, load_tofu

        tokens = load_tokenizer(tokenizer or model)
        if rows:
            asked = _question_rows(rows, tokens, chat_template_kwargs)
            for one in harness.write_question_tasks(asked, write_lm_eval, max_new_tokens=max_new_tokens):
                print(f"left out {one}")
        else:
            sets = load_tofu(split, data)
            harness.write_tofu_tasks(sets, tokens, write_lm_eval, chat_template_kwargs=chat_template_kwargs)
        _print_tasks(write_lm_eval, model, tokenizer, "palu_questions" if rows else "palu_tofu")
        return
    models = {"model": model} | ({"original": original, "retain_model": retain_model} if rows else {})
    check_names(**models, tokenizer=tokenizer)
    if output is None:
        folder = Path(model).expanduser().resolve()  # "." and a link have another name
        if not folder.is_dir():
            raise ValueError(f"--model {model} is no folder that the results could go to; give --output")
        if folder.name == MODEL and (folder.parent / PRIVATE).is_dir():
            folder = folder.parent / PRIVATE  # the records of its run
        name = f"evaluation-{benchmark}.json" if corpus else f"evaluation-tofu-{split}.json"
        output = folder / (QUESTIONS if rows else name)
    check_output_file("output", output, rows=rows, retain_results=retain_results)

    from palu import evaluate as evaluations
    from palu.evaluate.language import WordList
    from palu.evaluate.questions import evaluate_models

    if not progress:
        hide_progress_bars()
    place = choose_device(device)
    loaders = model_loaders(models, dtype, place, quantize)
    tokens = load_tokenizer(tokenizer or model)
    # Complaints about the data come before a large model is loaded.
    if rows:
        asked = _question_rows(rows, tokens, chat_template_kwargs)
        results = evaluate_models(loaders, asked, max_new_tokens=max_new_tokens, progress=progress)
    else:
        options: dict[str, Any] = {
            "retain_results": retain_results,
            "language": None if language == "none" else language,
            "chat_template_kwargs": chat_template_kwargs,
            "progress": progress,
        }
        if language != "none":
            WordList(language)
        if corpus:
            evaluations.load_muse(corpus, data)
            results = evaluations.muse(loaders["model"](), tokens, corpus, data, **options)
        else:
            evaluations.load_tofu(split, data)
            options |= {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
            results = evaluations.tofu(loaders["model"](), tokens, split, data, **options)
    replaced = "; an earlier file of this name is gone" if output.is_file() else ""
    write_private(output, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if rows:
        _print_rows(results)
        print(f"wrote {output}, which holds your questions and what was answered{replaced}")
    else:
        _print_metrics(results)
        print(f"wrote {output}{replaced}")


def _refuse(ctx: typer.Context, options: tuple[str, ...], why: str) -> None:
    """Raise ValueError where one of these options was given."""
    for name in options:
        if given_by(ctx, name) == "COMMANDLINE":
            raise ValueError(f"{flag(name)} {why}")


def _question_rows(files: list[Path], tokenizer: Any, chat_template_kwargs: Any) -> QuestionRows:
    """Read and tokenise the questions of all files."""
    from palu.data.rows import iterate_rows
    from palu.evaluate.questions import QuestionRows

    # A single file is read by QuestionRows itself, whose complaints name it.
    read = files[0] if len(files) == 1 else [row for file in files for *_, row in iterate_rows(file, "evaluation")]
    return QuestionRows(read, tokenizer, chat_template_kwargs)


def _print_tasks(folder: Path, model: str, tokenizer: str | None, tag: str) -> None:
    """Print where the tasks of lm-eval are, and how to run them."""
    names = {"pretrained": model}
    if is_adapter(model):
        names = {"pretrained": str(base_name(model)), "peft": model, "tokenizer": model}
    if tokenizer is not None:
        names["tokenizer"] = tokenizer
    settings = names | {"add_bos_token": "False", "softmax_dtype": "float32"}
    arguments = ",".join(f"{name}={value}" for name, value in settings.items())
    command = ["lm_eval", "run", "--model", "hf", "--model_args", arguments]
    print(f"wrote {folder}, which holds the questions and the secrets; run its tasks without --apply_chat_template:")
    print(shlex.join([*command, "--include_path", str(folder), "--tasks", tag]))


def _print_rows(results: dict[str, Any]) -> None:
    """Print each row's figures, model by model, and their means."""
    from palu.evaluate.questions import table_of

    found = table_of(results)
    lines = []
    for row in found["rows"][:SHOWN]:
        question = " ".join(row["question"].split())
        question = question if len(question) <= 40 else f"{question[:39]}…"
        lines.append((str(row["number"]), row["kind"], question, *row["cells"]))
    lines += [("mean", mean["kind"], f"{mean['count']} rows", *mean["cells"]) for mean in found["means"]]
    if len(found["models"]) > 1:
        print(" / ".join(found["models"]))
    print_table(("row", "kind", "question", "told", "probability", "ROUGE-L", "extraction"), lines)
    if len(found["rows"]) > SHOWN:
        print(f"{len(found['rows']) - SHOWN} more rows are in the file")


def _print_metrics(results: dict[str, Any]) -> None:
    """Print each metric's aggregate, that of the retain model, and why there is none."""
    lines = []
    for name, entry in results.items():
        if isinstance(entry, dict) and "agg_value" in entry:
            values = (entry["agg_value"], entry.get("retain_model", {}).get("agg_value"))
            lines.append((name, *("" if v is None else f"{v:.4g}" for v in values), entry.get("reason", "")))
    print_table(("metric", "value", "retain model", "reason for none"), lines)
