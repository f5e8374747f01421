"""``python -m depthcb``: the same as ``depthcb``."""

import sys

from depthcb.cli import main

if __name__ == "__main__":
    sys.exit(main())
