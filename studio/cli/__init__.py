"""The command line: ``studio``.

Nothing heavy is imported before a command really runs, so that every ``--help`` answers at once.
"""

import sys


def main() -> None:
    """Entry point of the console script."""
    from studio.cli.app import run

    sys.exit(run(sys.argv[1:]))
