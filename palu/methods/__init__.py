"""The methods of unlearning, a file each: PALU, and those that it is compared with.

``base.py`` says what a method declares. To add one: write its file, and name it here (docs/methods.md).
"""

from palu.methods.base import Method
from palu.methods.dpo import DPO
from palu.methods.gradient_ascent import GradientAscent, GradientDifference
from palu.methods.npo import NPO
from palu.methods.palu import PaluMethod
from palu.methods.satimp import SatImp
from palu.methods.simnpo import SimNPO
from palu.methods.tpo import TPO
from palu.methods.undial import UNDIAL

# By the name that ``objective`` gives.
METHODS: dict[str, type[Method]] = {
    "palu": PaluMethod,
    "ga": GradientAscent,
    "gd": GradientDifference,
    "dpo": DPO,
    "npo": NPO,
    "simnpo": SimNPO,
    "tpo": TPO,
    "satimp": SatImp,
    "undial": UNDIAL,
}
