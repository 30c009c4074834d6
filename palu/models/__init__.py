"""Transformers models as palu uses them.

``head.py`` reaches the output layer, ``lora.py`` reaches through a ``PeftModel``, ``quantized.py`` knows quantised
bases, ``attention.py`` attends within the examples of a packed sequence, ``generation.py`` generates answers,
``checks.py`` refuses what palu does not work with.
"""
