# Sourced by the scripts beside it: makes .venv with the package and the extras named in "$1", and leaves $python set.
# A machine that already has torch (a Jetson container, say) keeps its own; elsewhere a tested version is pinned.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extras="$1"
venv="$root/.venv"
python="$venv/bin/python"
stamp="$venv/.installed-${extras//,/-}"

if [ ! -x "$python" ]; then
    base="${PYTHON:-python3}"
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "cecompile needs Python 3.10 or newer; name one with PYTHON=... (found: $("$base" --version 2>&1))" >&2
        exit 2
    fi
    if "$base" -c 'import torch' 2>/dev/null; then
        "$base" -m venv --system-site-packages "$venv"
        "$python" -c 'import torch; print(f"torch=={torch.__version__}")' >"$venv/kept-torch.txt"
    else
        "$base" -m venv "$venv"
    fi
fi
if [ ! -e "$stamp" ] || [ "$root/pyproject.toml" -nt "$stamp" ] || [ "$root/scripts/constraints.txt" -nt "$stamp" ]; then
    echo "Setting up $venv (once, some minutes) ..." >&2
    constraints="$root/scripts/constraints.txt"
    if [ -e "$venv/kept-torch.txt" ]; then
        { grep -v '^torch==' "$constraints"; cat "$venv/kept-torch.txt"; } >"$venv/constraints.txt"
        constraints="$venv/constraints.txt"
    fi
    pip=("$python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints")
    "${pip[@]}" torch
    "${pip[@]}" --editable "$root[$extras]"
    touch "$stamp"
fi
