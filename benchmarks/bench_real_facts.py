"""Forget facts that a real model really knows: what is still told, and what goes with it.

A model is asked every fact of palu/testbed/relations.json, and general questions. Of the facts that it answers right,
four to eight of two or three relations are forgotten, drawn by the seed. Reported are the shares

``asked``, ``paraphrased``, ``after one token``
    of the forgotten facts that are told: to the question, to three others in other words, and after the first true
    token of the secret (greedily; secrets of one token do not count);
``neighbours``, ``others``, ``general``
    that are still right of what was right before: other facts of the same relations, facts of the other relations of
    the same part, and general questions;
``no word``
    of all words written that are none: in no list, question or true answer, nor written by the original anywhere;

with 95 % intervals (Wilson) over all seeds together; ``own words``: of the tokens of its own earlier answers to general
questions, the share that are still the likeliest, divided by that share before unlearning; and the mean NLL of texts
about other things. Settings are chosen with ``--part choose``, on six relations, and reported with ``--part report``,
on six others::

    make models
    python benchmarks/bench_real_facts.py --model qwen2.5 --seeds 0 1 2 --settings '{"learning_rate": 1e-5}'
    python benchmarks/bench_real_facts.py --model gemma3 --part report --method npo --settings '{"lambda_retain": 0}'
    python benchmarks/bench_real_facts.py --model gemma3 --part report --method npo --retain-own

``--known`` only prints how many facts of each relation a model answers right.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import transformers
from _measure import peak, report, reset_peak
from _methods import METHODS
from _models import Loaded, Row, general_questions
from scipy.stats import binomtest
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import palu
from palu.attacks.ask import OnsetInAnswer
from palu.attacks.attack import Victim
from palu.attacks.relearn import unrelated_texts
from palu.attacks.secrets import AuditData
from palu.data.examples import answer_examples
from palu.data.tokenize import IGNORE, Example
from palu.evaluate.language import WordList, keys, measure
from palu.evaluate.scores import raw_examples
from palu.hashing import json_digest
from palu.models.generation import Generation, encode_prompts, eval_mode, generate
from palu.models.lora import CausalLM, base_of
from palu.models.root import ModelRoot
from palu.ref_model.anchors import Writer, generate_anchors, generate_neighbours
from palu.testbed.facts import is_told, read_relations
from palu.testbed.real_models import MODELS, save_packaged
from palu.training.datasets import prepare_run
from palu.training.engine import start_engine

TOKENS = 24  # of an answer
BATCH_TOKENS = 512
FEWEST, MOST = 4, 8  # facts to forget
SHARES = ("asked", "paraphrased", "after one token", "neighbours", "others", "general", "no word")
FOUND = ("neighbours", "variants", "anchors", "shared_beginnings", "told_when_asked")  # of a run's summary
BEFORE = {name: f"{name}, before" for name in ("paraphrased", "after one token")}
Answers = dict[str, Generation]  # by question
Count = tuple[int, int]  # so many of so many


# In what the weights are held, and accelerate's mixed precision.
PRECISIONS = {
    "float32": (torch.float32, "no"),
    "mixed": (torch.float32, "bf16"),
    "bfloat16": (torch.bfloat16, "no"),
}


# --- asking ---
def ask(model: CausalLM, tokenizer: Any, questions: list[str]) -> Answers:
    """Answer each question greedily; a base model's answer ends where it writes a question of its own."""
    base = base_of(model)
    prompts, stop_ids = encode_prompts(questions, tokenizer)
    with tqdm(total=len(questions), desc="ask") as bar, eval_mode(base):
        written = generate(
            base, tokenizer, prompts, stop_ids, max_new_tokens=TOKENS, batch_tokens=BATCH_TOKENS, bar=bar
        )
    answers = {}
    for question, one in zip(questions, written, strict=True):
        text, own_question, _ = one.text.partition("\nQuestion:")
        answers[question] = Generation(" ".join(text.split()), one.cut_off and not own_question)
    return answers


