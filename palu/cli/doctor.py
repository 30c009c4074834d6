"""``palu doctor``: check the installation."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

import typer

from palu.cli.models import choose_device

PACKAGES = ("transformers", "accelerate", "peft", "bitsandbytes", "datasets", "tensorboard", "wandb")


def doctor() -> None:
    """Tell which native ops are loaded and what serves each device; try every op against its plain-PyTorch twin.

    Exit status 1: they do not load, or one of them fails.
    """
    import torch

    import palu

    print(f"palu {palu.__version__}, from {Path(palu.__file__).parent}")
    print(f"python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}")
    print(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available() and (found := torch.accelerator.current_accelerator()) is not None:
        devices.append(torch.device(found.type, torch.accelerator.current_device_index()))
    for device in devices:
        name = f"{torch.get_num_threads()} threads" if device.type == "cpu" else device.type
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
        print(f"device {device}: {name}")
    print(f"runs use {choose_device(None)}, as accelerate chooses; --device names another one")
    try:
        from palu import ops
    except ImportError as error:
        print(f"\n{error}\n\n{_tools()}")
        raise typer.Exit(1) from None
    way = "prebuilt" if Path(ops.extension_path()).parent == Path(palu.__file__).parent else "compiled just in time"
    print(f"native ops: {way}, {ops.extension_path()}")

    from palu.ops.library import NATIVE_DEVICES, no_native_kernels
    from palu.ops.selftest import check_ops

    for device in devices:
        native = device.type in NATIVE_DEVICES
        print(f"kernels on {device}: {'native' if native else no_native_kernels(device.type)}")
    print()
    failed = 0
    for device in devices:
        for check in check_ops(device):
            failed += not check.passed
            subject = check.problem or f"{check.error:.1e}, allowed {check.allowed:.1e}"
            print(f"{'ok' if check.passed else 'FAILED':7} {check.op:38} {check.device:7} {check.dtype:8} {subject}")
    print("\nLargest difference to the twin in float64, relative; allowed: 4 times torch's in that dtype, or 64 ulps.")
    print("All passed." if not failed else f"{failed} failed: the ops are not to be trusted here.\n{_tools()}")
    if failed:
        raise typer.Exit(1)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _tools() -> str:
    """List what a build of the extension needs, and where it was found."""
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    ninja = shutil.which("ninja") or ("python package" if importlib.util.find_spec("ninja") else None)
    cuda = cpp_extension.CUDA_HOME
    nvcc = cuda and shutil.which("nvcc", path=os.path.join(cuda, "bin"))
    found = {f"C++ compiler ({compiler})": shutil.which(compiler), "ninja": ninja, "nvcc (for CUDA only)": nvcc}
    lines = [f"  {tool}: {path or 'not found'}" for tool, path in found.items()]
    return "\n".join(["what a build of the native ops needs:", *lines, f"  python: {sys.executable}"])
