"""Shared objects compiled once a session: a g++ that keeps its results, for tests that compile the same code anew.

Inductor names a source by a digest of the source, and each compile cache has a directory of its own. So the same code
is compiled again wherever a test begins with an empty cache.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

_SCRIPT = r"""#!/bin/bash
# The compiler {compiler}; a shared object of the same source, by the same arguments, is copied.
for argument; do
    case "$before" in -o) out="$argument" ;; esac
    case "$argument" in *.cpp) source="$argument" ;; esac
    before="$argument"
done
case "$out" in *.so) ;; *) exec "{compiler}" "$@" ;; esac
arguments="${{*//"$source"/}}"
read -r key _ < <(cat "$source" - <<<"${{arguments//"$out"/}}" | sha256sum)
if ! cp "{store}/$key" "$out" 2>/dev/null; then
    "{compiler}" "$@" || exit
    cp "$out" "$out.kept" && mv "$out.kept" "{store}/$key"
fi
"""


def keep() -> None:
    """Puts such a g++ first on PATH, for this process and those that it starts."""
    compiler = shutil.which("g++")
    if compiler is None:
        return
    store = Path(tempfile.mkdtemp(prefix="cecompile-objects-"))
    atexit.register(shutil.rmtree, store, ignore_errors=True)
    script = store / "bin" / "g++"
    script.parent.mkdir()
    script.write_text(_SCRIPT.format(compiler=compiler, store=store))
    script.chmod(0o755)
    os.environ["PATH"] = f"{script.parent}:{os.environ['PATH']}"
