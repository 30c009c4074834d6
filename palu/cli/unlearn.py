"""``palu unlearn``: run :func:`palu.unlearn` on files."""

from __future__ import annotations

import functools
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from palu import layout
from palu.cli import models
from palu.cli import options as shared
from palu.cli.options import check_files, flag, given_by, option
from palu.cli.settings import with_settings
from palu.config import UnlearnConfig
from palu.quiet import hide_progress_bars
from palu.writable import check_folder, check_folders

if TYPE_CHECKING:
    from palu.models.lora import CausalLM

_lora = functools.partial(typer.Option, rich_help_panel="LoRA")


@with_settings
def unlearn(
    ctx: typer.Context,
    *,
    model: shared.OptionalName = None,
    forget: shared.Forget,
    output: shared.Folder,
    settings: dict[str, Any],
    after: Annotated[Path | None, option("RUN")] = None,
    retain: Annotated[str, option("FILE|auto|none")] = "auto",
    recipe: Literal["paper"] | None = None,
    eval_rows: shared.OptionalFile = None,
    ref_model: shared.OptionalName = None,
    tokenizer: shared.Tokenizer = None,
    dtype: shared.DtypeName = "auto",
    device: shared.Device = None,
    mixed_precision: Literal["no", "bf16"] | None = None,
    quantize: shared.Bits | None = None,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    lora: Annotated[bool, _lora("--lora")] = False,
    lora_alpha: Annotated[float | None, _lora()] = None,
    lora_dropout: Annotated[float, _lora(min=0, max=1)] = 0.0,
    lora_target: Annotated[str, _lora()] = "all-linear",
) -> None:
    """Make a model forget the spans of the forget set, and write it to a folder.

    Ctrl-C or SIGTERM ends the step and writes a checkpoint; the same command with --resume goes on from there. For many
    processes: accelerate launch -m palu unlearn ...

    Args:
        model: The model: a folder, or a name on the hub. [default: that of --after]
        after: The folder of a finished run, from whose model this one goes on; what was forgotten there stays so.
        output: Folder for model/ (with its tokenizer and card; it can be published as it is) and private/ (report.html
            and the records, which contain the forgotten text).
        retain: What to keep: a file of rows, beside the model's own answers to everyday and to similar questions; auto:
            these answers alone; none: nothing.
        recipe: Settings by one word; paper: the published loss. Flags come after it.
        eval_rows: Questions to evaluate on before and after, and every --eval-steps steps: rows as palu eval --rows
            takes them (JSONL, JSON, CSV, TSV or Parquet).
        ref_model: The frozen reference, if it is not the model as it is now.
        dtype: Of the weights while they are trained; auto: as they are stored.
        mixed_precision: Products in bfloat16 (bf16), beside float32 weights. [default: as accelerate launch says]
        quantize: Quantise --model and --ref-model as they are loaded, all but their heads (bitsandbytes); needs --lora
            or an adapter.
        overwrite: Start again where --output holds an earlier run, of which palu's files are deleted.
        as_json: Print how it came out as one JSON object on stdout, and all else on stderr.
        lora: Write the LoRA adapter of --lora-rank, not a model that it is merged into.
        lora_alpha: Its scale is alpha / rank. [default: the rank, as of the adapter that is merged]
        lora_dropout: Dropout before the adapter.
        lora_target: The layers that get it: all-linear (of the body), or names with commas between them.
    """
    stdout = sys.stdout
    if as_json:
        ctx.with_resource(redirect_stdout(sys.stderr))
    if after is not None:
        left = after / layout.MODEL
        if model is not None and Path(model).expanduser().resolve() != left.resolve():
            raise ValueError(f"--model {model} is not the model of --after {after}; leave it out")
        if ref_model is not None:
            raise ValueError(f"--ref-model {ref_model}: with --after the reference is that run's model; leave it out")
        model = str(left)
    if model is None:
        raise ValueError("give --model, or --after and a run's folder to go on from its model")
    own = [n for n in ("lora_alpha", "lora_dropout", "lora_target") if given_by(ctx, n) != "DEFAULT"]
    if own and not lora:
        raise ValueError(f"{flag(own[0])} was given without --lora; add --lora or leave it out")
    if quantize is not None and not lora and not models.is_adapter(model):
        raise ValueError(f"--quantize {quantize}: quantised weights cannot be trained; add --lora, or leave it out")
    if dtype == "float16":
        raise ValueError("--dtype float16: gradients and steps underflow, an adapter's, too; give bfloat16 or float32")
    subject, private = f"--output {output}", output / layout.PRIVATE
    of_model = "--model" if after is None else "the model of --after"
    for given, name in {of_model: model, "--ref-model": ref_model, "--tokenizer": tokenizer}.items():
        folder = None if name is None else Path(name).expanduser().resolve()
        if folder == (output / layout.MODEL).resolve():
            raise ValueError(f"{subject} has {given} as its {layout.MODEL}/, which would be replaced; give another one")
        if folder == output.resolve():
            raise ValueError(f"{subject} is the folder of {given}; give another one")
    if eval_rows is None and settings.get("eval_steps") is not None:
        raise ValueError(f"--eval-steps {settings['eval_steps']}: there is nothing to evaluate; add --eval-rows")
    retain_file = None if retain in ("auto", "none") else Path(retain)
    check_files(forget=forget, retain=retain_file, eval_rows=eval_rows)
    if overwrite and settings.get("resume"):
        raise ValueError("--overwrite starts again and --resume goes on; give one of them")
    deleted = {path.resolve() for path in layout.files_of_run(output)} if overwrite else set()
    for file in (forget, retain_file, eval_rows):
        if file is not None and file.resolve() in deleted:
            raise ValueError(f"{file} lies in {subject}, of which --overwrite deletes it; copy it elsewhere")
    if mixed_precision is not None:  # before the first Accelerator, as the launcher does
        os.environ["ACCELERATE_MIXED_PRECISION"] = mixed_precision
    folders = {"checkpoint_dir": layout.CHECKPOINTS, "logging_dir": layout.LOGS}
    implied: dict[str, Any] = {setting: str(private / name) for setting, name in folders.items()}
    if retain == "none":
        implied["lambda_retain"] = 0.0
    config = UnlearnConfig().replace(recipe, **implied | settings)
    if lora and config.method.lora_rank is None:
        raise ValueError("--lora: this method trains all weights by default; give --lora-rank, too, such as 8")
    if os.environ.get("RANK", "0") == "0":  # the process that writes
        if after is not None:
            layout.check_finished(after)
        check_output(output, overwrite, settings)
        check_folder(output, subject)
        check_folders(config.folders)
    models.check_names(model=model, ref_model=ref_model, tokenizer=tokenizer)

    from accelerate import Accelerator

    import palu
    from palu.data.duplicates import check_disjoint
    from palu.data.examples import load_forget, load_retain
    from palu.distributed import raise_on_all_ranks
    from palu.evaluate.questions import QuestionRows, question_metrics
    from palu.report.reading import read_run
    from palu.report.view import last_lines, verdict
    from palu.training.callbacks import LossLines
    from palu.training.engine import loaded_on_main_alone
    from palu.training.requests import read_earlier

    original = None
    if after is not None:
        there = read_run(after / layout.PRIVATE)[1].get("arguments", {})
        original = there.get("original" if there.get("after") else "model")
    if not config.progress:
        hide_progress_bars()
    if device is not None:
        models.choose_device(device)
    # Complaints about the data come before a large model is loaded. What is loaded here is what the run takes.
    tokens = models.load_tokenizer(tokenizer or model)
    limits = [models.position_limit(name, config.max_length) for name in (model, ref_model)]
    positions = min([limit for limit in limits if limit is not None], default=None)
    config = config.replace(max_length=positions or config.max_length)
    template = {"chat_template_kwargs": config.chat_template_kwargs}
    on_main = os.environ.get("RANK", "0") == "0"  # there are no processes yet
    rendering: dict[str, Any] = {"max_length": config.max_length, "positions": positions, "warn": on_main, **template}
    cut = config.allow_cut_spans
    forget_set = load_forget(forget, tokens, allow_cut_spans=cut, **rendering)
    retain_set: Any = None if retain == "auto" else load_retain(retain_file or [], tokens, **rendering)
    if retain_set is not None:
        check_disjoint(forget_set.hashes, retain_set.hashes)
    if after is not None and on_main:
        earlier_set = read_earlier(after).load(tokens, allow_cut_spans=cut, **rendering)
        if retain_set is not None:
            check_disjoint(earlier_set.hashes, retain_set.hashes, "earlier forget")
    evaluate = None
    if eval_rows is not None:
        evaluate = question_metrics(QuestionRows(eval_rows, tokens, **template))
    processes = Accelerator()
    empty = loaded_on_main_alone(processes) and not processes.is_main_process
    trained = models.load_model(model, dtype, trainable=True, quantize=quantize, empty=empty)
    reference = None if ref_model is None else models.load_model(ref_model, dtype, quantize=quantize, empty=empty)
    if lora:
        trained = add_lora(trained, config.seed, config.method.lora_rank, lora_alpha, lora_dropout, lora_target)

    with raise_on_all_ranks(processes):
        if processes.is_main_process:
            ctx.with_resource(layout.hold_run(output, subject))
            check_output(output, overwrite, settings)  # another run may have come and gone
            if overwrite:
                layout.clear_run(output)
    recorder = palu.Recorder(trained, forget_set, retain_set, tokenizer=tokens, config=config, after=after)
    try:
        result = palu.unlearn(
            trained,
            reference,
            forget_set,
            retain_set,
            tokenizer=tokens,
            config=config,
            after=after,
            evaluate=evaluate,
            callbacks=[] if config.progress else [LossLines()],
        )
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
        if processes.is_main_process and was_interrupted(output):
            way = "--resume in place of --overwrite" if overwrite else "--resume"
            print(f"palu: to go on, give the same command with {way}", file=sys.stderr)
        raise
    processes.end_training()  # the others need not wait while the main process writes
    if processes.is_main_process:
        options = ctx.params | {"model": model, "original": original}
        arguments = {n: _absolute(n, value) for n, value in options.items() if n not in config.values()}
        report = palu.save_run(output, result, tokens, recorder, {"arguments": arguments})
        if "checkpoint_dir" not in settings:
            layout.delete_files(output, layout.files_of_run(output, layout.CHECKPOINT_FILES))
        summary, written = read_run(private)[1], output / layout.MODEL
        print(
            f"{summary['steps']} steps on {summary['forget_examples']} forget and {summary['retain_examples']} retain "
            f"examples in {summary['seconds']:.0f} s; wrote {written}, to be looked at in {report}"
        )
        print(last_lines(summary["outcome"]))
        if as_json:
            shown = {name: summary[name] for name in ("steps", "epochs", "ended_by", "seconds", "outcome")}
            shown |= {"verdict": verdict(summary["outcome"]), "model": str(written), "report": str(report)}
            print(json.dumps(shown, ensure_ascii=False), file=stdout)


