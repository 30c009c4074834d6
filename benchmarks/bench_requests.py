"""Requests one after another, each ``after`` the run before it, against the same rows at once.

Of the facts that a real model answers right (palu/testbed/relations.json), --requests times --facts are drawn by the
seed, at most half of each relation. After each request are counted

``asked``, ``paraphrased``
    of the facts of all requests so far: those that are told, to the question and to three others in other words;
``neighbours``, ``others``, ``general``
    that are still right of what was right before: other facts of the relations so far, facts of the other relations,
    and general questions;
``earlier``
    rows of earlier requests that took part in an epoch, at most;

and at the end, and for all rows at once, what relearning gets (palu.attacks.relearn: secrets told after some steps on a
fifth of the rows)::

    python benchmarks/bench_requests.py --model smollm2
    python benchmarks/bench_requests.py --requests 2 --facts 2 --settings '{"epochs": 2}'
"""

from __future__ import annotations

import json
import random
import shutil
import time
from itertools import chain, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _measure import report
from _models import Row
from bench_real_facts import (
    BATCH_TOKENS,
    ask,
    begin,
    by_relation,
    forget_rows,
    general_known,
    load,
    paraphrased,
    parser_of,
    right,
)
from tqdm import tqdm

import palu
from palu.attacks.attack import Victim
from palu.attacks.relearn import Relearn
from palu.attacks.run import attacks_of
from palu.attacks.secrets import AuditData
from palu.testbed.facts import read_relations


def draw(known: list[Row], requests: int, facts: int, seed: int) -> list[list[Row]]:
    """Draw the facts of each request, relation by relation in turns: at most half of those known of a relation."""
    rng = random.Random(seed)
    pools = [rng.sample(facts_of, k=len(facts_of) // 2) for facts_of in by_relation(known).values()]
    drawn = [fact for fact in chain(*zip_longest(*pools)) if fact is not None]
    if len(drawn) < requests * facts:
        raise SystemExit(f"the model knows {len(drawn)} facts to draw; give fewer --requests or --facts")
    drawn = rng.sample(drawn[: requests * facts], k=requests * facts)
    return [drawn[first : first + facts] for first in range(0, len(drawn), facts)]


def counts(model: Any, tokenizer: Any, forgotten: list[Row], kept: list[Row], general: list[Row]) -> dict[str, str]:
    """Count what is told of the forgotten facts, and what is right of the others."""
    relations = {fact["relation"] for fact in forgotten}
    parts = {
        "asked": forgotten,
        "paraphrased": paraphrased(forgotten),
        "neighbours": [fact for fact in kept if fact["relation"] in relations],
        "others": [fact for fact in kept if fact["relation"] not in relations],
        "general": general,
    }
    after = ask(model, tokenizer, [row["question"] for part in parts.values() for row in part])
    return {name: f"{len(right(part, after))}/{len(part)}" for name, part in parts.items()}


def relearnt(model: Any, data: AuditData) -> str:
    """Count the secrets that a relearning model tells, of those that it was not trained on."""
    attacks = attacks_of(data, quick=False, n=-1, draws=None, max_new_tokens=None, seed=0)
    attack = next(one for one in attacks if isinstance(one, Relearn) and one.key == "relearn-lora")
    if attack.skip_reason(data, model):
        return ""
    with tqdm(disable=True) as bar:
        (finding,) = attack.run(Victim(model, data, BATCH_TOKENS, bar))
    values = [value for value in finding.values if value is not None]
    return f"{round(sum(values))}/{len(values)}"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--facts", type=int, default=4, help="of a request")
    parser.add_argument("--seed", type=int, default=0, help="draws the facts, and is the runs'")
    args = parser.parse_args()
    facts = read_relations()
    model, tokenizer, before = begin(args, facts)
    known = right(facts, before)
    requests = draw(known, args.requests, args.facts, args.seed)
    drawn = list(chain(*requests))
    kept = [fact for fact in known if fact not in drawn]
    general = general_known(before, drawn)

    def run(name: str, facts: list[Row], folder: Path, after: Path | None, so_far: list[Row]) -> dict[str, Any]:
        """Forget facts, write the run to the folder, and measure."""
        config = palu.UnlearnConfig(seed=args.seed, progress=args.progress).replace(**args.settings)
        given: dict[str, Any] = {"tokenizer": tokenizer, "config": config, "after": after}
        recorder = palu.Recorder(model, forget_rows(facts), None, **given)
        clock = time.perf_counter()
        result = palu.unlearn(model, None, forget_rows(facts), None, **given)
        seconds = time.perf_counter() - clock
        palu.save_run(folder, result, tokenizer, recorder)
        row: dict[str, Any] = {"request": name, **counts(model, tokenizer, so_far, kept, general)}
        row["relearnt"] = (
            relearnt(model, AuditData(forget_rows(drawn), None, tokenizer)) if len(so_far) == len(drawn) else ""
        )
        row |= {"earlier": max(record.get("earlier", 0) for record in result.history)}
        row |= {"steps": len(result.history), "seconds": round(seconds, 1)}
        print(json.dumps(row), flush=True)
        return row

    table: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for number, request in enumerate(requests, start=1):
            after = Path(folder, str(number - 1)) if number > 1 else None
            so_far = list(chain(*requests[:number]))
            table.append(run(str(number), request, Path(folder, str(number)), after, so_far))
            if after is not None:
                shutil.rmtree(after)
        device = model.device
        del model
        model, _ = load(args)
        table.append(run("at once", drawn, Path(folder, "at-once"), None, drawn))
    details = {name: getattr(args, name) for name in ("model", "precision", "seed", "settings")}
    report("requests", table, device, details | {"facts": [[fact["question"] for fact in one] for one in requests]})


if __name__ == "__main__":
    main()
