"""Drawing from the likeliest tokens, against transformers' own."""

import pytest
import torch
from helpers.tiny import tiny_llama
from tqdm.auto import tqdm
from transformers import TopPLogitsWarper

from palu.models import generation


@pytest.mark.parametrize("top_p", [0.05, 0.8, 0.999])
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])  # from flat, where many tokens make a probability, to peaked
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_p_is_that_of_transformers(top_p: float, spread: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores = (spread * torch.randn(6, 3000, dtype=torch.float64)).to(torch.float32)
    scores[0, 7] = 100.0  # alone has more than any top_p
    scores = scores.to(dtype).float()  # in bfloat16 many are equal
    ours, theirs = generation.TopP(top_p)(None, scores), TopPLogitsWarper(top_p)(None, scores)
    assert ours.isfinite().sum(-1).tolist() == theirs.isfinite().sum(-1).tolist()
    # Of equals at the edge either may be left out.
    torch.testing.assert_close(ours.sort(-1).values, theirs.sort(-1).values, rtol=0, atol=0)
    if dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_likeliest_token_alone_is_drawn_for_a_small_top_p() -> None:
    model = tiny_llama()
    given = {"pad": 0, "max_new_tokens": 8, "batch_tokens": 64, "bar": tqdm(disable=True)}
    prompts = [torch.arange(1, 5), torch.arange(7, 20)]
    with generation.eval_mode(model):
        greedy = generation.generate_ids(model, prompts, set(), **given)
        drawn = generation.generate_ids(model, prompts, set(), **given, sample=True, top_p=1e-6)
        free = generation.generate_ids(model, prompts, set(), **given, sample=True)
    assert drawn == greedy != free
