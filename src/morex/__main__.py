"""`python -m morex` is the command `morex`."""

import sys

from morex.cli import main

if __name__ == "__main__":
    sys.exit(main())
