"""Ask before the end: what the model, as it is trained, still tells when it is asked is forgotten, too.

The reference has found other ways to a secret before training (:mod:`palu.ref_model.variants`), but as these are
closed the model finds more. So a run does not end by itself before the model has been asked each question. An answer
that tells the secret is watched from then on, as the rows of earlier requests are, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from palu.data.packing import Item
from palu.distributed import autocast
from palu.models.attention import use_own_attention
from palu.models.generation import eval_mode
from palu.models.lora import base_of, is_peft, without_adapter
from palu.ref_model.anchors import Writer, generate_answers_that_tell
from palu.ref_model.precompute import compute_outputs
from palu.ref_model.shared import drop_shared_targets
from palu.training.step import Run, check_watched


def ask(run: Run) -> bool:
    """Ask the model, what was forgotten earlier, too; return whether an answer tells a secret and is not watched yet.

    All processes must call it.
    """
    if not run.asks:
        return False
    base = base_of(run.root.model)
    writer = Writer(run.root, run.accelerator, adapter=True, chunk_bytes=run.config.chunk_bytes)
    with use_own_attention(base):
        asked = [*run.data.forget, *run.data.earlier]
        found = generate_answers_that_tell(writer, asked, run.data.anchor_prompts, run.config.onset_length)
    known = {item.input_ids.numpy().tobytes() for item in run.checkpoints.told}
    new = [item for item in found if item.input_ids.numpy().tobytes() not in known]
    if new:
        run.checkpoints.told += new
        watch(run, new)
        check_watched(run)
    return bool(new)


def watch(run: Run, items: Sequence[Item]) -> None:
    """Watch answers that told a secret; the reference, which is the model without its adapter, gives their fields."""
    model = run.root.model
    assert is_peft(model)
    told = drop_shared_targets(items, run.loader.cache.shared)
    with eval_mode(base_of(model)), autocast(run.accelerator), without_adapter(model):
        # One at a time: a resumed run has them all at once, and must get the same bits.
        caches = run.root.run(lambda: [compute_outputs(model, [one], run.config, run.accelerator) for one in told])
    run.loader.watch(told, [cache.outputs[0] for cache in caches])
