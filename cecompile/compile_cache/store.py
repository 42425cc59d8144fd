"""The compile cache: compiled code that a later process may run, trusted only if nobody else could have touched it.

    DIRECTORY/                     mode 0700, owned by the user
        lock                       held while an entry is written
        KEY.json                   an entry's manifest: what it was built from, its buckets, every file's checksum
        KEY-XXXXXXXX/              its files, never changed once the manifest names them
        work-XXXXXXXX/             a running process's own copy, where the compiler reads and writes

KEY is a digest over everything that changes the compiled code, but for the bucket shapes, which the manifest lists. A
process copies an entry's files into a directory of its own, checking each on the way, and points the compiler there. So
no file is read that was not checked, two processes never write to one file, and a process killed at any moment leaves
entries whole. What was compiled anew is written as a new directory, and one rename of the manifest makes it the entry.
"""

import atexit
import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from cecompile.errors import UserError, printable
from cecompile.workload.plan import Geometry

SCHEMA = 3
WARM, PARTLY, COLD = "warm", "partly warm", "cold"
_SAFE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_ENTRY = re.compile(r"[0-9a-f]{32}-[0-9a-f]{8}")
_NOT_KEPT = (".lock", ".tmp", ".pid")

Shape = tuple[int, ...]


class HasShape(Protocol):
    """What is compiled for a fixed shape."""

    @property
    def shape(self) -> Shape:
        """Tells it from others of the same model."""


class NoCacheError(UserError):
    """There can be no cache directory here; whoever did not ask for one does without."""


