"""``python -m fwdlib``: see :mod:`fwdlib.cli`."""

import sys

from fwdlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
