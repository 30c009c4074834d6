"""Training: ``loop.py`` is ``palu.unlearn`` and reads like the algorithm; the rest is what it calls."""
