"""Builds palu._C where torch is installed; everything else is in pyproject.toml.

The C++ and CUDA sources travel in the package, as palu/csrc, for builds just in time.
"""

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from palu import _build  # noqa: E402


def extension() -> dict[str, Any]:
    try:
        from torch.utils import cpp_extension
    except ModuleNotFoundError:
        print("torch is not installed here: palu compiles its ops on first use", file=sys.stderr)
        return {}
    _build.prepare_environment()
    kind = cpp_extension.CUDAExtension if _build.with_cuda() else cpp_extension.CppExtension
    module = kind(
        "palu._C",
        # setuptools wants paths relative to setup.py.
        [os.path.relpath(path, ROOT) for path in _build.sources()],
        depends=[os.path.relpath(path, ROOT) for path in _build.headers()],
        include_dirs=_build.include_dirs(),
        extra_compile_args={"cxx": _build.CXX_FLAGS, "nvcc": _build.NVCC_FLAGS},
        extra_link_args=_build.LINK_FLAGS,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


native = ["palu.csrc", "palu.csrc.cpu", "palu.csrc.cuda"]
setup(
    packages=[*find_packages(include=["palu", "palu.*"]), *native],
    package_dir={"palu": "palu", "palu.csrc": "csrc"},
    package_data={
        "palu": ["py.typed"],
        "palu.attacks": ["unrelated.txt"],
        "palu.ref_model": ["anchor_prompts.txt"],
        "palu.testbed": ["*.json", "*.jsonl"],
        "palu.report": ["*.css", "*.jinja"],
        **{name: ["*.h", "*.cuh", "*.cpp", "*.cu"] for name in native},
    },
    **extension(),
)
