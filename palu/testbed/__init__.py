"""A small real model and invented facts, on which the demo and the benchmarks try palu.

``smollm2.py`` loads SmolLM2-135M-Instruct, teaches it facts and has it answer; ``facts.py`` has the facts, the settings
for unlearning half of them, and the measures of what came out.
"""
