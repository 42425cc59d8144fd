"""`python -m cecompile`, and the console script."""

import os
import sys

from cecompile import streams
from cecompile.interrupt import Interrupted, end_children, signals_raise


def main() -> None:
    """Imports and runs the command line. The import takes a moment, in which a signal may come too.

    Under `python -O` or PYTHONOPTIMIZE the process starts anew without: torch's compiler relies on `assert`.
    """
    options = [option for option in sys.orig_argv[1:] if option not in ("-O", "-OO")]
    optimized = os.environ.pop("PYTHONOPTIMIZE", None)
    if sys.flags.optimize and (optimized or len(options) < len(sys.orig_argv) - 1):
        os.execv(sys.executable, [sys.executable, *options])
    streams.never_fail()
    try:
        with signals_raise():
            from cecompile.cli import main as command

            command()
    except Interrupted as error:
        sys.stderr.write(f"cecompile: {error}\n")
        end_children()
        streams.flush()
        os._exit(error.status)


if __name__ == "__main__":
    main()
