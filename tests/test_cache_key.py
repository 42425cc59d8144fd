"""The compile cache's key: changes with all code that changes compiled code, and with no other."""

import ast
import shutil
from pathlib import Path

import pytest

from cecompile.compile_cache.key import PACKAGE, hashed_files, source_digest

COMPILED = ("engine.forward", "engine.decode", "partitioned.streaming", "partitioned.span", "partitioned.pipeline")
CANNOT_CHANGE_IT = {  # whatever these do, the same modules are compiled for the same inputs
    "device", "errors", "procfs", "model.load", "model.prefetch", "model.safetensors_reader",
}  # fmt: skip


def file_of(module: str) -> Path | None:
    """The file of a module of the package; None where there is no such module."""
    place = PACKAGE / module.replace(".", "/")
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def imported_by(module: str) -> set[str]:
    """The package's modules that a module imports, at its top or within a function."""
    file = file_of(module)
    assert file is not None, module
    out = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            out |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = [name.removeprefix("cecompile.") for name in out if name.startswith("cecompile.")]
    return {name if file_of(name) else name.rpartition(".")[0] for name in inside}


def test_all_that_changes_compiled_code_is_hashed():
    reached, left = set(), set(COMPILED)
    while left:
        module = left.pop()
        reached.add(module)
        if module not in CANNOT_CHANGE_IT:
            left |= imported_by(module) - reached
    hashed = set(hashed_files(PACKAGE))
    assert reached >= CANNOT_CHANGE_IT, "no longer imported"
    assert {module for module in reached if file_of(module) not in hashed} == CANNOT_CHANGE_IT


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("engine/forward.py", True),
        ("engine/attention.py", True),
        ("workload/tree.py", True),
        ("partitioned/span.py", True),
        ("model/support.py", True),
        ("planning/profiles.py", False),
        ("model/load.py", False),
        ("compile_cache/store.py", False),
        ("run/runtime.py", False),
    ],
)
def test_an_edit_changes_the_key_where_it_may_change_compiled_code(file, changes, tmp_path):
    package = tmp_path / "cecompile"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "demo", "fonts"))
    before = source_digest(package)
    source_digest.cache_clear()
    with (package / file).open("a", encoding="utf-8") as source:
        source.write("EDITED = True\n")
    assert (source_digest(package) != before) == changes


def test_folders_within_a_hashed_folder_are_hashed(tmp_path):
    package = tmp_path / "cecompile"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "demo", "fonts"))
    before = source_digest(package)
    source_digest.cache_clear()
    (package / "engine" / "kernels").mkdir()
    (package / "engine" / "kernels" / "new.py").write_text("")
    assert source_digest(package) != before
