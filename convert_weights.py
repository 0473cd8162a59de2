"""Converts a checkpoint to another format; same as `funnel convert`."""

import sys

from funnel.cli.convert import main as run_convert


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_convert("convert_weights.py", arguments)


if __name__ == "__main__":
    sys.exit(main())
