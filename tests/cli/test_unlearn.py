"""``palu unlearn``: what it trains, how it is interrupted and resumed, and what stands in its folder."""

from __future__ import annotations

import importlib.util
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers.command import done, palu_command, read, read_rows, refusal, short_run, write_input, write_rows
from helpers.logits import WatchLogits
from helpers.planted import FORGET, RETAIN
from helpers.runs import TEXT_FORGET, TEXT_RETAIN
from helpers.small_tokenizers import CHATML, DATED, LLAMA3, byte_level
from helpers.tiny import same_weights, tiny_llama, weights
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import Result

import palu
from palu.data.rows import Renderer
from palu.evaluate import scores
from palu.methods.palu import RECIPES, PaluMethod
from palu.ref_model.anchors import anchor_texts
from palu.report.recorder import GENERAL

STEPS = 6
LOGGED = ("loss", "local", "kl", "retain", "onset_probability")
LONG = {"question": "Who?", "answer": "The cat sat. " * 40 + "Ada Lovelace.", "spans": [[520, 532]]}


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


def summary_of(out: Path) -> Any:
    return read(out / "private" / "summary.json")


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A run of six steps: what it printed, and its folder, which is only to be read."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return done(*short_run(folder, out)), out


def test_unlearn(folder: Path, whole: tuple[Result, Path], arguments: list[Any]) -> None:
    """As through palu.unlearn."""
    result, out = whole
    private = out / "private"
    told = rf"^6 steps on 6 forget and 6 retain examples in \d+ s; wrote {out}/model, to be looked at in "
    assert re.search(rf"{told}{private}/report.html$", result.stdout, re.MULTILINE)
    assert (private / "report.html").exists()
    assert "library_name: transformers" in (out / "model" / "README.md").read_text()
    settings = {"batch_size": 2, "epochs": 2, "learning_rate": 0.01, "progress": False}
    settings |= dict.fromkeys(("anchors", "neighbours", "variants"), 0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ours = palu.unlearn(load(folder / "model"), None, FORGET, RETAIN, tokenizer=tokenizer, **settings)
    assert same_weights(load(out / "model"), weights(ours.model))
    assert AutoTokenizer.from_pretrained(out / "model").chat_template == CHATML
    history = read_rows(private / "history.jsonl")
    assert [record["loss"] for record in history] == [record["loss"] for record in ours.history]
    # Without a progress bar there are lines of losses.
    terms = [", ".join(f"{name} {one[name]:.3g}" for name in LOGGED) for one in history]
    assert result.stdout.splitlines()[:STEPS] == [f"step {i} of {STEPS}: {line}" for i, line in enumerate(terms, 1)]
    summary = summary_of(out)
    assert summary["steps"] == STEPS
    folders = {"checkpoint_dir": str(private / "checkpoints"), "logging_dir": str(private / "logs")}
    assert summary["config"] == ours.summary["config"] | folders
    assert summary["arguments"]["forget"] == str(folder / "forget.jsonl")
    assert not (private / "checkpoints").exists(), "they have nothing more to give"

    arguments += ["--output", out]
    again = refusal(palu_command(*arguments))
    assert again == f"--output {out} holds a run that has finished; give another folder, or --overwrite to replace it"
    assert refusal(palu_command(*arguments, "--resume")) == again
    absent = out / "absent.jsonl"
    assert str(absent) in refusal(palu_command(*arguments, "--forget", absent, "--overwrite"))
    assert summary_of(out) == summary, "a run that never began replaces nothing"


def test_nothing_to_retain(folder: Path, out: Path, arguments: list[Any]) -> None:
    """--retain none implies the weight that it needs; the reference, the tokenizer and the dtype can be given."""
    options = ["--ref-model", folder / "model", "--tokenizer", folder / "model", "--dtype", "bfloat16"]
    arguments += ["--retain", "none", "--epochs", 1, "--anchors", "none"]
    told = "the retain set is empty while lambda_retain = 1.0; give examples to keep, or set lambda_retain=0"
    assert refusal(palu_command(*arguments, "--lambda-retain", 1)) == told
    done(*arguments, *options)
    summary = summary_of(out)
    assert (summary["config"]["lambda_retain"], summary["retain_examples"], summary["anchors"]) == (0, 0, 0)
    assert load(out / "model").dtype == torch.bfloat16


def test_spans_that_max_length_cuts_off(folder: Path, arguments: list[Any], out: Path, tmp_path: Path) -> None:
    forget = write_rows(tmp_path / "long.jsonl", [*FORGET, LONG])
    said = refusal(palu_command(*arguments, "--forget", forget, "--max-length", 80))
    told = re.fullmatch(
        r"forget set: max_length = 80 cuts off spans of 1 row \(6\), .*set max_length = (\d+), .*", said
    )
    assert told, said
    assert not out.exists()
    asked = ["inspect", "--model", folder / "model", "--forget", forget, "--max-length"]
    line = (
        f"7 rows (0 without a span, 0 skipped); max_length = 80 cuts off spans of 1 row, {told[1]} would cut off none"
    )
    assert f"{line};" in done(*asked, 80).stdout
    assert "7 rows (0 without a span, 0 skipped); tokens at" in done(*asked, told[1]).stdout
    done(*arguments, "--forget", forget, "--max-length", 80, "--allow-cut-spans")
    summary = summary_of(out)
    assert (summary["forget_spans_cut"], summary["forget_without_span"], summary["forget_examples"]) == (1, 0, 7)


def test_a_model_of_few_positions(arguments: list[Any], out: Path, tmp_path: Path) -> None:
    """max_length is clamped to them before the rows are read: for the run, and for what is shown of it."""
    tokenizer, gpt2 = byte_level(CHATML, bos=False), tmp_path / "gpt2"
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None, **sizes)
    GPT2LMHeadModel(config).save_pretrained(gpt2)
    tokenizer.save_pretrained(gpt2)
    row = {"question": "Who?", "answer": "Ada Lovelace did." + " The cat sat." * 40, "spans": [[0, 12]]}
    forget = write_rows(tmp_path / "long.jsonl", [row])
    done(*arguments, "--model", gpt2, "--forget", forget, "--lora", "--lora-target", "c_attn")
    assert summary_of(out)["config"]["max_length"] == 64

    write_rows(forget, [row, LONG])
    for model in (gpt2, out / "model"):
        given = ["--model", model, "--forget", forget]
        said = refusal(palu_command(*arguments, *given, "--output", tmp_path / "new"))
        assert "(1), which would not be forgotten; the model has 64 positions, so shorten the rows, or allow" in said
        assert "; max_length = 64 cuts off spans of 1 row, " in done("inspect", *given).stdout
    assert not (tmp_path / "new").exists()


