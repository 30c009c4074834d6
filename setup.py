"""Builds palu._C where torch is installed, for that torch; everything else is in pyproject.toml.

What is built then says so: its version ends in +torch2.13cpu, say, and it requires torch 2.13. The C++ and CUDA sources
travel in the package, as palu/csrc, for builds just in time.
"""

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from palu import _build  # noqa: E402


class TorchInfo(egg_info):
    """Name the torch in the version, and require it: an extension works with the release that it was built for."""

    def finalize_options(self) -> None:
        self.tag_build = f"+{_build.torch_tag()}"
        pinned = f"torch=={_build.torch_release()}.*"
        dist = self.distribution
        needed = [pinned if name.startswith("torch>") else name for name in dist.install_requires]
        dist.install_requires = dist.metadata.install_requires = needed
        super().finalize_options()


def extension() -> dict[str, Any]:
    if "sdist" in sys.argv:  # sources are for every torch
        return {}
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
        extra_compile_args={"cxx": _build.CXX_FLAGS, "nvcc": _build.NVCC_FLAGS},
        extra_link_args=_build.LINK_FLAGS,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension, "egg_info": TorchInfo}}


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