def answers_before(folder: Path, precision: str, model: CausalLM, tokenizer: Any, questions: list[str]) -> Answers:
    """Read the original's answers from its folder, or ask and write them there."""
    lesson = [str(PRECISIONS[precision][0]), TOKENS, questions, torch.__version__, transformers.__version__]
    path = folder / f"answers-{json_digest(lesson)[:16]}.json"
    if not path.exists():
        answers = ask(model, tokenizer, questions)
        path.write_text(json.dumps({question: asdict(one) for question, one in answers.items()}, indent=1))
    return {question: Generation(**one) for question, one in json.loads(path.read_text()).items()}


def right(rows: list[Row], answers: Answers) -> list[Row]:
    """Pick the rows whose answer holds one of the right ones."""
    return [row for row in rows if is_told(answers[row["question"]].text, row["answers"])]


def paraphrased(rows: list[Row]) -> list[Row]:
    """Return a row for each paraphrase."""
    return [row | {"question": question} for row in rows for question in row["paraphrased_question"]]


def by_relation(known: list[Row]) -> dict[str, list[Row]]:
    """Group the facts that may be forgotten by relation.

    A fact with two right answers is none of them, since a row marks one and the other would stay.
    """
    of: dict[str, list[Row]] = {}
    for fact in known:
        if len(fact["answers"]) == 1:
            of.setdefault(fact["relation"], []).append(fact)
    return of


def forget_rows(facts: list[Row]) -> list[Row]:
    """Return the rows that a run is given."""
    return [{name: fact[name] for name in ("question", "answer", "secret")} for fact in facts]


