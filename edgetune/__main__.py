"""Runs the `edgetune` command, also as `python -m edgetune`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command. Ctrl-C while its modules are imported ends it as it does later: with one line and exit code 130."""
    try:
        from edgetune.cli.main import main as command
    except KeyboardInterrupt:
        sys.stderr.write("edgetune: interrupted.\n")
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
