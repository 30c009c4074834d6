"""``palu unlearn``: run :func:`palu.unlearn` on files."""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from palu.cli.annotation import Annotate, annotated, check_annotate, write_rows
from palu.cli.device import Device, choose_device
from palu.cli.models import (
    Bits,
    Dtype,
    check_hub,
    check_names,
    import_peft,
    is_adapter,
    load_model,
    load_tokenizer,
    position_limit,
)
from palu.cli.settings import was_given, with_settings
from palu.config import UnlearnConfig
from palu.quiet import hide_progress_bars
from palu.report.layout import (
    ANNOTATED,
    CHECKPOINT_FILES,
    CHECKPOINTS,
    LOCK,
    LOGS,
    MODEL,
    PRIVATE,
    check_free,
    clear_run,
    delete_files,
    files_of_run,
    hold_run,
    mark_of,
)
from palu.writable import check_folder, check_folders

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from palu.data.examples import Examples
    from palu.models.lora import CausalLM

LORA = "LoRA"


@with_settings(
    checkpoint_dir="checkpoints in OUTPUT/private, until the run has finished", logging_dir="logs in OUTPUT/private"
)
def unlearn(
    ctx: typer.Context,
    model: Annotated[str, typer.Option(help="The model: a folder, or a name on the hub.", metavar="DIR_OR_NAME")],
    forget: Annotated[
        Path,
        typer.Option(
            help="What to forget: rows with a secret or spans (JSONL, JSON, CSV, TSV or Parquet).", metavar="FILE"
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for model/ (with its tokenizer and card; it can be published as it is) and private/ "
            "(report.html and the records, which contain the forgotten text).",
            metavar="DIR",
        ),
    ],
    settings: dict[str, Any],
    retain: Annotated[
        str,
        typer.Option(
            help="What to keep: a file of rows, beside the model's own answers to everyday and to similar questions; "
            "auto: these answers alone; none: nothing.",
            metavar="FILE|auto|none",
        ),
    ] = "auto",
    annotate: Annotate = None,
    recipe: Annotated[
        Literal["paper"] | None,
        typer.Option(help="Settings by one word; paper: the published loss. Flags come after it."),
    ] = None,
    eval_rows: Annotated[
        Path | None,
        typer.Option(
            help="Questions to evaluate on before and after, and every --eval-steps steps: rows as palu eval --rows "
            "takes them (JSONL, JSON, CSV, TSV or Parquet).",
            metavar="FILE",
        ),
    ] = None,
    ref_model: Annotated[
        str | None,
        typer.Option(help="The frozen reference, if it is not the model as it is now.", metavar="DIR_OR_NAME"),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The tokenizer, if it is not the model's.", metavar="DIR_OR_NAME")
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Of the weights while they are trained; auto: as they are stored; float16: on a GPU, and only of "
            "weights that an adapter leaves as they are."
        ),
    ] = "auto",
    device: Device = None,
    mixed_precision: Annotated[
        Literal["no", "bf16"] | None,
        typer.Option(help="Products in bfloat16 (bf16), beside float32 weights. [default: as accelerate launch says]"),
    ] = None,
    quantize: Annotated[
        Bits | None,
        typer.Option(
            help="Quantise --model and --ref-model as they are loaded, all but their heads (bitsandbytes); needs "
            "--lora or an adapter."
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Start again where --output holds an earlier run, of which palu's files are deleted."
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print how it came out as one JSON object on stdout, and all else on stderr."),
    ] = False,
    lora: Annotated[
        bool, typer.Option("--lora", help="Train a new LoRA adapter, not the model.", rich_help_panel=LORA)
    ] = False,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapter.", min=1, rich_help_panel=LORA)] = 8,
    lora_alpha: Annotated[float, typer.Option(help="Its scale is alpha / rank.", rich_help_panel=LORA)] = 16,
    lora_dropout: Annotated[
        float, typer.Option(help="Dropout before the adapter.", min=0, max=1, rich_help_panel=LORA)
    ] = 0.0,
    lora_target: Annotated[
        str,
        typer.Option(
            help="The layers that get it: all-linear (of the body), or names with commas between them.",
            rich_help_panel=LORA,
        ),
    ] = "all-linear",
) -> None:
    """Make a model forget the spans of the forget set, and write it to a folder.

    Ctrl-C or SIGTERM ends the step and writes a checkpoint; the same command with --resume goes on from there. For many
    processes: accelerate launch -m palu unlearn ...
    """
    stdout = sys.stdout
    if as_json:
        ctx.with_resource(redirect_stdout(sys.stderr))
    if not lora and (alone := [n for n in ctx.params if n.startswith("lora_") and was_given(ctx, n)]):
        raise ValueError(f"{alone[0]} was given without --lora; add --lora or leave it out")
    check_names(model=model, ref_model=ref_model, tokenizer=tokenizer)
    if quantize is not None and not lora and not is_adapter(model):
        raise ValueError(f"--quantize {quantize}: quantised weights cannot be trained; add --lora, or leave it out")
    if dtype == "float16" and not lora and not is_adapter(model):
        raise ValueError("--dtype float16: gradients and steps underflow; give bfloat16 or float32, or add --lora")
    for option, name in {"--model": model, "--ref-model": ref_model, "--tokenizer": tokenizer}.items():
        if name is None:
            continue
        given = Path(name).expanduser().resolve()
        if given == (output / MODEL).resolve():
            raise ValueError(
                f"--output {output} has {option} as its {MODEL}/, which would be replaced; give another one"
            )
        if given == output.resolve():
            raise ValueError(f"--output {output} is the folder of {option}; give another one")
    if eval_rows is None and settings.get("eval_steps") is not None:
        raise ValueError(f"--eval-steps {settings['eval_steps']}: there is nothing to evaluate; add --eval-rows")
    asked = [] if eval_rows is None else [eval_rows]
    deleted = {path.resolve() for path in files_of_run(output)} if overwrite else set()
    for file in (forget, *([] if retain in ("auto", "none") else [Path(retain)]), *asked):
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
        if file.resolve() in deleted:
            raise ValueError(f"{file} lies in --output {output}, of which --overwrite deletes it; copy it elsewhere")
    check_annotate(annotate)
    if mixed_precision is not None:  # before the first Accelerator, as the launcher does
        os.environ["ACCELERATE_MIXED_PRECISION"] = mixed_precision
    run = Run(output, settings, overwrite)
    folders: dict[str, Any] = {"checkpoint_dir": str(run.checkpoints), "logging_dir": str(run.logs)}
    implied = {"lambda_retain": 0.0} if retain == "none" else {}
    config = UnlearnConfig(**folders).with_recipe(recipe).replace(**implied | settings)
    if os.environ.get("RANK", "0") == "0":  # the process that writes
        run.check()
        check_folder(output, run.subject)
        check_folders(config.folders)
    check_hub(model=model, ref_model=ref_model, tokenizer=tokenizer)

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

    if not config.progress:
        hide_progress_bars()
    if device is not None:
        choose_device(device)
    retain_source: Any = {"auto": None, "none": []}.get(retain, retain)
    # Complaints about the data come before a large model is loaded. What is loaded here is what the run takes.
    tokens = load_tokenizer(tokenizer or model)
    limits = [position_limit(name, config.max_length) for name in (model, ref_model)]
    positions = min([limit for limit in limits if limit is not None], default=None)
    config = config.replace(max_length=positions or config.max_length)
    rendering: dict[str, Any] = {
        "max_length": config.max_length,
        "chat_template_kwargs": config.chat_template_kwargs,
        "warn": True,
    }
    forget_set: Any = None
    if annotate is None:
        cut = config.allow_cut_spans
        forget_set = load_forget(forget, tokens, allow_cut_spans=cut, positions=positions, **rendering)
    if retain_source is not None:
        retain_source = load_retain(retain_source, tokens, **rendering)
        if forget_set is not None:
            check_disjoint(forget_set.hashes, retain_source.hashes)
    evaluate = None
    if eval_rows is not None:
        evaluate = question_metrics(QuestionRows(eval_rows, tokens, config.chat_template_kwargs))
    processes = Accelerator()
    if dtype == "float16" and processes.device.type == "cpu":
        raise ValueError("--dtype float16: the CPU kernels do not support it; give bfloat16 or float32")
    empty = loaded_on_main_alone(processes) and not processes.is_main_process
    trained = load_model(model, dtype, trainable=True, quantize=quantize, empty=empty)
    reference = None if ref_model is None else load_model(ref_model, dtype, quantize=quantize, empty=empty)
    if lora:
        trained = add_lora(trained, config.seed, lora_rank, lora_alpha, lora_dropout, lora_target)

    with raise_on_all_ranks(processes):
        if processes.is_main_process:
            ctx.with_resource(hold_run(output, run.subject))
            run.make_room()
    if annotate is not None:
        forget_set = found_spans(forget, annotate, trained, tokens, config)
    recorder = palu.Recorder(trained, forget_set, retain_source, tokenizer=tokens, config=config)
    try:
        result = palu.unlearn(
            trained,
            reference,
            forget_set,
            retain_source,
            tokenizer=tokens,
            config=config,
            evaluate=evaluate,
            callbacks=[] if config.progress else [LossLines()],
        )
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
        if processes.is_main_process and run.interrupted:
            subject = "--resume in place of --overwrite" if overwrite else "--resume"
            print(f"palu: to go on, give the same command with {subject}", file=sys.stderr)
        raise
    processes.end_training()  # the others need not wait while the main process writes
    if processes.is_main_process:
        arguments = {n: _absolute(n, value) for n, value in ctx.params.items() if n not in config.values()}
        report = palu.save_run(output, result, tokens, recorder, {"arguments": arguments})
        if annotate is not None:
            write_rows(run.private / ANNOTATED, forget_set.source)
        run.finish()
        summary = read_run(run.private)[1]
        print(
            f"{summary['steps']} steps on {summary['forget_examples']} forget and {summary['retain_examples']} retain "
            f"examples in {summary['seconds']:.0f} s; wrote {output / MODEL}, to be looked at in {report}"
        )
        print(last_lines(summary["outcome"]))
        if as_json:
            shown = {name: summary[name] for name in ("steps", "epochs", "ended_by", "seconds", "outcome")}
            shown |= {"verdict": verdict(summary["outcome"]), "model": str(output / MODEL), "report": str(report)}
            print(json.dumps(shown, ensure_ascii=False), file=stdout)


