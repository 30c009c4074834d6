"""Load the models and tokenizers that commands are given by folder or name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from palu.models.lora import CausalLM

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def check_names(**names: str | None) -> None:
    """Raise FileNotFoundError where the name given for an option must be a folder, and no model is there.

    transformers would ask the hub for it, or complain of packages that are missing.
    """
    for option, name in names.items():
        if name is None:
            continue
        told, folder = f"--{option.replace('_', '-')} {name}", Path(name).expanduser()
        if not folder.is_dir():
            if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
                raise FileNotFoundError(f"{told}: there is no such folder")
        elif option == "tokenizer":
            if not any(folder.glob("tokenizer*")):
                raise FileNotFoundError(f"{told}: the folder holds no tokenizer")
        elif not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(f"{told}: the folder holds no config.json, so it is no model's")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer. Raises OSError or ValueError where there is none."""
    from transformers import AutoTokenizer

    path = _expanded(name)
    if Path(path).is_dir() and not any(Path(path).glob("tokenizer*")):
        raise FileNotFoundError(f"{name} holds no tokenizer; name one with --tokenizer")
    return AutoTokenizer.from_pretrained(path)


def load_model(name: str, dtype: Dtype = "auto", *, trainable: bool = False) -> CausalLM:
    """Load a causal language model; from an adapter's folder its base with the adapter, ``trainable`` if wished.

    Raises OSError or ValueError where there is none, ImportError where an adapter needs PEFT.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    path = _expanded(name)
    if (Path(path) / "adapter_config.json").exists():
        peft = import_peft(f"{name} holds an adapter")
        return peft.AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=trainable, **options)
    return AutoModelForCausalLM.from_pretrained(path, **options)


def import_peft(why: str) -> Any:
    """Import ``peft``, or raise an ImportError that says why it is needed and how to get it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"{why}, which needs peft ({error}); pip install 'palu-unlearn[lora]'") from error
    return peft


def _expanded(name: str) -> str:
    return str(Path(name).expanduser()) if name.startswith("~") else name
