"""The wheel: complete, and of use without the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.waiting import HANG

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def call(*command: object, **how) -> str:
    command = tuple(map(str, command))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    [path] = folder.iterdir()
    return path


@pytest.mark.process
def test_the_wheel_holds_every_file_of_the_package_and_the_licence(wheel):
    package = ROOT / "cecompile"
    files = {p.relative_to(ROOT).as_posix() for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert {"cecompile/py.typed", "cecompile/demo/model/model.safetensors", "cecompile/demo/chat.jsonl"} <= files
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert {n for n in names if n.startswith("cecompile/")} == files
        [about] = {n.split("/")[0] for n in names - files}
        assert archive.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        entries = archive.read(f"{about}/entry_points.txt").decode()
        assert "cecompile = cecompile.__main__:main" in entries
        assert "cecompile = cecompile.lm_eval:CecompileLM" in entries


@pytest.mark.process
def test_the_demo_runs_from_the_wheel_outside_of_the_checkout(wheel, tmp_path):
    target = tmp_path / "installed"
    call(*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel)
    environment = os.environ | {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}
    where = "import cecompile, sys; print(cecompile.__file__); from cecompile.cli import main; main()"
    arguments = ("eval", "--engine", "eager", "--device", "cpu", "--limit", "20", "--output", tmp_path / "out")
    said = call(sys.executable, "-c", where, *arguments, cwd=tmp_path, env=environment)
    assert said.startswith(f"{target}/cecompile/__init__.py")
    assert "acc_norm" in said
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 20