def default_directory() -> Path:
    """CECOMPILE_CACHE, else the user's cache directory as the XDG base directory specification has it."""
    named = os.environ.get("CECOMPILE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "cecompile"


@dataclass(frozen=True, slots=True)
class Summary:
    """An entry as `cecompile warm --list` shows it."""

    key: str
    facts: dict[str, Any]
    buckets: list[Shape]
    size: int
    built: float
    problem: str | None


class CompileCache:
    """A cache directory.

    Raises:
        NoCacheError: the directory cannot be made or written.
        UserError: it is open to other users: what lies there would be run.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = directory.lstat() if directory.is_symlink() else directory.stat()
        except OSError as error:
            raise NoCacheError(f"{directory}: cache directory: {error.strerror}") from None
        if not stat.S_ISDIR(found.st_mode):
            raise UserError(f"{directory}: cache directory: is a symbolic link; name what it points to")
        if found.st_uid != os.geteuid():
            raise UserError(
                f"{directory}: cache directory: belongs to another user: sudo chown -R $(id -u) {directory}"
            )
        if found.st_mode & 0o077:
            mode = stat.S_IMODE(found.st_mode)
            raise UserError(
                f"{directory}: cache directory: open to other users (mode {mode:04o}): chmod 700 {directory}"
            )
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            raise NoCacheError(f"{directory}: cache directory: cannot be written")

    def open(self, facts: dict[str, Any]) -> "Entry":
        """The entry for what `facts` describe, there or not; from now on this process compiles in its own copy.

        Raises:
            NoCacheError: the file system refuses.
        """
        try:
            return Entry(self, facts)
        except OSError as error:
            raise NoCacheError(f"{self.directory}: cache directory: {error.strerror}") from None

    def recorded(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What an entry's manifest says beside its files; empty without one."""
        try:
            return _read_manifest(self.manifest_path(key_of(facts)))
        except UnusableError:
            return {}

    def manifest_path(self, key: str) -> Path:
        return self.directory / f"{key}.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While this lasts, no other process writes entries."""
        with FileLock(self.directory / "lock"):
            yield

    def manifests(self) -> list[Path]:
        """Every entry's manifest, usable or not."""
        return sorted(p for p in self.directory.glob("*.json") if re.fullmatch(r"[0-9a-f]{32}", p.stem))

    def entries(self) -> list[Summary]:
        """All entries, those that cannot be used with the reason."""
        out = []
        for path in self.manifests():
            try:
                manifest = _read_manifest(path)
            except UnusableError as problem:
                out.append(Summary(path.stem, {}, [], 0, path.lstat().st_mtime, str(problem)))
                continue
            problem_text = None
            try:
                for name, (_, checksum) in manifest["files"].items():
                    _check(self.directory / manifest["directory"] / name, checksum)
            except UnusableError as problem:
                problem_text = str(problem)
            shapes = sorted(_shapes(manifest, "buckets"), reverse=True)
            size = sum(size for size, _ in manifest["files"].values())
            out.append(Summary(path.stem, manifest["facts"], shapes, size, manifest["built"], problem_text))
        return out

    def remove(self, keys: Iterable[str]) -> int:
        """Removes entries, and what dead processes left behind. Returns the bytes freed."""
        with self.locked():
            before = _size(self.directory)
            for key in keys:
                self.manifest_path(key).unlink(missing_ok=True)
            self.sweep()
            return before - _size(self.directory)

    def sweep(self) -> None:
        """Removes directories that no manifest names and no living process works in. Call it locked."""
        named = set()
        for path in self.manifests():
            with contextlib.suppress(UnusableError):
                named.add(_read_manifest(path)["directory"])
        for path in self.directory.iterdir():
            if path.name.startswith("work-"):
                with contextlib.suppress(Timeout, OSError), FileLock(path / "alive", blocking=False):
                    shutil.rmtree(path, ignore_errors=True)
            elif _ENTRY.fullmatch(path.name) and path.name not in named:
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(".new-"):
                path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What was found out by trying before code was compiled. It need not be tried again to use that code.

    Attributes:
        attention: the implementation that computes the model exactly.
        inputs_are_free: see `parts.inputs_are_free`; None where it was not asked.
    """

    attention: str
    inputs_are_free: bool | None = None


class Entry:
    """One entry of a cache, opened: its files checked and copied to where this process compiles.

    Attributes:
        note: what was wrong with the entry on disk, in one line, or None.
        found: what its code was compiled by; None without any.
    """

    def __init__(self, cache: CompileCache, facts: dict[str, Any]) -> None:
        self._cache = cache
        self._facts = facts
        self._key = key_of(facts)
        self._workspace = _workspace(cache)
        self._shapes: set[Shape] = set()
        self._opened: str | None = None
        self.note: str | None = None
        self.found: ProbeResult | None = None
        path = cache.manifest_path(self._key)
        if not path.is_symlink() and not path.exists():
            return
        try:
            manifest = _read_manifest(path)
            _copy_checked(cache.directory / manifest["directory"], self._workspace, manifest["files"])
        except UnusableError as problem:
            self.note = f"compile cache: {problem}; it is not used and will be built again"
            return
        self._shapes = _shapes(manifest, "buckets")
        self._opened = manifest["directory"]
        self.found = ProbeResult(**manifest["found"])

    def state(self, buckets: Iterable[HasShape]) -> tuple[str, str]:
        """ "warm", "partly warm" or "cold" for these buckets, and why."""
        wanted = {bucket.shape for bucket in buckets}
        missing = sorted(wanted - self._shapes, reverse=True)
        if not missing:
            return WARM, "every bucket was compiled before"
        if self.note:
            return COLD, self.note
        if len(missing) < len(wanted):
            return PARTLY, f"not yet compiled: {shown(missing)}"
        if self._shapes:
            return COLD, f"compiled before were buckets of {shown(sorted(self._shapes, reverse=True))} only"
        return COLD, self._nearest_miss()

    def publish(self, buckets: Iterable[HasShape], geometry: Geometry, found: ProbeResult, tuned: bool = False) -> None:
        """Writes what this process has compiled as the entry, with what others have added meanwhile.

        Args:
            buckets: those now compiled, and found right.
            geometry: the largest one's.
            found: what they were compiled by.
            tuned: this geometry was found fastest; it is recorded for later runs.

        Raises:
            NoCacheError: the file system refuses.
        """
        shapes = self._shapes | {bucket.shape for bucket in buckets}
        try:
            with self._cache.locked():
                now = self._cache.recorded(self._facts)
                if now and now["directory"] != self._opened:
                    with contextlib.suppress(UnusableError):
                        _copy_checked(
                            self._cache.directory / now["directory"], self._workspace, now["files"], keep=True
                        )
                        shapes |= _shapes(now, "buckets")
                largest = (geometry.rows, geometry.length)
                geometries = {largest} | _shapes(now, "geometries")
                self._write(shapes, geometries, found, largest if tuned else now.get("tuned"))
                self._cache.sweep()
        except OSError as error:
            raise NoCacheError(f"{self._cache.directory}: cache directory: {error.strerror}") from None

    def _write(self, shapes: set[Shape], geometries: set[Shape], found: ProbeResult, tuned: Shape | None) -> None:
        name = f"{self._key}-{secrets.token_hex(4)}"
        target = self._cache.directory / name
        target.mkdir(mode=0o700)
        files: dict[str, tuple[int, str]] = {}
        for path in sorted(self._workspace.rglob("*")):
            relative = path.relative_to(self._workspace).as_posix()
            if not path.is_file() or path.name == "alive" or path.name.endswith(_NOT_KEPT):
                continue
            if not _SAFE_PATH.fullmatch(relative):
                continue
            with contextlib.suppress(FileNotFoundError):  # the compiler's own temporary files
                files[relative] = _copy(path, target / relative)
        manifest = {
            "schema": SCHEMA,
            "facts": self._facts,
            "directory": name,
            "buckets": sorted(shapes, reverse=True),
            "geometries": sorted(geometries, reverse=True),
            "found": asdict(found),
            "tuned": tuned,
            "built": time.time(),
            "files": files,
        }
        temporary = self._cache.directory / f".new-{secrets.token_hex(4)}"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._cache.manifest_path(self._key))
        self._shapes, self._opened, self.found, self.note = shapes, name, found, None

    def size(self) -> int:
        """Bytes of the entry's files on disk."""
        return _size(self._cache.directory / self._opened) if self._opened else 0

    def _nearest_miss(self) -> str:
        """Which fact differs from the entry most like this one."""
        best: tuple[int, str] | None = None
        for path in self._cache.manifests():
            with contextlib.suppress(UnusableError):
                facts = _read_manifest(path)["facts"]
                if facts.get("model") != self._facts["model"]:
                    continue
                differing = [k for k in self._facts if facts.get(k) != self._facts[k]]
                shown = ", ".join(f"{k} {_differing(facts.get(k), self._facts[k])}" for k in differing)
                best = min(best or (99, ""), (len(differing), f"compiled before with other {shown}"))
        return best[1] if best else "this model was not compiled before"


def shown(shapes: Iterable[Shape]) -> str:
    """Shapes in a line: a bucket's rows x tokens, a decoder's cache slots x rows in flight x tokens of each step."""
    return ", ".join(" x ".join(map(str, shape)) for shape in shapes)


def key_of(facts: dict[str, Any]) -> str:
    """32 hex digits over the facts, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _differing(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        parts = [f"{k} {before.get(k)} (now {now.get(k)})" for k in now if before.get(k) != now.get(k)]
        return printable(", ".join(parts), 120)
    return printable(f"{before} (now {now})", 120) if len(str(now)) <= 40 else "than now"


def _is_found(attention: Any, inputs_are_free: Any) -> bool:
    return isinstance(attention, str) and inputs_are_free in (True, False, None)


def _shapes(manifest: dict[str, Any], name: str) -> set[Shape]:
    return {tuple(shape) for shape in manifest.get(name, ())}


class UnusableError(Exception):
    """Something in the cache is not what was written there; the text says what."""


def _read_manifest(path: Path) -> dict[str, Any]:
    """A manifest that is whole and belongs to its name. Raises UnusableError."""
    try:
        manifest = json.loads(_read_regular(path))
        facts, files, directory = manifest["facts"], manifest["files"], manifest["directory"]
        whole = (
            manifest["schema"] == SCHEMA
            and key_of(facts) == path.stem
            and re.fullmatch(rf"{path.stem}-[0-9a-f]{{8}}", directory)
            and all(_SAFE_PATH.fullmatch(n) and len(f) == 2 for n, f in files.items())
            and all(len(b) >= 2 and all(isinstance(x, int) for x in b) for b in manifest["buckets"])
            and isinstance(manifest["built"], (int, float))
            and _is_found(**manifest["found"])
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UnusableError(f"{path.name} is damaged") from None
    if not whole:
        raise UnusableError(f"{path.name} is not this entry's manifest")
    return manifest


def _read_regular(path: Path) -> bytes:
    """The bytes of a regular file of ours. Raises UnusableError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                raise UnusableError(f"{path.name} is not a file of this user's")
            return file.read()
    except OSError as error:
        raise UnusableError(f"{path.name} cannot be read ({error.strerror})") from None


def _check(path: Path, checksum: str) -> bytes:
    content = _read_regular(path)
    if hashlib.sha256(content).hexdigest() != checksum:
        raise UnusableError(f"{path.name} is not what was written")
    return content


def _copy_checked(source: Path, target: Path, files: dict[str, Any], keep: bool = False) -> None:
    """Copies all files or none; `keep` leaves those that are there already. Raises UnusableError."""
    content = {name: _check(source / name, checksum) for name, (_, checksum) in files.items()}
    for name, data in content.items():
        path = target / name
        if keep and path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        temporary.write_bytes(data)
        temporary.replace(path)


def _copy(source: Path, target: Path) -> tuple[int, str]:
    """Copies a file; its size and checksum."""
    content = source.read_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return len(content), hashlib.sha256(content).hexdigest()


def _size(directory: Path) -> int:
    return sum(p.lstat().st_size for p in directory.rglob("*") if not p.is_dir())


_workspaces: dict[Path, tuple[Path, FileLock]] = {}


def _workspace(cache: CompileCache) -> Path:
    """This process's own directory in the cache, and the compiler's from now on."""
    directory = cache.directory.resolve()
    if directory not in _workspaces:
        with cache.locked():  # or another process takes it for one that a dead process left
            path = directory / f"work-{secrets.token_hex(4)}"
            path.mkdir(mode=0o700)
            alive = FileLock(path / "alive")
            alive.acquire()
        _workspaces[directory] = path, alive
    path, _ = _workspaces[directory]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path)
    os.environ["TRITON_CACHE_DIR"] = str(path / "triton")
    return path


def remove_workspaces() -> None:
    """Removes this process's own directories; called when it ends."""
    while _workspaces:
        _, (path, alive) = _workspaces.popitem()
        alive.release()
        shutil.rmtree(path, ignore_errors=True)


atexit.register(remove_workspaces)
