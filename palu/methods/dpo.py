"""Direct preference optimisation towards an alternate answer (arXiv 2305.18290; TOFU's "IdkDPO", arXiv 2401.06121)::

forget = mean over examples of -2/beta * log sigmoid(beta * ((NLL - NLL_ref)(answer) - (NLL - NLL_ref)(alternate)))
"""

from __future__ import annotations

from palu.data.packing import Items, pair_items
from palu.methods.base import ForgetSet
from palu.methods.npo import NPO
from palu.settings import RunSettings


class DPO(NPO):
    """NPO with the tokens of an alternate answer as others."""

    title = "direct preference optimisation (DPO)"

    @staticmethod
    def make_items(forget: ForgetSet, config: RunSettings) -> Items:
        """Make the items of the forget set: the answer's tokens are targets, the alternate answer's others."""
        return pair_items(forget.examples, forget.alternates())
