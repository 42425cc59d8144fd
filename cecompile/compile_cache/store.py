"""The compile cache: compiled code that later processes may run, if no other user could have touched that code.

    DIRECTORY/                     mode 0700, owned by the user
        lock                       held while an entry is written
        KEY.json                   an entry's manifest: the facts, the buckets, every file's checksum
        KEY-XXXXXXXX/              its files, never changed once the manifest names them
        work-XXXXXXXX/             a running process's own copy, where the compiler reads and writes

KEY is a digest over everything that changes the compiled code except the bucket shapes, which the manifest lists. A
process checks an entry's files, copies them into its own directory, and points the compiler there. So every file is
checked before the compiler reads it, two processes never write to one file, and a process killed at any moment leaves
entries whole. New code is written to a new directory. Renaming the new manifest replaces the entry.
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
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cecompile.errors import UserError, file_errors, printable
from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.plan import Bucket, Geometry

SCHEMA = 4
NOTICE = 5.0  # seconds of waiting for another process after which the user is told
WARM, PARTLY, COLD = "warm", "partly warm", "cold"
_SAFE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_ENTRY = re.compile(r"[0-9a-f]{32}-[0-9a-f]{8}")
_NOT_KEPT = (".lock", ".tmp", ".pid")

Shape = tuple[int, ...]
Compiled = Bucket | DecodeShape


class NoCacheError(UserError):
    """The cache directory cannot be used; a run whose user did not name a directory continues without a cache."""


def default_directory() -> Path:
    """CECOMPILE_CACHE, else `cecompile` in the user's cache directory by the XDG base directory specification."""
    of_user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return Path(os.environ.get("CECOMPILE_CACHE") or of_user / "cecompile")


