"""The container images: linted, and their steps taken in a virtual environment, since no Docker engine runs here."""

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
from importlib import metadata
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from support.waiting import HANG

ROOT = Path(__file__).parents[1]
DOCKERFILES = ("Dockerfile", "scripts/Dockerfile.warm")
PATHS = re.compile(r"(?<![\w.}/$])/(?=(source|wheels|cache|model|work|home)\b)")


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


class Replay:
    """Takes a Dockerfile's steps in the order of the file, with `root` in place of / for the paths that it names.

    The base image's Python is a virtual environment that sees what the tests' own has, but for this package; so pip
    finds every requirement and asks no index. `useradd` and `chown` only note what they are asked for.
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
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True)
        command = [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        (Path(site) / "base.pth").write_text(str(base))

    @property
    def python(self) -> Path:
        return self.root / "venv" / "bin" / "python3"

    def run(self, steps: list[dict]) -> None:
        """Takes the steps; those that only say how a container is started are left out."""
        for step in steps:
            name, value = step["instruction"], step["value"]
            if name == "ARG":
                key, _, default = value.partition("=")
                self._arguments[key] = default
            elif name == "ENV":
                self.environment |= dict(pair.split("=", 1) for pair in shlex.split(value))
            elif name == "COPY":
                *sources, target = (part for part in value.split() if not part.startswith("--"))
                self._copy([self._placed(s) if s.startswith("/") else str(ROOT / s) for s in sources], target)
            elif name == "RUN":
                self._shell(value)
            else:
                assert name in ("FROM", "USER", "WORKDIR", "VOLUME", "ENTRYPOINT", "CMD"), name

    def _copy(self, sources: list[str], target: str) -> None:
        place = Path(self._placed(target))
        for source in map(Path, sources):
            if source.is_dir() and source != place:  # equal from one stage to another, which share a root here
                shutil.copytree(source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            elif source != place:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)

    def _shell(self, command: str) -> None:
        noted = "".join(f'{tool}() {{ echo {tool} "$@" >>"{self.log}"; }}\n' for tool in ("useradd", "chown"))
        how = {"capture_output": True, "text": True, "timeout": HANG, "env": self.variables(), "cwd": self.root}
        done = subprocess.run(["bash", "-ec", noted + self._placed(command)], check=False, **how)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    def variables(self) -> dict[str, str]:
        given = {k: self._placed(v) for k, v in (self._arguments | self.environment).items()}
        offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_FIND_LINKS": ""}
        path = f"{self.python.parent}:{os.environ['PATH']}"
        return {"HOME": str(self.root), "PATH": path, "HF_HUB_OFFLINE": "1", **offline, **given}

    def _placed(self, text: str) -> str:
        return PATHS.sub(f"{self.root}/", text)


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
    assert "cecompile doctor" in [i["value"] for i in steps if i["instruction"] == "RUN"]
    assert [i["value"] for i in steps if i["instruction"] in ("USER", "ENTRYPOINT")] == ["cecompile", '["cecompile"]']
    assert re.search(r"useradd .*--groups video cecompile\n", image.log.read_text())


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
