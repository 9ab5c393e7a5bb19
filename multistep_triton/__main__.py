"""Runs the command line of ``debug.cli``, for ``python -m multistep_triton``."""

import sys

from multistep_triton.debug.cli import main

if __name__ == "__main__":
    sys.exit(main())