def _absolute(name: str, value: Any) -> Any:
    """Make the file or folder that an option names absolute, so that ``palu audit`` finds it from elsewhere."""
    may_be_folder = name in ("model", "ref_model", "tokenizer") and value is not None and Path(value).exists()
    is_file = isinstance(value, Path) or (name == "retain" and value not in ("auto", "none"))
    return os.path.abspath(value) if may_be_folder or is_file else value


def found_spans(
    forget: Path, how: str, model: CausalLM, tokenizer: PreTrainedTokenizerBase, config: UnlearnConfig
) -> Examples:
    """Find spans on the main process, print them there, and give all processes the same forget set."""
    from accelerate import Accelerator

    from palu.cli.inspect import SHOWN, print_roles, summary_of
    from palu.data.examples import load_forget
    from palu.distributed import compute_on_main
    from palu.models.root import on_device, roomy_device
    from palu.report.token_roles import count_roles, token_roles

    processes = Accelerator()
    template: dict[str, Any] = {"chat_template_kwargs": config.chat_template_kwargs}

    def find() -> list[dict[str, Any]]:
        with on_device(model, roomy_device(model, processes.device)):
            return annotated(forget, how, lambda: model, tokenizer, progress=config.progress, **template)

    found = compute_on_main(find, processes)
    # Spans that max_length cuts off are shown here, and refused by the run.
    loaded = load_forget(found, tokenizer, max_length=config.max_length, allow_cut_spans=True, warn=True, **template)
    if processes.is_main_process:
        roles = token_roles(loaded.examples, tokenizer, config.onset_length)
        numbered = [(example.row, tokens) for example, tokens in zip(loaded.examples, roles, strict=True)]
        print_roles(numbered[:SHOWN], summary_of(loaded, count_roles(roles), config.onset_length, config.max_length))
    return loaded


