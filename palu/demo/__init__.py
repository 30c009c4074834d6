"""The demo: teach SmolLM2-135M-Instruct twelve invented facts, then make it forget six of them."""

from palu.quiet import silence_noise

silence_noise()  # before __main__ imports the libraries that make it
