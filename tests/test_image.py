"""The container images: linted, and their steps taken in a virtual environment, since no Docker engine runs here."""

import contextlib
import fnmatch
import io
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from support.waiting import HANG

ROOT = Path(__file__).parents[1]
DOCKERFILES = ("Dockerfile", "scripts/Dockerfile.warm")
PATHS = re.compile(r"(?<![\w.}/$])/(?=(source|wheels|cache|model|work|home|opt)\b)")
PINS = ROOT / "scripts" / "image.txt"


def instructions(name: str) -> list[dict]:
    parser = DockerfileParser(fileobj=io.BytesIO((ROOT / name).read_bytes()))
    return [i for i in parser.structure if i["instruction"] != "COMMENT"]


@pytest.mark.process
@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_linter_finds_nothing(name):
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([hadolint, "--no-color", ROOT / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_what_is_copied_is_in_the_build_context():
    patterns = [p for p in (ROOT / ".dockerignore").read_text().splitlines() if p and not p.startswith("#")]
    assert patterns[0] == "*"
    let_in = [p[1:] for p in patterns if p.startswith("!")]
    for step in instructions("Dockerfile"):
        if step["instruction"] == "COPY" and "--from" not in step["value"]:
            for source in step["value"].split()[:-1]:
                assert (ROOT / source).exists()
                assert any(fnmatch.fnmatch(source, pattern) for pattern in let_in), source


def pins(file: Path) -> dict[str, str]:
    """The version of each package that a file of constraints pins, by name."""
    lines = [line.partition(";")[0].strip() for line in file.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines if line)


def test_all_that_is_installed_beside_torch_is_pinned_as_in_the_tests():
    pinned, tested = pins(PINS), pins(ROOT / "scripts" / "constraints.txt")
    required = [Requirement(line) for line in metadata.requires("cecompile")]
    names = {one.name for one in required if one.marker is None or one.marker.evaluate({"extra": "report"})}
    assert names - set(pinned) == {"torch", "numpy"}
    assert {name: tested[name] for name in pinned.keys() & tested.keys()}.items() <= pinned.items()


def test_no_step_of_pip_keeps_to_the_bases_own_constraints():
    cleared = False
    for step in instructions("Dockerfile"):
        if step["instruction"] == "FROM":
            cleared = False
        elif step["instruction"] == "ENV":
            cleared = cleared or "PIP_CONSTRAINT=" in shlex.split(step["value"])
        elif step["instruction"] == "RUN" and "pip" in step["value"]:
            assert cleared, step["value"]


class Replay:
    """Takes a Dockerfile's steps in the order of the file, with `root` in place of / for the paths that it names.

    The base image's Python is a virtual environment that sees what the tests' own has, but for this package, and a
    distribution without a name. So pip finds every requirement and asks no index; the versions pinned are those at
    hand. `useradd` and `chown` only note what they are asked for.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment: dict[str, str] = {}
        self.log = root / "log"
        self._arguments: dict[str, str] = {}
        base = root / "base"
        base.mkdir(parents=True)
        for folder in {sysconfig.get_path(name) for name in ("purelib", "platlib")} | set(_outer_packages()):
            for entry in Path(folder).iterdir():
                if "cecompile" not in entry.name and not (base / entry.name).is_symlink():
                    (base / entry.name).symlink_to(entry)
        (base / "nameless-1.0.dist-info").mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True)
        command = [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        (Path(site) / "base.pth").write_text(str(base))

    @property
    def python(self) -> Path:
        return self.root / "venv" / "bin" / "python3"

    def run(self, steps: list[dict], **variables: str) -> str:
        """Takes the steps and returns what they print; those that only say how a container is started are left out."""
        printed = ""
        for step in steps:
            name, value = step["instruction"], step["value"]
            if name == "ARG":
                key, _, default = value.partition("=")
                self._arguments[key] = default
            elif name == "ENV":
                self.environment |= dict(pair.split("=", 1) for pair in shlex.split(value))
            elif name == "COPY":
                *sources, target = (part for part in value.split() if not part.startswith("--"))
                self._copy([self.placed(s) if s.startswith("/") else str(ROOT / s) for s in sources], target)
            elif name == "RUN":
                printed += self._shell(value, variables)
            else:
                assert name in ("FROM", "USER", "WORKDIR", "VOLUME", "ENTRYPOINT", "CMD"), name
        return printed

    def _copy(self, sources: list[str], target: str) -> None:
        place = Path(self.placed(target))
        for source in map(Path, sources):
            if source == place:  # from one stage to another, which share a root here
                continue
            if source == PINS:
                place.mkdir(parents=True, exist_ok=True)
                (place / PINS.name).write_text("\n".join(_pins_at_hand()))
            elif source.is_dir():
                shutil.copytree(source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            elif source != place:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)

    def _shell(self, command: str, variables: dict[str, str]) -> str:
        noted = "".join(f'{tool}() {{ echo {tool} "$@" >>"{self.log}"; }}\n' for tool in ("useradd", "chown"))
        how = {"capture_output": True, "text": True, "timeout": HANG, "cwd": self.root}
        how["env"] = self.variables() | variables
        done = subprocess.run(["bash", "-ec", noted + self.placed(command)], check=False, **how)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def variables(self) -> dict[str, str]:
        given = {k: self.placed(v) for k, v in (self._arguments | self.environment).items()}
        offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_FIND_LINKS": ""}
        path = f"{self.python.parent}:{os.environ['PATH']}"
        return {"HOME": str(self.root), "PATH": path, "HF_HUB_OFFLINE": "1", **offline, **given}

    def placed(self, text: str) -> str:
        """A text with this replay's paths in it."""
        return PATHS.sub(f"{self.root}/", text)


def _pins_at_hand() -> Iterator[str]:
    for name in pins(PINS):
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield f"{name}=={metadata.version(name)}"


def _outer_packages() -> list[str]:
    return [p for p in sys.path if p.endswith(("site-packages", "dist-packages")) and Path(p).is_dir()]


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Replay:
    replay = Replay(tmp_path_factory.mktemp("image"))
    replay.run(instructions("Dockerfile"))
    return replay


@pytest.mark.process
def test_the_command_is_installed_and_run_by_another_user_than_root(image):
    assert image.python.with_name("cecompile").is_file()
    assert list((image.root / "venv").rglob("site-packages/cecompile/engine/attention.py"))
    steps = instructions("Dockerfile")
    assert any("cecompile doctor" in i["value"] for i in steps if i["instruction"] == "RUN")
    started = [i["value"] for i in steps if i["instruction"] in ("USER", "ENTRYPOINT")]
    assert started == ["cecompile", '["/source/entrypoint.sh"]']
    assert re.search(r"useradd .*--groups video cecompile\n", image.log.read_text())


@pytest.mark.process
def test_the_packages_bytecode_is_in_the_image(image):
    (package,) = (image.root / "venv").rglob("site-packages/cecompile")
    sources = {file.stem for file in (package / "engine").glob("*.py")}
    compiled = {file.name.partition(".")[0] for file in (package / "engine" / "__pycache__").glob("*.pyc")}
    assert compiled == sources


@pytest.mark.process
def test_a_build_needs_no_driver(image, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')\n")
    (check,) = (i for i in instructions("Dockerfile") if "cecompile doctor" in i["value"] and i["instruction"] == "RUN")
    assert "doctor could not run here" in image.run([check], PYTHONPATH=str(tmp_path))


@pytest.mark.process
@pytest.mark.parametrize("base", ["NVIDIA's", "another"])
def test_the_bases_entrypoint_runs_first_and_prints_nothing_among_the_results(base, image, tmp_path):
    own = image.root / "opt" / "nvidia" / "nvidia_entrypoint.sh"
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text('#!/bin/bash\necho "== PyTorch =="\nexport CECOMPILE_CACHE=/set/by/the/base\nexec "$@"\n')
    own.chmod(0o755 if base == "NVIDIA's" else 0o644)
    script = tmp_path / "entrypoint.sh"
    script.write_text(image.placed((image.root / "source" / "entrypoint.sh").read_text()))
    how = {"capture_output": True, "text": True, "env": image.variables(), "timeout": HANG}
    done = subprocess.run(["sh", script, "compare", "no such one", "a 'b"], check=False, **how)
    assert (done.returncode, done.stdout) == (2, "")
    banner = "== PyTorch ==\n" if base == "NVIDIA's" else ""
    said = "cecompile: no such one/results.json: cannot be read: No such file or directory; is no such one a result "
    assert done.stderr == f"{banner}{said}directory?\n"
    assert os.access(ROOT / "scripts" / "entrypoint.sh", os.X_OK)
    listed = subprocess.run(["sh", script, "warm", "--list"], check=False, **how)
    place = "/set/by/the/base" if base == "NVIDIA's" else str(image.root / "cache")
    assert place in listed.stdout + listed.stderr
    assert "PyTorch" not in listed.stdout


@pytest.mark.process
def test_the_cache_is_closed_to_others_and_belongs_to_the_user(image):
    cache = image.root / "cache"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert f"chown cecompile: {cache}" in image.log.read_text()
    assert image.environment["CECOMPILE_CACHE"] == "/cache"


@pytest.mark.process
def test_torch_and_numpy_are_kept(image):
    kept = (image.root / "source" / "kept.txt").read_text().split()
    assert {f"{name}=={metadata.version(name)}" for name in ("torch", "numpy")} <= set(kept)
    assert any("--constraint /source/kept.txt" in i["value"] for i in instructions("Dockerfile"))


@pytest.mark.process
def test_a_warmed_cache_is_closed_to_others(image, tmp_path):
    warm = image.root / "home" / "cecompile" / "warm"
    warm.mkdir(parents=True)
    (warm / "entry.json").write_text("{}")
    warm.chmod(0o755)
    (warm / "entry.json").chmod(0o644)
    image.run([i for i in instructions("scripts/Dockerfile.warm") if i["instruction"] in ("RUN", "ENV")])
    assert stat.S_IMODE(warm.stat().st_mode) == 0o700
    assert stat.S_IMODE((warm / "entry.json").stat().st_mode) == 0o600
    assert image.environment["CECOMPILE_CACHE"] == "/home/cecompile/warm"