def add_lora(model: CausalLM, seed: int, rank: int, alpha: float, dropout: float, target: str) -> CausalLM:
    """Add a new LoRA adapter to the model: the same one for the same seed, so that a resumed run starts from it."""
    from accelerate.utils import set_seed

    from palu.models.lora import is_peft

    if is_peft(model):
        raise ValueError("--model holds an adapter already, which is trained as it is; leave --lora out")
    peft = import_peft("--lora adds an adapter")
    set_seed(seed)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target if target == "all-linear" else [name.strip() for name in target.split(",")],
    )
    return peft.get_peft_model(model, config)


class Run:
    """A run's folder, in which nothing is overwritten unless the user asks for it.

    An earlier run in it has finished (there is a summary) or was interrupted (there are checkpoints).

    Raises:
        ValueError: to write there would lose something, or there is nothing to go on from.
    """

    def __init__(self, output: Path, settings: dict[str, Any], overwrite: bool):
        self.output, self.overwrite, self.subject = output, overwrite, f"--output {output}"
        self.private = output / PRIVATE
        self.checkpoints, self.logs = self.private / CHECKPOINTS, self.private / LOGS
        self.own_checkpoints = "checkpoint_dir" not in settings
        self.resume = bool(settings.get("resume"))
        if overwrite and self.resume:
            raise ValueError("--overwrite starts again and --resume goes on; give one of them")

    def check(self) -> None:
        """Raise ValueError where the run may not write to its folder as it is now."""
        check_free(self.output, overwrite=self.overwrite, subject=self.subject, fix="--overwrite")
        # What a run that was killed at its very start leaves counts as nothing.
        if not mark_of(self.output) and any(
            p not in (self.private, self.private / LOCK) for p in self.output.rglob("*")
        ):
            raise ValueError(f"{self.subject} is not empty and holds no run; give another folder")
        if self.interrupted and self.own_checkpoints and not self.resume and not self.overwrite:
            raise ValueError(
                f"{self.subject} holds a run that was interrupted; add --resume to go on with it, "
                "or --overwrite to start again"
            )

    @property
    def interrupted(self) -> bool:
        return any(self.checkpoints.glob("step-*.safetensors"))

    def make_room(self) -> None:
        """Delete an old run that is overwritten, before the first step."""
        self.check()  # while the models were loaded, another run may have come and gone
        if self.overwrite:
            clear_run(self.output)

    def finish(self) -> None:
        """Delete the checkpoints of a run that has been written."""
        if self.own_checkpoints:
            delete_files(self.output, files_of_run(self.output, CHECKPOINT_FILES))
