"""``python -m ctgate``."""

import sys

from ctgate.cli import main

if __name__ == "__main__":
    sys.exit(main())
