"""Real models and facts, on which the demo and the benchmarks try palu.

``smollm2.py`` teaches SmolLM2-135M-Instruct invented facts and has it answer; ``facts.py`` has these, the settings for
unlearning half of them, and the measures of what came out, and facts that the three models know which
``real_models.py`` loads from PyPI.
"""
