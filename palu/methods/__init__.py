"""The methods of unlearning: PALU, and those that it is compared with. ``base.py`` says what a method declares."""

from palu.methods.base import Method
from palu.methods.baselines import DPO, NPO, PDU, TPO, UNDIAL, WGA, GradientAscent, SimNPO
from palu.methods.palu import PaluMethod
from palu.methods.rmu import RMU

# By the name that ``UnlearnConfig.objective`` gives.
METHODS: dict[str, type[Method]] = {
    "palu": PaluMethod,
    "ga": GradientAscent,
    "gd": GradientAscent,
    "dpo": DPO,
    "npo": NPO,
    "simnpo": SimNPO,
    "pdu": PDU,
    "tpo": TPO,
    "wga": WGA,
    "undial": UNDIAL,
    "rmu": RMU,
}
