"""Evaluate what a model has forgotten and still knows: on one's own questions, TOFU (arXiv 2401.06121), MUSE
(arXiv 2407.06460).

Results have open-unlearning's form (arXiv 2506.12618), so its published logs serve as ``retain_results`` and can be
recomputed by :func:`summarize`.
"""

from palu.evaluate.muse import load_muse, muse
from palu.evaluate.questions import questions
from palu.evaluate.summarize import summarize
from palu.evaluate.tofu import TofuData, load_tofu, tofu

__all__ = ["TofuData", "load_muse", "load_tofu", "muse", "questions", "summarize", "tofu"]
