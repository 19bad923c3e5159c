"""`python -m vmibridge`: the same as the `vmibridge` command."""

import sys

from vmibridge.cli import main

if __name__ == "__main__":
    sys.exit(main())
