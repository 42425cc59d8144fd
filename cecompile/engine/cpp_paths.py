"""Spaces in paths that Inductor passes to a C++ compiler.

Inductor joins a command line and splits it again, and some versions of torch do not quote all paths in between (2.8
quotes headers only). Without this, nothing compiles where torch or the compiled code is in a directory with a space.
"""

import contextlib
import functools
import inspect
import shlex
from typing import Any

from torch._inductor.cpp_builder import CppBuilder


@functools.cache
def quote_paths() -> None:
    """Makes this process quote all paths from now on."""
    make = CppBuilder.__init__
    signature = inspect.signature(make)

    @functools.wraps(make)
    def make_and_quote(*args: Any, **kwargs: Any) -> None:
        make(*args, **kwargs)
        with contextlib.suppress(AttributeError, KeyError):  # a builder of another form is left as it is
            _quote_in(args[0], signature.bind(*args, **kwargs).arguments)

    CppBuilder.__init__ = make_and_quote  # type: ignore[method-assign]


def _quote_in(builder: Any, given: dict[str, Any]) -> None:
    """Quotes the paths in a builder's parts of the command line; `given` are the builder's own arguments."""
    sources, options = given["sources"], given["BuildOption"]
    header = getattr(options, "precompiled_header", None)
    for name, paths in (
        ("_sources_args", [sources] if isinstance(sources, str) else sources),
        ("_include_dirs_args", [header] if header else []),
        ("_libraries_dirs_args", options.get_libraries_dirs()),
        ("_output", [builder.get_target_file_path()]),
    ):
        arguments: str = getattr(builder, name)
        for path in map(str, paths):
            safe = shlex.quote(path)
            if safe not in arguments:
                arguments = arguments.replace(path, safe)
        setattr(builder, name, arguments)
