"""The frozen reference model: run once before training, and whatever the loss will need of it kept.

``precompute.py`` runs it, ``storage.py`` holds what it gave and keeps that on disk under a key made of
``fingerprint.py``, and ``anchors.py`` has it answer the prompts of ``anchor_prompts.txt``.
"""
