"""``python -m palu``: the ``palu`` command, for ``accelerate launch -m palu unlearn ...``."""

from palu.cli import main

if __name__ == "__main__":
    main()
