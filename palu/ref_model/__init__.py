"""The frozen reference model: run once before training, and whatever the loss will need of it kept.

``precompute.py`` runs it, ``storage.py`` holds what it gave and keeps that on disk under a key made of
``fingerprint.py``. ``anchors.py`` has it write: its answers to the prompts of ``anchor_prompts.txt``, questions like
those to be forgotten (``neighbours.py``), and other ways to tell a secret (``variants.py``). ``shared.py`` finds what
secrets begin with as neighbours' answers do.
"""
