"""`python -m funnel` runs the command `funnel`."""

import sys

from funnel.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
