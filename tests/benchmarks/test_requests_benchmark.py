"""What bench_requests.py draws. That it runs on a real model is seen by running it."""

from collections import Counter
from itertools import chain

import bench_requests as bench
import pytest

from palu.testbed.facts import read_relations


def test_a_seed_draws_requests_and_leaves_half_of_each_relation() -> None:
    facts = read_relations()
    known = Counter(fact["relation"] for fact in facts if len(fact["answers"]) == 1)
    requests = bench.draw(facts, 8, 4, seed=0)
    assert requests == bench.draw(facts, 8, 4, seed=0) != bench.draw(facts, 8, 4, seed=1)
    drawn = list(chain(*requests))
    assert [len(request) for request in requests] == [4] * 8 and len({fact["question"] for fact in drawn}) == 32
    assert all(count <= known[name] // 2 for name, count in Counter(fact["relation"] for fact in drawn).items())
    assert all(len({fact["relation"] for fact in request}) > 1 for request in requests)
    with pytest.raises(SystemExit, match="the model knows 3 facts to draw; give fewer --requests or --facts"):
        bench.draw(facts[:6], 2, 2, seed=0)
