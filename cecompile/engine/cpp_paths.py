"""Spaces in paths that Inductor gives to a C++ compiler.

It joins a command line and splits it again, and not all versions of torch quote all paths in between: 2.8 only those of
headers. So nothing would compile where torch is installed, or compiled code is kept, below a directory with a space.
"""

import contextlib
import functools
import inspect
import shlex
from collections.abc import Iterable
from typing import Any

from torch._inductor.cpp_builder import CppBuilder


@functools.cache
def quote_paths() -> None:
    """From now on this process's command lines have all paths quoted."""
    make = CppBuilder.__init__
    signature = inspect.signature(make)

    @functools.wraps(make)
    def make_and_quote(*args: Any, **kwargs: Any) -> None:
        make(*args, **kwargs)
        with contextlib.suppress(AttributeError, KeyError):  # another builder: its paths are left as it gives them
            _quote_in(args[0], signature.bind(*args, **kwargs).arguments)

    CppBuilder.__init__ = make_and_quote  # type: ignore[method-assign]


def _quote_in(builder: Any, given: dict[str, Any]) -> None:
    """Quotes the paths in a builder's parts of the command line, which it was given these arguments for."""
    sources, options = given["sources"], given["BuildOption"]
    header = getattr(options, "precompiled_header", None)
    for name, paths in (
        ("_sources_args", [sources] if isinstance(sources, str) else sources),
        ("_include_dirs_args", [header] if header else []),
        ("_libraries_dirs_args", options.get_libraries_dirs()),
        ("_output", [builder.get_target_file_path()]),
    ):
        setattr(builder, name, _quoted(getattr(builder, name), map(str, paths)))


def _quoted(arguments: str, paths: Iterable[str]) -> str:
    for path in paths:
        safe = shlex.quote(path)
        if safe not in arguments:
            arguments = arguments.replace(path, safe)
    return arguments
