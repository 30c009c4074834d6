"""The methods of unlearning: PALU, and those that it is compared with.

``base.py`` says what a method declares. To add one: write its file, and name it here (docs/methods.md).
"""

from palu.methods.base import Method
from palu.methods.gradient_ascent import WGA, GradientAscent, GradientDifference, SatImp
from palu.methods.palu import PaluMethod
from palu.methods.pdu import PDU
from palu.methods.preference import DPO, NPO, TPO, SimNPO
from palu.methods.rmu import RMU
from palu.methods.undial import UNDIAL

# By the name that ``objective`` gives.
METHODS: dict[str, type[Method]] = {
    "palu": PaluMethod,
    "ga": GradientAscent,
    "gd": GradientDifference,
    "dpo": DPO,
    "npo": NPO,
    "simnpo": SimNPO,
    "pdu": PDU,
    "tpo": TPO,
    "wga": WGA,
    "satimp": SatImp,
    "undial": UNDIAL,
    "rmu": RMU,
}