def test_values_for_the_chat_template(
    folder: Path, arguments: list[Any], tofu: list[Any], out: Path, tmp_path: Path
) -> None:
    """As JSON text, or as a mapping in a file; for every command that renders texts."""
    byte_level(DATED, bos=False).save_pretrained(tmp_path / "dated")
    dated, value = ["--tokenizer", tmp_path / "dated"], '{"date_string": "26 Jul 2024"}'
    unlearn = [*arguments, *dated, "--epochs", 1]
    done(*unlearn, "--chat-template-kwargs", value)
    config = summary_of(out)["config"]
    assert config["chat_template_kwargs"] == {"date_string": "26 Jul 2024"}
    assert f"| `chat_template_kwargs` | {value} | none |" in (out / "model" / "README.md").read_text(encoding="utf-8")
    file = tmp_path / "run.yaml"
    file.write_text("chat_template_kwargs:\n  date_string: 26 Jul 2024\n")
    done(*unlearn, "--config", file, "--overwrite")
    assert summary_of(out)["config"] == config

    html = tmp_path / "roles.html"
    inspect = ["inspect", *dated, "--forget", folder / "forget.jsonl", "--html", html]
    done(*inspect, "--chat-template-kwargs", value)
    assert "26 Jul 2024" in html.read_text(encoding="utf-8").replace("</span>", "").replace("|", "")
    evaluate = [*tofu, "--model", folder / "model", *dated, "--output", tmp_path / "results.json"]
    done(*evaluate, "--chat-template-kwargs", value)
    assert read(tmp_path / "results.json")["palu"]["chat_template_kwargs"] == config["chat_template_kwargs"]

    audit = ["audit", "--model", folder / "model", "--original", folder / "model", "--forget", folder / "forget.jsonl"]
    for bad, told in (
        ("{date", "is not JSON (Expecting property name enclosed in double quotes at character 1)"),
        ('{"date": 1}', "chat_template_kwargs = {'date': 1}: the chat template knows no date"),
    ):
        for command in ([*unlearn, "--overwrite"], inspect, evaluate, [*audit, "--output", tmp_path / "audit"]):
            assert told in refusal(palu_command(*command, "--chat-template-kwargs", bad))
    file.write_text("chat_template_kwargs:\n  date_string: 2024-07-26\n")
    assert "a date is text" in refusal(palu_command(*unlearn, "--config", file, "--overwrite"))