@dataclass(frozen=True, slots=True)
class Summary:
    """An entry in the list of `cecompile warm --list`. `size` is in bytes, `built` in seconds since 1970."""

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
        UserError: the directory is open to other users, whose code would be run.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with self.file_errors():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = directory.lstat()
        where, mode = f"{directory}: cache directory", stat.S_IMODE(found.st_mode)
        if not stat.S_ISDIR(found.st_mode):
            raise UserError(f"{where}: is a symbolic link; name what it points to")
        if found.st_uid != os.geteuid():
            raise UserError(f"{where}: belongs to another user: sudo chown -R $(id -u) {directory}")
        if mode & 0o077:
            raise UserError(f"{where}: open to other users (mode {mode:04o}): chmod 700 {directory}")
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            raise NoCacheError(f"{where}: cannot be written")

    def open(self, facts: dict[str, Any]) -> "Entry":
        """Opens the entry for `facts`, possibly without code yet; the compiler now works there. Raises NoCacheError."""
        with self.file_errors():
            return Entry(self, facts)

    def recorded(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The manifest of the entry for `facts`; empty without a usable manifest."""
        with contextlib.suppress(UnusableError):
            return _read_manifest(self.manifest_path(key_of(facts)))
        return {}

    def manifest_path(self, key: str) -> Path:
        return self.directory / f"{key}.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock of a process that writes entries; says so where another one makes this process wait."""
        lock = FileLock(self.directory / "lock")
        try:
            lock.acquire(timeout=NOTICE)
        except Timeout:
            waits = f"cecompile: {self.directory}: another process is writing compiled code; waiting, Ctrl-C stops"
            print(printable(waits), file=sys.stderr, flush=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def file_errors(self) -> contextlib.AbstractContextManager[None]:
        """Turns an error of the file system into NoCacheError."""
        return file_errors(f"{self.directory}: cache directory", NoCacheError)

    def manifests(self) -> list[Path]:
        """Every entry's manifest, usable or not."""
        return sorted(p for p in self.directory.glob("*.json") if re.fullmatch(r"[0-9a-f]{32}", p.stem))

    def usable(self) -> Iterator[dict[str, Any]]:
        """The manifests that are whole."""
        for path in self.manifests():
            with contextlib.suppress(UnusableError):
                yield _read_manifest(path)

    def entries(self) -> list[Summary]:
        """All entries; an unusable entry has a `problem`."""
        out = []
        for path in self.manifests():
            one = Summary(path.stem, {}, [], 0, path.lstat().st_mtime, None)
            try:
                manifest = _read_manifest(path)
                files, shapes = self.directory / manifest["directory"], _shapes(manifest, "buckets")
                one = replace(one, facts=manifest["facts"], buckets=sorted(shapes, reverse=True), size=_size(files))
                for name, checksum in manifest["files"].items():
                    _read(files / name, checksum)
            except UnusableError as problem:
                one = replace(one, problem=str(problem))
            out.append(one)
        return out

    def remove(self, keys: Iterable[str]) -> int:
        """Removes entries, and the directories of dead processes. Returns the bytes freed."""
        with self.locked():
            before = _size(self.directory)
            for key in keys:
                self.manifest_path(key).unlink(missing_ok=True)
            self.sweep()
            return before - _size(self.directory)

    def sweep(self) -> None:
        """Removes directories that no manifest names and no living process works in. Call with the lock held."""
        named = {manifest["directory"] for manifest in self.usable()}
        for path in self.directory.iterdir():
            if path.name.startswith("work-"):
                with contextlib.suppress(Timeout, OSError), FileLock(path / "alive", blocking=False):
                    shutil.rmtree(path, ignore_errors=True)
            elif _ENTRY.fullmatch(path.name) and path.name not in named:
                shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Probe results under which code was compiled; a run that uses the code skips the probes."""

    attention: str  # the implementation that computes the model exactly
    inputs_are_free: bool | None = None  # see `parts.inputs_are_free`; None if not probed


class Entry:
    """One entry of a cache, opened: its files are checked and copied to this process's own directory.

    Attributes:
        note: the fault of the entry on disk, in one line, or None.
        found: the probe results under which the entry's code was compiled; None without code.
    """

    def __init__(self, cache: CompileCache, facts: dict[str, Any]) -> None:
        self._cache, self._facts, self._key = cache, facts, key_of(facts)
        self._workspace = _workspace(cache)
        self._shapes: set[Shape] = set()
        self._opened: str | None = None
        self.note: str | None = None
        self.found: ProbeResult | None = None
        path = cache.manifest_path(self._key)
        if not os.path.lexists(path):
            return
        try:
            manifest = _read_manifest(path)
            self._copy_checked(manifest)
        except UnusableError as problem:
            self.note = f"compile cache: {problem}; it is not used and will be built again"
        else:
            self._shapes, self._opened = _shapes(manifest, "buckets"), manifest["directory"]
            self.found = ProbeResult(**manifest["found"])

    def state(self, buckets: Iterable[Compiled]) -> tuple[str, str]:
        """The state of the code for these buckets, WARM, PARTLY or COLD, and the reason."""
        wanted = self._compiled(buckets)
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

    def publish(self, buckets: Iterable[Compiled], geometry: Geometry, found: ProbeResult, tuned: bool = False) -> None:
        """Writes the code that this process has compiled as the entry, merged with the entry on disk.

        Args:
            buckets: the compiled and verified buckets; `geometry` is the largest bucket's.
            tuned: record this geometry as the fastest, for later runs.

        Raises:
            NoCacheError: the file system refuses.
        """
        shapes = self._shapes | self._compiled(buckets)
        largest = (geometry.rows, geometry.length)
        with self._cache.file_errors(), self._cache.locked():
            now = self._cache.recorded(self._facts)
            if now and now["directory"] != self._opened:
                with contextlib.suppress(UnusableError):
                    self._copy_checked(now, keep=True)
                    shapes |= _shapes(now, "buckets")
            geometries = {largest} | _shapes(now, "geometries")
            recorded: dict[str, Any] = {"found": asdict(found), "tuned": largest if tuned else now.get("tuned")}
            recorded |= {"buckets": sorted(shapes, reverse=True), "geometries": sorted(geometries, reverse=True)}
            self._opened = self._write(recorded)
            self._shapes, self.found, self.note = shapes, found, None
            self._cache.sweep()

    def _compiled(self, buckets: Iterable[Compiled]) -> set[Shape]:
        """The shapes for which there is code on the entry's device. A CPU decodes uncompiled."""
        on_cpu = self._facts["device"]["name"] == "cpu"
        return {bucket.shape for bucket in buckets if not (on_cpu and isinstance(bucket, DecodeShape))}

    def size(self) -> int:
        """Bytes of the entry's files on disk."""
        return _size(self._cache.directory / self._opened) if self._opened else 0

    def _copy_checked(self, manifest: dict[str, Any], keep: bool = False) -> None:
        """Copies all files of an entry or none; `keep` leaves existing files as they are. Raises UnusableError."""
        source = self._cache.directory / manifest["directory"]
        content = {name: _read(source / name, checksum) for name, checksum in manifest["files"].items()}
        for name, data in content.items():
            path = self._workspace / name
            if not (keep and path.exists()):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
                temporary.write_bytes(data)
                temporary.replace(path)

    def _write(self, recorded: dict[str, Any]) -> str:
        """Writes this process's files, and a manifest with the items of `recorded`. Returns the directory's name."""
        name = f"{self._key}-{secrets.token_hex(4)}"
        target = self._cache.directory / name
        target.mkdir(mode=0o700)
        files = {}
        for path in sorted(self._workspace.rglob("*")):
            relative = path.relative_to(self._workspace).as_posix()
            kept = path.is_file() and path.name != "alive" and not path.name.endswith(_NOT_KEPT)
            if kept and _SAFE_PATH.fullmatch(relative):
                with contextlib.suppress(FileNotFoundError):  # the compiler's own temporary files
                    content = path.read_bytes()
                    files[relative] = hashlib.sha256(content).hexdigest()
                    (target / relative).parent.mkdir(parents=True, exist_ok=True)
                    (target / relative).write_bytes(content)
        manifest = {"schema": SCHEMA, "facts": self._facts, "directory": name, "files": files} | recorded
        with (target / "manifest.json").open("w", encoding="utf-8") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        (target / "manifest.json").replace(self._cache.manifest_path(self._key))
        return name

    def _nearest_miss(self) -> str:
        """The differences between this entry's facts and the most similar entry's, in words."""
        misses = [(len(self._facts) + 1, "this model was not compiled before")]
        for facts in (manifest["facts"] for manifest in self._cache.usable()):
            if facts.get("model") == self._facts["model"]:
                differing = [k for k in self._facts if facts.get(k) != self._facts[k]]
                other = ", ".join(f"{k} {_difference(facts.get(k), self._facts[k])}" for k in differing)
                misses.append((len(differing), f"compiled before with other {other}"))
        return min(misses)[1]


def shown(shapes: Iterable[Shape]) -> str:
    """Shapes in a line: a bucket's rows x tokens, a decoder's cache slots x rows in flight x tokens of each step."""
    return ", ".join(" x ".join(map(str, shape)) for shape in shapes)


def key_of(facts: dict[str, Any]) -> str:
    """32 hex digits over the facts, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        parts = [f"{k} {before.get(k)} (now {now.get(k)})" for k in now if before.get(k) != now.get(k)]
        return printable(", ".join(parts), 120)
    return printable(f"{before} (now {now})", 120) if len(str(now)) <= 40 else "than now"


def _shapes(manifest: dict[str, Any], name: str) -> set[Shape]:
    return {tuple(shape) for shape in manifest.get(name, ())}


class UnusableError(Exception):
    """A file in the cache was changed or is missing; the text names the file."""


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest in a file, whole and of the file's key. Raises UnusableError."""
    try:
        manifest = json.loads(_read(path))
        found = ProbeResult(**manifest["found"])
        whole = (
            manifest["schema"] == SCHEMA
            and key_of(manifest["facts"]) == path.stem
            and re.fullmatch(rf"{path.stem}-[0-9a-f]{{8}}", manifest["directory"])
            and all(_SAFE_PATH.fullmatch(name) and isinstance(f, str) for name, f in manifest["files"].items())
            and all(len(b) >= 2 and all(isinstance(x, int) for x in b) for b in manifest["buckets"])
            and isinstance(found.attention, str)
            and found.inputs_are_free in (True, False, None)
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UnusableError(f"{path.name} is damaged") from None
    if not whole:
        raise UnusableError(f"{path.name} is not this entry's manifest")
    return manifest


def _read(path: Path, checksum: str | None = None) -> bytes:
    """The bytes of this user's regular file, whose SHA-256 (hex) is `checksum` if given. Raises UnusableError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                raise UnusableError(f"{path.name} is not a file of this user's")
            content = file.read()
    except OSError as error:
        raise UnusableError(f"{path.name} cannot be read ({error.strerror})") from None
    if checksum not in (None, hashlib.sha256(content).hexdigest()):
        raise UnusableError(f"{path.name} is not what was written")
    return content


def _size(directory: Path) -> int:
    return sum(p.lstat().st_size for p in directory.rglob("*") if not p.is_dir())


_workspaces: dict[Path, tuple[Path, FileLock]] = {}  # by cache directory: this process's directory and its lock


def _workspace(cache: CompileCache) -> Path:
    """This process's own directory in the cache, where the compiler works from now on."""
    directory = cache.directory.resolve()
    if directory not in _workspaces:
        with cache.locked():  # or another process's sweep removes the new directory
            path = directory / f"work-{secrets.token_hex(4)}"
            path.mkdir(mode=0o700)
            alive = FileLock(path / "alive")
            alive.acquire()
        _workspaces[directory] = path, alive
    path, _ = _workspaces[directory]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path)
    os.environ["TRITON_CACHE_DIR"] = str(path / "triton")
    return path


@atexit.register
def remove_workspaces() -> None:
    """Removes this process's own directories, when the process ends."""
    while _workspaces:
        _, (path, alive) = _workspaces.popitem()
        alive.release()
        shutil.rmtree(path, ignore_errors=True)
