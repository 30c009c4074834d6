"""`import palu` is instant, and yet every public name is there."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import palu
assert "torch" not in sys.modules
# Those first that import none of the others, so that each one is found by itself.
folders = ["eager", "ops", "data", "losses", "evaluate"]
for name in folders:
    assert name in dir(palu) and name not in vars(palu), name
    assert getattr(palu, name) is sys.modules[f"palu.{name}"]
for name in palu.__all__:
    getattr(palu, name)
try:
    palu.nothing
except AttributeError as error:
    assert str(error) == "module 'palu' has no attribute 'nothing'"
else:
    raise AssertionError
"""


def test_every_public_name_is_found_on_first_use() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