def _absolute(name: str, value: Any) -> Any:
    """Make the file or folder that an option names absolute, so that ``palu audit`` finds it from elsewhere."""
    may_be_folder = name in ("model", "ref_model", "tokenizer") and value is not None and Path(value).exists()
    is_file = isinstance(value, Path) or (name == "retain" and value not in ("auto", "none"))
    return os.path.abspath(value) if may_be_folder or is_file else value


def add_lora(model: CausalLM, seed: int, rank: int, alpha: float | None, dropout: float, target: str) -> CausalLM:
    """Add a new LoRA adapter to the model: the same one for the same seed, so that a resumed run starts from it."""
    import peft
    from accelerate.utils import set_seed

    from palu.models.lora import is_peft

    if is_peft(model):
        raise ValueError("--model holds an adapter already, which is trained as it is; leave --lora out")
    set_seed(seed)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=dropout,
        target_modules=target if target == "all-linear" else [name.strip() for name in target.split(",")],
    )
    return peft.get_peft_model(model, config)


def was_interrupted(output: Path) -> bool:
    """Whether this is the folder of a run that left checkpoints, which a finished one deletes."""
    return any((output / layout.PRIVATE / layout.CHECKPOINTS).glob("step-*.safetensors"))


def check_output(output: Path, overwrite: bool, settings: dict[str, Any]) -> None:
    """Raise ValueError where a run with these settings would lose something that its folder holds."""
    subject = f"--output {output}"
    layout.check_free(output, overwrite=overwrite, subject=subject, fix="--overwrite")
    # What a run that was killed at its very start leaves counts as nothing.
    nothing = (output / layout.PRIVATE, output / layout.PRIVATE / layout.LOCK)
    if not layout.mark_of(output) and any(path not in nothing for path in output.rglob("*")):
        raise ValueError(f"{subject} is not empty and holds no run; give another folder")
    goes_on = overwrite or settings.get("resume") or "checkpoint_dir" in settings
    if was_interrupted(output) and not goes_on:
        raise ValueError(
            f"{subject} holds a run that was interrupted; add --resume to go on with it, or --overwrite to start again"
        )
