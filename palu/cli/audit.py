"""``palu audit``: attack an unlearned model with :mod:`palu.attacks`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from palu.cli import options as shared
from palu.cli.models import check_names, choose_device, load_tokenizer, model_loaders
from palu.cli.options import check_files, check_unchanged, option, print_table
from palu.quiet import hide_progress_bars
from palu.settings import template_kwargs
from palu.writable import check_folder, private_folder


def audit(
    ctx: typer.Context,
    model: shared.Name,
    original: shared.Name,
    forget: shared.Forget,
    output: shared.Folder,
    retain_model: shared.OptionalName = None,
    retain: shared.OptionalFile = None,
    run: shared.RunFolder = None,
    quick: Annotated[bool, typer.Option("--quick")] = False,
    only: list[str] | None = None,
    draws: Annotated[int | None, option(min=1)] = None,
    n: int = -1,
    max_new_tokens: Annotated[int | None, option(min=1)] = None,
    seed: int = 0,
    tokenizer: shared.Tokenizer = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = None,
    chat_template_kwargs: shared.TemplateKwargs = None,
    progress: shared.Progress = True,
) -> None:
    """What does an attacker get out of an unlearned model?

    What each attack gave is kept in private/audit/: the same command goes on where it was stopped. In a run's folder,
    the report and the model card are written again, but a card that you have edited is left as it is.

    Args:
        model: The unlearned model: a folder (of an adapter, too), or a name.
        original: The model before unlearning.
        output: A run's folder, or another: audit.json goes to private/ in it.
        retain_model: A model that never saw the forget set, to compare with.
        retain: What was kept, for examples in front and for utility (JSONL, JSON, CSV, TSV or Parquet).
        quick: Fewer draws and hints: minutes on a CPU for a few secrets.
        only: An attack to make (ask, sample, onset-answer, ...), perhaps several times. [default: all]
        draws: Answers sampled for each question. [default: 200; with --quick 16]
        n: The onset length that was unlearned, -1 for whole spans: up to n + 2 true tokens are supplied.
        max_new_tokens: Bound on an answer's length. [default: twice the longest true one, at most 200]
        seed: Of the draws and of the bootstrap.
    """
    template_kwargs(chat_template_kwargs)  # says what is wrong with them
    check_files(forget=forget, retain=retain)
    check_unchanged(ctx, "retain", retain)
    check_folder(output, f"--output {output}")
    check_names(model=model, original=original, retain_model=retain_model, tokenizer=tokenizer)

    from palu.attacks.run import RESULTS, attacks_of, audit_models
    from palu.attacks.secrets import AuditData
    from palu.layout import CARD, MODEL, PRIVATE, RECORD
    from palu.report.reading import read_run
    from palu.report.write import is_edited, write_card, write_report

    if recorded := (output / PRIVATE / RECORD).is_file():
        read_run(output / PRIVATE)  # the report could not be written again
    if not progress:
        hide_progress_bars()
    place = choose_device(device)
    # Complaints about the data come before a large model is loaded.
    data = AuditData(forget, retain, load_tokenizer(tokenizer or model), chat_template_kwargs)
    loaders = model_loaders({"unlearned": model, "original": original, "retain": retain_model}, dtype, place)
    attacks = attacks_of(data, quick=quick, n=n, draws=draws, max_new_tokens=max_new_tokens, seed=seed)
    folder = private_folder(output / PRIVATE)
    replaced = "; an earlier audit is gone" if (folder / RESULTS).is_file() else ""
    results = audit_models(loaders, data, attacks, seed=seed, quick=quick, folder=folder, only=only, progress=progress)
    print_results(results)
    print(f"wrote {folder / RESULTS}, which holds the secrets{replaced}")
    if recorded:
        print(f"wrote {write_report(output)}")
        if is_edited(card := output / MODEL / CARD):
            print(f"{card} was edited and is left as it is; palu.write_card makes it again")
        elif (output / MODEL).is_dir():
            print(f"wrote {write_card(output)}")


def print_results(results: dict[str, Any]) -> None:
    """Print a row for each attack, with its budget, each model's share of secrets told, rho and verdict."""
    from palu.report.audited import MEANING, rows

    roles, left_out = list(results["models"]), results["left_out"]
    print(
        f"{len(results['secrets'])} secrets ({left_out['told_by_their_question']} spans left out that their question "
        f"tells, {left_out['repeated']} that are marked twice); share of them that each attack gets:"
    )
    lines = [
        (row["name"], *(row["shares"].get(role, "") for role in roles), row["rho"], row["verdict"], row["remark"])
        for row in rows(results)
    ]
    print_table(("attack", *roles, "rho (95 %)", "verdict", "budget"), lines)
    print(MEANING)
    for note in results["notes"]:
        print(f"- {note}")
