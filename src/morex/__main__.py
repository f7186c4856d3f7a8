"""`python -m morex` is the command `morex`."""

import os
import sys

from morex.cli import main

if __name__ == "__main__":
    code = main()
    if "WORLD_SIZE" in os.environ:
        # One of several ranks. Threads of its process groups may outlive the interpreter, which then aborts.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
