"""Prints pip constraints that keep what is installed here and must not be replaced: torch, and what it was built with.

python3 scripts/keep_installed.py scripts/image.txt > kept.txt && python3 -m pip install --constraint kept.txt cecompile

The constraints of a file follow, but for packages that are kept.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

KEPT = re.compile(r"(torch|torchvision|torchaudio|pytorch-triton|triton|numpy|nvidia-.+|cuda-.+)")


def constraints() -> list[str]:
    """One line for each of them, `name==version`, and one for what goes with an old NumPy alone; sorted."""
    named = [d for d in metadata.distributions() if "Name" in (d.metadata or ())]  # a broken installation has no name
    found = {_normal(d.metadata["Name"]): d.version for d in named}
    kept = [f"{name}=={version}" for name, version in found.items() if KEPT.fullmatch(name)]
    if found.get("numpy", "").startswith("1."):
        kept.append("pyarrow<26")  # which needs NumPy 2, and does not say so to pip
    return sorted(kept)


def without_kept(lines: list[str]) -> list[str]:
    """The lines `name==version`, without comments and without packages that are kept."""
    pins = [line for line in lines if line and not line.startswith("#")]
    return [line for line in pins if not KEPT.fullmatch(_normal(line.partition("==")[0]))]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    pinned = [line for file in sys.argv[1:] for line in Path(file).read_text(encoding="utf-8").splitlines()]
    print("\n".join(constraints() + without_kept(pinned)))
