"""The record of a run, and what is made of it for people.

``recorder.py`` looks at the model before and after, and ``manifest.py`` notes hashes and versions. ``write.py`` writes
the run's folder, and from its files alone ``report.html`` and the card: ``reading.py`` reads them, ``view.py`` chooses
what is shown, of an audit ``audited.py``, ``words.py`` says settings and metrics in plain words, ``plots.py`` lays out
charts, and the templates draw, redact and say what was asked (``asked.jinja``). ``token_roles.py`` shows which tokens a
run acts on.
"""
