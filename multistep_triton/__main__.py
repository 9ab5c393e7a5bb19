"""``python -m multistep_triton``, which is ``debug.cli``."""

import sys

from multistep_triton.debug.cli import main

if __name__ == "__main__":
    sys.exit(main())
