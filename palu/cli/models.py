"""Load the models and tokenizers that commands are given by folder or name, and choose the device."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palu.cli.options import Bits, DtypeName, flag
from palu.layout import MODEL, PRIVATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from palu.models.lora import CausalLM

_CACHED = ("config.json", "adapter_config.json", "tokenizer_config.json")  # one of them is loaded first
_PATIENCE = 10.0  # seconds
_POINTER = b"version https://git-lfs"


def check_names(**names: str | None) -> None:
    """Raise FileNotFoundError or ValueError where the name given for an option leads to no model or tokenizer.

    transformers would ask the hub for a folder, or try a hub that cannot be reached again and again.
    """
    given = {option: name for option, name in names.items() if name is not None}
    for option, name in given.items():
        subject, folder = f"{flag(option)} {name}", Path(name).expanduser()
        if not folder.is_dir():
            if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
                raise FileNotFoundError(f"{subject}: there is no such folder")
        elif option == "tokenizer":
            if not any(folder.glob("tokenizer*")):
                raise FileNotFoundError(f"{subject}: the folder holds no tokenizer")
        elif not _holds_model(folder):
            if (folder / PRIVATE).is_dir() and _holds_model(own := folder / MODEL):
                raise ValueError(f"{subject} is the folder of a run; give its model, {own}")
            raise FileNotFoundError(f"{subject}: the folder holds no config.json, so it is no model's")
    for option, name in given.items():
        if not Path(name).expanduser().is_dir() and (reason := _missing(name)):
            raise FileNotFoundError(f"{flag(option)} {name}: there is no such folder, and {reason}")


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or is_adapter(str(folder))


def _missing(name: str) -> str | None:
    """Say why this name cannot be loaded from the hub, or from its cache; None where it may be."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        if not any(isinstance(try_to_load_from_cache(name, file), str) for file in _CACHED):
            HfApi().model_info(name, timeout=_PATIENCE)
    except RepositoryNotFoundError:
        return "no such model on the hub, or it is private (hf auth login)"
    except HFValidationError:
        return "it cannot be a name on the hub"
    except HfHubHTTPError:
        pass  # it answers: what keeps the files from being loaded, loading them will say
    except Exception as error:  # of whichever HTTP library huggingface_hub uses
        return f"the hub, whose cache lacks it, cannot be reached ({str(error) or type(error).__name__})"
    return None


def choose_device(name: str | None) -> Any:
    """Return the torch.device of this command, and have accelerate use it: the named one, or accelerate's choice.

    Call it before anything else uses accelerate. Raises ValueError where there is no such device.
    """
    import torch
    from accelerate import Accelerator

    if name is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"--device {name}: the launcher gives each process its device; leave it out")
        there = ["cpu"]
        if torch.accelerator.is_available() and (found := torch.accelerator.current_accelerator()) is not None:
            there += [found.type, *(f"{found.type}:{i}" for i in range(torch.accelerator.device_count()))]
        if name not in there:
            raise ValueError(f"--device {name}: torch has no such device here; give one of {', '.join(there)}")
        if ":" in name:
            torch.accelerator.set_device_index(int(name.partition(":")[2]))
        os.environ["ACCELERATE_TORCH_DEVICE"] = name
    return Accelerator().device


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer."""
    from transformers import AutoTokenizer

    path = os.path.expanduser(name)
    if Path(path).is_dir() and not any(Path(path).glob("tokenizer*")):
        raise FileNotFoundError(f"{name} holds no tokenizer; name one with --tokenizer")
    with _damage_named(path):
        return AutoTokenizer.from_pretrained(path)


def load_model(
    name: str,
    dtype: DtypeName = "auto",
    *,
    trainable: bool = False,
    quantize: Bits | None = None,
    empty: bool = False,
) -> CausalLM:
    """Load a causal language model; from an adapter's folder its base with the adapter, ``trainable`` if wished.

    ``quantize``: by bitsandbytes, all but the head; 4-bit as in QLoRA (NF4, double quantisation).
    ``empty``: without weights (they are on the meta device), since another process loads them. An adapter's folder,
    and a model whose configuration does not say its dtype, are loaded nevertheless.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if quantize is not None:
        options |= _quantized(quantize, dtype)
    path = os.path.expanduser(name)
    if is_adapter(name):
        import peft

        with _damage_named(path, base_name(path)):
            return peft.AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=trainable, **options)
    if empty:
        from accelerate import init_empty_weights
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path)
        stored = config.dtype if dtype == "auto" else options["dtype"]
        if stored is not None:
            with init_empty_weights():
                return AutoModelForCausalLM.from_config(config, dtype=stored)
    with _damage_named(path):
        return AutoModelForCausalLM.from_pretrained(path, **options)


def model_loaders(
    names: Mapping[str, str | None], dtype: DtypeName, device: Any, quantize: Bits | None = None
) -> dict[str, Callable[[], CausalLM]]:
    """Return for each name that is given, under its key, what loads this model onto the device."""

    def load(name: str) -> CausalLM:
        return load_model(name, dtype, quantize=quantize).to(device)

    return {key: partial(load, name) for key, name in names.items() if name is not None}


def position_limit(name: str | None, max_length: int) -> int | None:
    """Return a model's :func:`palu.models.positions.max_positions` without its weights; None above ``max_length``."""
    from transformers import AutoConfig

    if name is None:
        return None
    if is_adapter(name):
        return position_limit(base_name(name), max_length)
    config = AutoConfig.from_pretrained(os.path.expanduser(name))
    if (getattr(config.get_text_config(), "max_position_embeddings", None) or max_length + 1) > max_length:
        return None
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from palu.models.positions import max_positions

    with init_empty_weights():
        return max_positions(AutoModelForCausalLM.from_config(config))


def is_adapter(name: str) -> bool:
    """Whether this is the folder of an adapter."""
    return (Path(os.path.expanduser(name)) / "adapter_config.json").exists()


def base_name(adapter: str) -> str | None:
    """Return the name of the model that an adapter's folder says it belongs to."""
    config = json.loads((Path(os.path.expanduser(adapter)) / "adapter_config.json").read_text(encoding="utf-8"))
    return config.get("base_model_name_or_path")


@contextmanager
def _damage_named(*folders: str | None) -> Iterator[None]:
    """Raise ValueError that names a damaged file of these folders, if the block fails and there is one."""
    try:
        yield
    except Exception as error:
        from safetensors import SafetensorError, safe_open

        files = [file for folder in folders if folder for file in sorted(Path(folder).glob("*")) if file.is_file()]
        for file in files:
            with open(file, "rb") as opened:
                if opened.read(len(_POINTER)) == _POINTER:
                    raise ValueError(f"{file} is a git-LFS pointer, not the file; run git lfs pull there") from error
            if file.suffix == ".safetensors":
                try:
                    with safe_open(file, "pt"):
                        pass
                except SafetensorError as damage:
                    raise ValueError(f"{file} is damaged ({damage}); copy or download it again") from error
        raise


def _quantized(bits: Bits, dtype: DtypeName) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` for a model that is quantised as it is loaded."""
    import torch
    from accelerate import PartialState
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("--quantize needs bitsandbytes; pip install 'palu-unlearn[quantized]'")
    config = BitsAndBytesConfig(
        load_in_8bit=bits == "8bit",
        load_in_4bit=bits == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if dtype == "float32" else torch.bfloat16,
    )
    device = PartialState().device
    # PEFT takes a map with a CPU in it for offloading.
    return {"quantization_config": config} | ({} if device.type == "cpu" else {"device_map": {"": device}})
