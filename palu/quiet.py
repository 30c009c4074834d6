"""Keep off a command's output what nobody needs: noise of other libraries, the source line of a warning."""

from __future__ import annotations

import logging
import os
import warnings
from functools import partial
from pathlib import Path

# A logger, and what stands in the message that is left out.
NOISE = {
    "torchao": "Failed to load ",  # kernels of GPUs that are not here; transformers imports it
    "torch.utils._pytree": "is an Enum subclass",  # of torchao
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # PEFT imports it
    # The model's own settings for sampling, which palu does not use.
    "transformers.generation.configuration_utils": "The following generation flags are not valid",
}


def silence_noise() -> None:
    """Leave out the messages in NOISE, and a warning of transformers at what PEFT reads."""
    for name, text in NOISE.items():
        logging.getLogger(name).addFilter(partial(_is_other, text))
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def shorten_warnings() -> None:
    """Write palu's own warnings in one line, as errors are: "palu: warning: ..."."""
    package, in_full = Path(__file__).parent, warnings.formatwarning

    def in_short(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if Path(filename).is_relative_to(package):
            return f"palu: warning: {message}\n"
        return in_full(message, category, filename, lineno, line)

    warnings.formatwarning = in_short


def _is_other(text: str, record: logging.LogRecord) -> bool:
    return text not in record.getMessage()


def hide_progress_bars() -> None:
    """Switch off the progress bars of transformers, huggingface_hub and datasets."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of huggingface_hub, too
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read by its import
