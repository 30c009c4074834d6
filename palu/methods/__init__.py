"""The methods of unlearning: PALU, and in ``baseline.py`` those that it is compared with.

``base.py`` says what a method declares. To add one: write its file, and name it here (docs/methods.md).
"""

from palu.methods.base import Method
from palu.methods.baseline import DPO, NPO, TPO, UNDIAL, GradientAscent, GradientDifference, SatImp, SimNPO
from palu.methods.palu import PaluMethod

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
