"""accelerate's engines and trackers: which ones a run can use, and how a model that they shard comes back whole.

DDP trains the model itself. FSDP2 and DeepSpeed's ZeRO shard the model that they are given over the processes, so they
are given a copy of it. The model itself gets the trained weights when the run has ended. Under FSDP2 it has none until
then: the shards are all that there is.

The loss is a sum over all tokens of an optimisation step, divided by their number in all micro-batches of all
processes. Engines average gradients over processes, so each process multiplies its share by the number of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, ProjectConfiguration, fsdp2_prepare_model

from palu.config import UnlearnConfig
from palu.distributed import ProcessError, full_tensor
from palu.models.lora import CausalLM, base_of
from palu.models.root import ModelRoot, share_weights
from palu.ref_model.storage import CacheError

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, *SHARDED)


def start_engine(config: UnlearnConfig) -> Accelerator:
    """Create the accelerator that the launcher asked for, set up so that the loss stays exact.

    Raises:
        ValueError: its configuration cannot be followed exactly; the message names the key and the fix.
        ImportError: a tracker's package is missing.
    """
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in config.trackers:  # accelerate would leave it out
        if name not in available:
            raise ImportError(f"report_to = {config.report_to!r} needs {name}, which is not here; pip install {name}")
    project = ProjectConfiguration(logging_dir=config.logging_dir)
    accelerator = Accelerator(log_with=list(config.trackers) or None, project_config=project)
    kind, parallelism = accelerator.distributed_type, accelerator.parallelism_config
    if kind not in SUPPORTED:
        raise ValueError(f"accelerate's {kind.value} is not supported; use DDP, FSDP2 or DeepSpeed ZeRO")
    if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError("tensor, context and sequence parallelism are not supported; leave out parallelism_config")
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise ValueError(
            f"accelerate is configured with gradient_accumulation_steps = {steps}, by which it would divide an exact "
            f"mean once more; set it to 1 there and pass gradient_accumulation_steps={steps} to palu.unlearn"
        )
    if kind == DistributedType.FSDP:
        _set_up_fsdp(accelerator)
    if kind == DistributedType.DEEPSPEED:
        _set_up_deepspeed(accelerator, config)
    return accelerator


def _set_up_fsdp(accelerator: Accelerator) -> None:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP version 1 is not supported; set fsdp_version: 2")
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing draws other dropout when it recomputes; set it to false and pass "
            "gradient_checkpointing=True to palu.unlearn"
        )
    if accelerator.mixed_precision == "bf16":
        # accelerate's choice would also round the losses and the sum of the gradients to bf16.
        plugin.mixed_precision_policy = torch.distributed.fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def _set_up_deepspeed(accelerator: Accelerator, config: UnlearnConfig) -> None:
    plugin: Any = accelerator.deepspeed_plugin
    if plugin.zero_stage not in (1, 2, 3):
        raise ValueError(f"DeepSpeed with zero_stage: {plugin.zero_stage} is not supported; set 1, 2 or 3, or use DDP")
    if plugin.zero_stage == 3 and plugin.zero3_init_flag:
        raise ValueError("zero3_init_flag has models loaded in pieces, which palu does not read; set it to false")
    if plugin.gradient_clipping not in (None, "auto", config.max_grad_norm):
        raise ValueError(
            f"DeepSpeed is configured with gradient_clipping = {plugin.gradient_clipping} while max_grad_norm = "
            f"{config.max_grad_norm}; leave gradient_clipping out and pass max_grad_norm to palu.unlearn"
        )
    if config.learning_rate is None:
        raise ValueError(
            "learning_rate = None: DeepSpeed keeps the gradient to itself, from which the rate would follow; give one"
        )
    # DeepSpeed only reckons its throughput from the batch size; how many micro-batches make a step, the loop says.
    plugin.deepspeed_config |= {
        "train_batch_size": config.batch_size * accelerator.num_processes,
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
    }


def loaded_on_main_alone(accelerator: Accelerator) -> bool:
    """Whether accelerate takes a model's weights from the main process, so that the others need none."""
    return (
        accelerator.distributed_type == DistributedType.FSDP and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
    )


@contextmanager
def keep_dtypes(accelerator: Accelerator) -> Iterator[None]:
    """Keep accelerate, within the block, from raising the weights that FSDP2 shards to float32 in mixed precision.

    Their products are bfloat16 by the plugin's policy. As on one process, weights are trained as they were loaded.
    """
    state = accelerator.state
    precision = state._mixed_precision
    if accelerator.distributed_type == DistributedType.FSDP:
        state._mixed_precision = "no"
    try:
        yield
    finally:
        state._mixed_precision = precision


def training_copy(model: CausalLM, accelerator: Accelerator) -> CausalLM:
    """Return the model to train, on the device; where the engine shards it, a copy of the model for it to shard.

    FSDP2's copy takes the weights over: the model's own parameters are empty ([0]) until :func:`copy_weights_back`.
    """
    if accelerator.distributed_type not in SHARDED:
        model.to(accelerator.device)
        return model
    if loaded_on_main_alone(accelerator):
        base_of(model).tie_weights()  # what is made without weights may have lost its ties
    trained = share_weights(model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.to("cpu")  # type: ignore[arg-type]
        return trained
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = torch.empty(0, dtype=parameter.dtype)
    return trained


@torch.no_grad()
def copy_weights_back(model: CausalLM, trained: CausalLM, accelerator: Accelerator) -> None:
    """Give the model the weights of its :func:`training_copy`, on the host. All processes must call it.

    A process whose model came without weights (on the meta device) gets none.
    """
    if trained is model:
        return
    gather = full_tensor
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_fp32_param

        gather = safe_get_full_fp32_param
    for parameter, learnt in zip(model.parameters(), trained.parameters(), strict=True):
        if parameter.requires_grad or accelerator.distributed_type == DistributedType.FSDP:
            full = gather(learnt)
            if not parameter.is_meta:
                parameter.data = full.to("cpu", parameter.dtype)


@contextmanager
def weights_back_if_refused(model: CausalLM, trained: CausalLM, accelerator: Accelerator) -> Iterator[None]:
    """Call :func:`copy_weights_back` where the block raises an error of palu's, as it does on all processes alike."""
    try:
        yield
    except (CacheError, ProcessError, TypeError, ValueError):
        copy_weights_back(model, trained, accelerator)
        raise


def reference_root(ref_model: CausalLM, accelerator: Accelerator) -> ModelRoot:
    """Return a root for a reference that is a model of its own: under FSDP2 of a copy of it, which is sharded."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return ModelRoot(ref_model)
    root: ModelRoot = fsdp2_prepare_model(accelerator, ModelRoot(share_weights(ref_model, frozen=True)))
    return root


@contextmanager
def tracking(accelerator: Accelerator, config: UnlearnConfig) -> Iterator[None]:
    """Open the trackers of ``config.report_to`` within the block, for ``accelerator.log``; close them in any case."""
    if config.trackers and accelerator.is_main_process:
        Path(config.logging_dir).mkdir(parents=True, exist_ok=True)
    # TensorBoard takes no mappings.
    settings = {name: json.dumps(v) if isinstance(v, dict) else v for name, v in config.values().items()}
    accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "palu"), settings, {"wandb": {"dir": config.logging_dir}})
    try:
        yield
    finally:
        # Not end_training, which would end the process group, too: it is not ours.
        for tracker in accelerator.trackers:
            tracker.finish()