@pytest.mark.parametrize(
    ("options", "dtype", "precision", "optimizer"),
    [
        ("--dtype float32 --mixed-precision bf16", torch.float32, "bf16", "AdamW"),
        ("--dtype bfloat16", torch.bfloat16, "no", "AdamW"),
        ("--dtype bfloat16 --lora-rank none", torch.bfloat16, "no", "BFloat16AdamW"),
        ("--dtype bfloat16 --lora", torch.bfloat16, "no", "AdamW"),
    ],
)
def test_each_choice_of_weights_and_optimizer(
    options: str,
    dtype: torch.dtype,
    precision: str,
    optimizer: str,
    folder: Path,
    arguments: list[Any],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The choices of docs/memory.md."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # so that it is taken back
    AcceleratorState._reset_state()
    used: list[Any] = []
    prepare = Accelerator.prepare

    def spy(self: Accelerator, *parts: Any) -> Any:
        used.append((self.state.mixed_precision, type(parts[1]).__name__, next(parts[0].parameters()).dtype))
        return prepare(self, *parts)

    monkeypatch.setattr(Accelerator, "prepare", spy)
    try:
        done(*arguments, "--batch-size", 6, "--learning-rate", 1e-3, *options.split())
    finally:
        AcceleratorState._reset_state()
    assert used == [(precision, optimizer, dtype)]
    model = load(folder / "model", dtype=dtype)
    before = weights(model)
    adapted = options.endswith("--lora")
    model = PeftModel.from_pretrained(model, out / "model").merge_and_unload() if adapted else load(out / "model")
    assert model.dtype == dtype and not same_weights(model, before)


def test_config_file(folder: Path, out: Path, tmp_path: Path) -> None:
    """Flags win over the file, the file over the defaults; 1e-2, a string to YAML, is a number. An empty value is None
    for a setting, and as none at all for another option."""
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {folder / 'model'}\nforget: {folder / 'forget.jsonl'}\nretain: {folder / 'retain.jsonl'}\n"
        f"output: {out}\nlearning_rate: 1e-2\nbatch_size: 2\nepochs: 5\nprogress: false\n"
        "local_loss: topk_mse\ntarget: 0.5\nanchors: 0\ncheckpoint_dir: null\nmax_tokens: 900\n"
        "ref_model: null\nrecipe:\n"
    )
    done("unlearn", "--config", file, "--epochs", 1, "--max-tokens", "none")
    config = summary_of(out)["config"]
    given = {"learning_rate": 0.01, "batch_size": 2, "epochs": 1, "target": 0.5, "anchors": 0}
    assert config.items() >= (given | {"checkpoint_dir": None, "max_tokens": None, "progress": False}).items()
    assert config["top_k"] == palu.UnlearnConfig().method.top_k


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_what_no_flag_does(recipe: str, arguments: list[Any], out: Path) -> None:
    done(*arguments, "--epochs", 1, "--recipe", recipe, "--n", 2)
    assert summary_of(out)["config"].items() >= (RECIPES[recipe] | {"n": 2}).items()


def test_lora(folder: Path, out: Path, tmp_path: Path, arguments: list[Any]) -> None:
    options = ["--lora", "--lora-rank", 2, "--lora-target", "q_proj, v_proj"]
    done(*arguments, *options)
    assert (out / "model" / "adapter_model.safetensors").exists()
    assert not (out / "model" / "model.safetensors").exists()
    adapted = PeftModel.from_pretrained(load(folder / "model"), out / "model")
    assert adapted.peft_config["default"].r == 2
    assert adapted.peft_config["default"].target_modules == {"q_proj", "v_proj"}

    ids = torch.arange(20)[None]
    assert not torch.allclose(adapted(ids).logits, load(folder / "model")(ids).logits, atol=1)

    # The adapter's folder is a model, too: of which this adapter is trained on.
    arguments += ["--model", out / "model", "--output", tmp_path / "further"]
    done(*arguments)
    told = refusal(palu_command(*arguments, "--lora", "--overwrite"))
    assert told == "--model holds an adapter already, which is trained as it is; leave --lora out"


def test_lora_writes_the_adapter_that_is_merged_by_default(
    folder: Path, whole: tuple[Result, Path], out: Path, arguments: list[Any]
) -> None:
    done(*arguments, "--lora")
    merged = PeftModel.from_pretrained(load(folder / "model"), out / "model").merge_and_unload()
    assert same_weights(merged, weights(load(whole[1] / "model")))


