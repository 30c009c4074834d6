"""What an attacker gets out of an unlearned model: ``palu.audit(...)``, which is :func:`palu.audit.run.audit`.

``ask.py``, ``sample.py``, ``onset.py``, ``quantise.py``, ``relearn.py`` and ``lens.py`` are the attacks, ``attack.py``
says what an attack is, ``secrets.py`` what is looked for, ``estimators.py`` how a verdict is reached, and ``run.py``
puts them together.
"""

import sys
from inspect import signature
from types import ModuleType

from palu.audit.run import audit


class _Audit(ModuleType):
    """A module that is called: import sets ``palu.audit`` to this package, whatever ``palu`` calls by that name."""

    __call__ = staticmethod(audit)


__signature__ = signature(audit)
sys.modules[__name__].__class__ = _Audit
