"""`python -m cecompile`, and the console script."""

import os
import sys

from cecompile.interrupt import Interrupted, signals_raise


def main() -> None:
    """Imports the command line, which takes a moment in which it may be interrupted too, and runs it."""
    try:
        with signals_raise():
            from cecompile.cli import main as command

            command()
    except Interrupted as error:
        sys.stderr.write(f"cecompile: {error}\n")
        sys.stderr.flush()
        os._exit(error.status)


if __name__ == "__main__":
    main()
