"""Prints pip constraints that keep what is installed here and must not be replaced: torch, and what it was built with.

python3 scripts/keep_installed.py > kept.txt && python3 -m pip install --constraint kept.txt cecompile
"""

import re
from importlib import metadata

KEPT = re.compile(r"(torch|torchvision|torchaudio|pytorch-triton|triton|numpy|nvidia-.+|cuda-.+)")


def constraints() -> list[str]:
    """One line for each of them, `name==version`, and one for what goes with an old NumPy alone; sorted."""
    found = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version for d in metadata.distributions()}
    kept = [f"{name}=={version}" for name, version in found.items() if KEPT.fullmatch(name)]
    if found.get("numpy", "").startswith("1."):
        kept.append("pyarrow<26")  # which needs NumPy 2, and does not say so to pip
    return sorted(kept)


if __name__ == "__main__":
    print("\n".join(constraints()))
