"""`python -m cecompile`, and the console script."""

import os
import re
import sys
from collections import deque
from collections.abc import Sequence

from cecompile import streams
from cecompile.interrupt import Interrupted, end_children, signals_raise


def main() -> None:
    """Imports and runs the command line. The import takes a moment, in which a signal may come too.

    Under `python -O` or PYTHONOPTIMIZE the process starts anew without: torch's compiler relies on `assert`.
    """
    options = without_optimization(sys.orig_argv[1:])
    optimized = os.environ.pop("PYTHONOPTIMIZE", None)
    if sys.flags.optimize and (optimized or options != sys.orig_argv[1:]):
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


def without_optimization(arguments: Sequence[str]) -> list[str]:
    """The arguments of an interpreter, such as `-BOO -m cecompile eval`, without the option `-O`."""
    kept: list[str] = []
    left = deque(arguments)
    while left and re.match("-[^-]", left[0]):
        plain, valued = re.fullmatch("-([^cmWX]*)(.*)", left.popleft(), re.DOTALL).groups()  # type: ignore[union-attr]
        option = plain.replace("O", "") + valued
        kept += [f"-{option}"] if option else []
        if len(valued) == 1 and left:  # the value is the next argument
            kept.append(left.popleft())
        if valued[:1] in ("c", "m"):  # all that follows is the program's
            break
    return [*kept, *left]


if __name__ == "__main__":
    main()
