# Sourced by the scripts beside it: makes a virtual environment with the package and the extras named in "$1", and
# leaves $python set. "$2" says which versions:
#   tested  (default) those of constraints.txt, in .venv
#   newest  the newest that pyproject.toml admits, in .venv-newest, brought up to date at each call
#   lowest  the lowest that pyproject.toml admits, in .venv-lowest
# A machine that already has torch (a Jetson container, say) keeps its own, and the numpy it was built with. A Linux
# machine without an NVIDIA GPU gets torch's CPU build where PyTorch's own index can be reached.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extras="$1"
versions="${2:-tested}"
venv="$root/.venv"
if [ "$versions" != tested ]; then venv="$venv-$versions"; fi
python="$venv/bin/python"
stamp="$venv/.installed-${extras//,/-}"

stop() {
    echo "$1" >&2
    exit 2
}

torch_version() {
    "$1" -c 'import torch; print(torch.__version__)' 2>/dev/null || true
}

make_venv() {
    rm -rf "$venv"
    "$base" -m venv "$@" "$venv" || { rm -rf "$venv"; stop "$base cannot make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)"; }
}

has_gpu() { # of NVIDIA; the last two are a Jetson's and that of Windows' Linux
    [ -e /dev/nvidiactl ] || [ -e /dev/nvmap ] || [ -e /dev/dxg ]
}

install() { # as pip is configured to; pip has no way to take the lowest versions, uv has
    if [ "$versions" = lowest ]; then
        "${uv[@]}" --resolution "$resolution" "$@"
    else
        "${pip[@]}" "$@"
    fi
}

install_torch() {
    if [ "$(uname -s)" = Linux ] && ! has_gpu; then
        if "${uv[@]}" --torch-backend cpu --resolution "$resolution" "$1" 2>"$venv/uv.log"; then
            return
        fi
        echo "PyTorch's index gave no CPU build of torch (see $venv/uv.log); taking PyPI's, with CUDA's libraries" >&2
    fi
    install "$1"
}

if ! "$python" -m pip --version >/dev/null 2>&1; then
    base="${PYTHON:-python3}"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        stop "cecompile needs Python 3.10 or newer; name one with PYTHON=... (found: $("$base" --version 2>&1))"
    kept="$(torch_version "$base")"
    if [ -n "$kept" ] && [ "$versions" = tested ]; then
        make_venv --system-site-packages
        if [ "$(torch_version "$python")" = "$kept" ]; then
            echo "torch==$kept" >"$venv/kept-torch.txt"
        else # torch lives in a virtual environment of its own, which another one does not see
            make_venv
        fi
    else
        make_venv
    fi
fi
if [ "$versions" = newest ] || [ ! -e "$stamp" ] || [ "$root/pyproject.toml" -nt "$stamp" ] || [ "$root/scripts/constraints.txt" -nt "$stamp" ]; then
    echo "Setting up $venv (once, some minutes) ..." >&2
    constraints="$root/scripts/constraints.txt"
    if [ -e "$venv/kept-torch.txt" ]; then
        {
            grep -vE '^(torch|numpy|triton)==' "$constraints"
            cat "$venv/kept-torch.txt"
            "$python" "$root/scripts/keep_installed.py" | grep '^pyarrow' || true # where the NumPy is an old one
        } >"$venv/constraints.txt"
        constraints="$venv/constraints.txt"
    fi
    pip=("$python" -m pip install --quiet --disable-pip-version-check)
    uv=("$venv/bin/uv" pip install --quiet --python "$python")
    resolution=highest
    case "$versions" in
    tested) pip+=(--constraint "$constraints") uv+=(--constraint "$constraints") ;;
    newest) pip+=(--upgrade --upgrade-strategy eager) ;;
    lowest) resolution=lowest-direct ;;
    esac
    "${pip[@]}" uv
    if [ -z "$(torch_version "$python")" ] || [ "$versions" = newest ]; then
        install_torch 'torch>=2.8.0a0'
    fi
    "${pip[@]}" 'torch>=2.8.0a0' ||
        stop "cecompile needs torch 2.8 or newer; this machine keeps $(cat "$venv/kept-torch.txt" 2>/dev/null || echo none)"
    install --editable "$root[$extras]"
    for pth in "$venv"/lib/python3*/site-packages/*.pth; do # Python before 3.13 reads them in the locale's encoding
        if [ "$(cat "$pth")" = "$root" ]; then
            echo ../../../.. >"$pth" # the same folder by a name that every locale can spell
        fi
    done
    if [[ ",$extras," = *,test,* && "$(uname -s)" = Linux ]] &&
        "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then
        "${pip[@]}" triton # compiles for a GPU that is not there, as a test does; other builds of torch have their own
    fi
    touch "$stamp"
fi
