"""The methods of unlearning: PALU, and seven that it is compared with. ``base.py`` says what a method declares."""

from palu.methods.base import Method
from palu.methods.baselines import DPO, NPO, PDU, TPO, GradientAscent, SimNPO
from palu.methods.palu import PaluMethod

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
}
