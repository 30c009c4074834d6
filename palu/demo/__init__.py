"""The demo: teach SmolLM2-135M-Instruct twelve invented facts, then make it forget six of them."""
