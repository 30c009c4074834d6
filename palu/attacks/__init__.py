"""What an attacker gets out of an unlearned model: :func:`palu.audit`, which is in ``run.py``.

``ask.py``, ``formats.py``, ``quantise.py``, ``relearn.py`` and ``inside.py`` are the attacks, ``attack.py`` says what
an attack is, ``secrets.py`` what is looked for, and ``estimators.py`` how a verdict is reached.
"""