def test_lora_holds_no_logits_of_whole_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows fit into --chunk-bytes, those of the last positions of twelve anchors too."""
    vocab, width, tokens = 5003, 32, byte_level(LLAMA3)
    model = tiny_llama(vocab_size=vocab, hidden_size=width, max_position_embeddings=256)
    folder = write_input(tmp_path, model, tokens=tokens, forget=TEXT_FORGET, retain=TEXT_RETAIN)
    monkeypatch.setattr(scores, "CHUNK_BYTES", 16 * vocab)
    given = ["--retain", "auto", "--lora", "--max-steps", 1, "--anchors", 12, "--retain-batch-size", 12]
    with WatchLogits(vocab, width) as watched:
        done(*short_run(folder, tmp_path / "out"), *given, "--chunk-bytes", 16 * vocab)
    assert watched.rows <= 8  # tokens of the check of the head


def test_quantize(out: Path, arguments: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given = [*arguments, "--quantize", "4bit"]
    told = "--quantize 4bit: quantised weights cannot be trained; add --lora, or leave it out"
    assert refusal(palu_command(*given)) == told
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda *_: None)
        told = "--quantize needs bitsandbytes; pip install 'palu-unlearn[quantized]'"
        assert refusal(palu_command(*given, "--lora")) == told
    pytest.importorskip("bitsandbytes")
    done(*given, "--lora", "--max-steps", 1)
    assert {path.name for path in (out / "model").glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert "bitsandbytes" in read(out / "private" / "record.json")["versions"]
    # The adapter's folder is a model, too: on a base that is quantised again, or as it is stored.
    further = ["--model", out / "model", "--output", out.parent / "further"]
    done(*arguments, *further, "--quantize", "8bit", "--max-steps", 1)


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize(("number", "status", "lora"), [(signal.SIGINT, 130, []), (signal.SIGTERM, 143, ["--lora"])])
def test_ctrl_c_or_sigterm_and_resume(
    number: int,
    status: int,
    lora: list[str],
    arguments: list[Any],
    out: Path,
    whole: tuple[Result, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without --lora of a run that overwrites another one."""
    overwrite = [] if lora else ["--overwrite"]
    if overwrite:
        done(*arguments, "--max-steps", 1)
    forward, calls = PaluMethod.batch_losses, 0

    def pressed(self: PaluMethod, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(number)
        return forward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PaluMethod, "batch_losses", pressed)
        result = palu_command(*arguments, *lora, *overwrite)
    assert result.exit_code == status
    way = "--resume in place of --overwrite" if overwrite else "--resume"
    assert result.stderr.endswith(f"palu: to go on, give the same command with {way}\n")
    assert not (out / "private" / "summary.json").exists()
    assert refusal(palu_command(*arguments, *lora)) == (
        f"--output {out} holds a run that was interrupted; add --resume to go on with it, or --overwrite to start again"
    )
    changes = [("--n", 2, "n was -1 and is 2.")]
    if lora:  # whose weights may be the same, and it computes something else
        another = "the model is another one."
        changes += [("--lora-alpha", 4, another), ("--lora-dropout", 0.5, another)]
    for name, value, told in changes:
        said = refusal(palu_command(*arguments, *lora, "--resume", name, value))
        assert f"belongs to another run: {told}" in said

    done(*arguments, *lora, "--resume")
    assert summary_of(out)["steps"] == STEPS
    same = whole[1] if overwrite else out.parent / "same"
    if lora:
        done(*arguments, *lora, "--output", same)
    assert same_weights(load(out / "model"), weights(load(same / "model")))
    assert not (out / "private" / "checkpoints").exists()


def test_every_row_is_rendered_and_tokenised_once(
    arguments: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the complaints, the record, what is printed and the run together."""
    rows = [{name: row[name] for name in ("question", "answer", "spans")} for row in FORGET]
    arguments += ["--forget", write_rows(tmp_path / "forget.jsonl", rows)]
    rendered: list[str] = []
    original = Renderer.render

    def render(self: Renderer, row: int, where: str, columns: Any, *args: Any, **kwargs: Any) -> Any:
        rendered.append(columns.get("answer", "of an anchor's prompt"))
        return original(self, row, where, columns, *args, **kwargs)

    monkeypatch.setattr(Renderer, "render", render)
    done(*arguments, "--max-steps", 1)
    own = len(anchor_texts()[-GENERAL:])  # the record's general questions, as prompts and with the model's own answers
    answers = [row["answer"] for row in [*FORGET, *RETAIN]]
    assert len(rendered) == len(answers) + 2 * own and sorted(set(rendered) & set(answers)) == sorted(set(answers))
    assert all(rendered.count(answer) == answers.count(answer) for answer in answers)