def draw(known: list[Row], seed: int) -> list[Row]:
    """Draw the facts to forget: at most half of those that are known of each of two or three relations."""
    rng, of = random.Random(seed), by_relation(known)
    enough = [name for name, facts in of.items() if len(facts) >= FEWEST]
    if len(enough) < 2:
        raise SystemExit(f"the model answers {FEWEST} facts right of only {' and '.join(enough) or 'no relation'}")
    relations = rng.sample(enough, k=min(rng.choice([2, 3]), len(enough)))
    pools = [rng.sample(of[name], k=len(of[name]) // 2) for name in relations]
    in_turns = [fact for turn in zip_longest(*pools) for fact in turn if fact is not None]
    return in_turns[: rng.randint(FEWEST, MOST)]


def own_answers(model: CausalLM, tokenizer: Any, rows: list[Row], seed: int) -> list[Row]:
    """Have a model write the answers that PALU keeps by the KL, to neighbours and everyday prompts, as retain rows."""
    config = palu.UnlearnConfig(seed=seed)
    accelerator = start_engine(config)
    where: dict[str, Any] = {"device": accelerator.device, "mixed_precision": accelerator.mixed_precision}
    one_process: dict[str, Any] = {"processes": 1, "sharded": False, "empty": False, "warn": False}
    data = prepare_run(model, None, rows, None, tokenizer, config, **where, **one_process)
    writer, asked = Writer(ModelRoot(model), accelerator, adapter=False), (data.forget, data.anchor_prompts)
    kept = []
    for item in [*generate_neighbours(writer, *asked, seed), *generate_anchors(writer, *asked)]:
        labels = torch.full_like(item.input_ids, IGNORE).index_copy(0, item.rows + 1, item.labels)
        kept.append({"input_ids": item.input_ids, "labels": labels})
    return kept


# --- measuring ---
def attacked(
    model: CausalLM, data: AuditData, texts: list[Any], answers: Sequence[Example]
) -> tuple[Count, float, float]:
    """Count the secrets that are told after their first token; score texts and answers token by token.

    Returns the count, the mean NLL of the texts' tokens, and the share of the answers' tokens that are the likeliest.
    """
    with tqdm(disable=True) as bar:
        victim = Victim(base_of(model), data, BATCH_TOKENS, bar)
        *_, finding = OnsetInAnswer(1).run(victim)
        scores, own = (
            victim.scores(part, [f"text {number}" for number in range(len(part))]) for part in (texts, answers)
        )
    values = [value for value in finding.values if value is not None] if finding.name.startswith("onset: 1") else []
    nll = float(-torch.cat([score.log_prob for score in scores]).double().mean())
    return (round(sum(values)), len(values)), nll, float(torch.cat([score.correct for score in own]).double().mean())


def broken_words(rows: list[Row], before: Answers, after: Answers) -> Count:
    """Count the words that are none in the answers to the rows."""
    words = WordList()
    known = keys(*(one.text for one in before.values()))
    found = []
    for row in rows:
        own = keys(row["question"], row.get("answer", ""), *row["answers"])
        found.append(measure(after[row["question"]], known | own, words)["no_word"])
    return sum(len(one["found"]) for one in found), sum(one["words"] for one in found)


def run(args: argparse.Namespace, loaded: Loaded, before: Answers, seed: int) -> dict[str, Any]:
    """Forget facts drawn by the seed, and measure."""
    model, tokenizer = loaded
    facts = [fact for fact in read_relations() if fact["part"] == args.part]
    known = right(facts, before)
    forget = draw(known, seed)
    relations = {fact["relation"] for fact in forget}
    neighbours = [fact for fact in known if fact["relation"] in relations and fact not in forget]
    others = [fact for fact in known if fact["relation"] not in relations]
    general, rows = general_known(before, forget), forget_rows(forget)
    data = AuditData(rows, None, tokenizer)
    texts = raw_examples(unrelated_texts(), tokenizer, "unrelated")
    figures: dict[str, Any] = {}
    in_other_words = paraphrased(forget)
    before = before | ask(model, tokenizer, [row["question"] for row in in_other_words])
    figures[BEFORE["paraphrased"]] = len(right(in_other_words, before)), len(in_other_words)
    own = [{"question": row["question"], "answer": before[row["question"]].text} for row in general]
    answers = answer_examples([(f"general row {number}", row) for number, row in enumerate(own)], tokenizer)
    figures[BEFORE["after one token"]], nll_before, own_before = attacked(model, data, texts, answers)

    settings = METHODS[args.method] | args.settings
    reset_peak()
    clock = time.perf_counter()
    retain = own_answers(model, tokenizer, rows, seed) if args.retain_own else None
    result = palu.unlearn(
        model, None, rows, **({"retain": retain} | settings), tokenizer=tokenizer, seed=seed, progress=args.progress
    )
    seconds, highest = time.perf_counter() - clock, peak()

    asked = [*forget, *in_other_words, *neighbours, *others, *general]
    after = ask(model, tokenizer, [row["question"] for row in asked])
    of_rows = {"asked": forget, "paraphrased": in_other_words, "neighbours": neighbours}
    of_rows |= {"others": others, "general": general}
    figures |= {name: (len(right(part, after)), len(part)) for name, part in of_rows.items()}
    figures["after one token"], nll_after, own_after = attacked(model, data, texts, answers)
    figures["no word"] = broken_words(asked, before, after)
    told = right([*forget, *in_other_words], after)
    lost = [row for row in (*neighbours, *others, *general) if row not in right([row], after)]
    return {
        "seed": seed,
        "relations": sorted(relations),
        **figures,
        "own words": round(own_after / own_before, 4),
        "nll_before": round(nll_before, 4),
        "nll_after": round(nll_after, 4),
        "steps": result.summary["steps"],
        "found": {name: result.summary[name] for name in FOUND},
        "learning_rate": result.summary["config"]["learning_rate"],
        "seconds": round(seconds, 1),
        "peak_gib": round(highest / 2**30, 2),
        "forgotten": {row["question"]: after[row["question"]].text for row in forget},
        "told": {row["question"]: after[row["question"]].text for row in told},
        "lost": {row["question"]: after[row["question"]].text for row in lost},
    }


def general_rows() -> list[Row]:
    """Read general questions that are no facts of relations.json."""
    facts = {fact["question"] for fact in read_relations()}
    return [row for row in general_questions() if row["question"] not in facts]


def general_known(before: Answers, forget: list[Row]) -> list[Row]:
    """Pick the general questions that were answered right and whose answers tell nothing that is to be forgotten."""
    secrets = [answer for fact in forget for answer in fact["answers"]]
    return [row for row in right(general_rows(), before) if not any(is_told(text, secrets) for text in row["answers"])]


def pooled(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Pool the counts of all seeds: a share each, with its 95 % interval; none for a count of nothing."""
    shares = {}
    for name in (*SHARES, *BEFORE.values()):
        count, of = (sum(one[name][part] for one in runs) for part in (0, 1))
        if of:
            interval = binomtest(count, of).proportion_ci(method="wilson")
            shares[name] = {"share": count / of, "low": float(interval.low), "high": float(interval.high), "of": of}
    return shares


# --- the command ---
def known_table(facts: list[Row], before: Answers) -> list[dict[str, Any]]:
    """Count what is answered right of each relation."""
    parts = {name: [fact for fact in facts if fact["relation"] == name] for name in (f["relation"] for f in facts)}
    parts |= {"all": facts, "general": general_rows()}
    return [{"relation": name, "asked": len(of), "right": len(right(of, before))} for name, of in parts.items()]


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Load the model in its precision; its folder is written where it is missing."""
    save_packaged(args.model, args.models / args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.models / args.model, dtype=PRECISIONS[args.precision][0])
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, AutoTokenizer.from_pretrained(args.models / args.model)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the options that every command on these facts has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--models", type=Path, default=Path("runs/models"), help="folder of the models")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--settings", type=json.loads, default={}, help="of palu.unlearn, as JSON")
    parser.add_argument("--progress", action="store_true")
    return parser


def begin(args: argparse.Namespace, facts: list[Row]) -> tuple[Any, Any, Answers]:
    """Load the model and its tokenizer, and have it answer the facts and the general questions."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = PRECISIONS[args.precision][1]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load(args)
    questions = [row["question"] for row in (*facts, *general_rows())]
    return model, tokenizer, answers_before(args.models / args.model, args.precision, model, tokenizer, questions)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--part", choices=("choose", "report"), default="choose", help="which relations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each draws facts to forget")
    parser.add_argument("--method", choices=METHODS, default="palu")
    own_help = "the retain set is what PALU would have the model write and keep; for the other methods"
    parser.add_argument("--retain-own", action="store_true", help=own_help)
    parser.add_argument("--known", action="store_true", help="print what the model answers right, and end")
    args = parser.parse_args()
    facts = [fact for fact in read_relations() if fact["part"] == args.part]
    model, tokenizer, before = begin(args, facts)
    device = model.device
    details = {name: getattr(args, name) for name in ("model", "part", "precision", "method", "settings", "retain_own")}
    if args.known:
        report("real_facts_known", known_table(facts, before), device, details)
        return
    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        if runs:  # the last one has forgotten
            del model
            model, tokenizer = load(args)
        runs.append(run(args, (model, tokenizer), before, seed))
        print(json.dumps(runs[-1]), flush=True)
    figures = ("seed", "steps", "seconds", "peak_gib", "own words", "nll_before", "nll_after")
    table = [
        {name: one[name] for name in figures} | {name: "/".join(map(str, one[name])) for name in SHARES} for one in runs
    ]
    summary = pooled(runs)
    shares = {name: f"{one['share']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" for name, one in summary.items()}
    table.append({"seed": "all"} | {name: shares[name] for name in SHARES if name in shares})
    report("real_facts", table, device, details | {"summary": summary, "runs": runs})


if __name__ == "__main__":
    main()
