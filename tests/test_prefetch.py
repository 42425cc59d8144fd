"""Reading a checkpoint's files into the page cache ahead of loading: which files, when, and how far."""

import ctypes
import json
import mmap
import os
import time
from pathlib import Path

import pytest
from huggingface_hub import constants as hub

from cecompile import procfs
from cecompile.model import prefetch


def out_of_the_page_cache(path: Path) -> None:
    """Skips the test where the system does not do so, or does not say."""
    path.read_bytes()
    if not all(cached(path)):
        pytest.skip("the system does not say what is in the page cache")
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        for _ in range(100):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not pages_in_memory(path):
                return
            time.sleep(0.05)
    pytest.skip("the page cache does not do as it is told")


def pages_in_memory(path: Path) -> int:
    """Pages of a file in the page cache, by mincore(2); to ask as the code under test does may make the system read."""
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        found = ctypes.create_string_buffer(-(-len(mapped) // mmap.PAGESIZE))
        begin = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(begin)), ctypes.c_size_t(len(mapped)), found) == 0
        del begin  # or the mapping cannot be closed
        return sum(page & 1 for page in found.raw)


def cached(path: Path) -> list[bool]:
    with path.open("rb") as opened:
        return [prefetch._is_cached(opened.fileno(), at) for at in range(0, path.stat().st_size, prefetch.PIECE)]


@pytest.fixture
def two_files(tmp_path, monkeypatch):
    """A checkpoint of two files of four pieces each; nothing of it is in the page cache."""
    monkeypatch.setattr(prefetch, "PIECE", 2**20)
    monkeypatch.setattr(prefetch, "NEAR", 2**20)
    monkeypatch.setattr(prefetch, "_running", [])
    files = [tmp_path / name for name in ("b.safetensors", "a.safetensors")]
    for file in files:
        file.write_bytes(os.urandom(4 * 2**20))
        out_of_the_page_cache(file)
    weights = {f"x{i}": file.name for i, file in enumerate(files)}
    (tmp_path / prefetch.INDEX).write_text(json.dumps({"weight_map": weights}))
    return files


def test_files_are_read_ahead_where_memory_holds_them_twice(two_files, monkeypatch):
    monkeypatch.setattr(procfs, "memory_left", lambda: 16 * 2**20 - 1)
    prefetch.begin(str(two_files[0].parent))
    assert not prefetch._running
    monkeypatch.setattr(procfs, "memory_left", lambda: 16 * 2**20)
    prefetch.begin(str(two_files[0].parent))
    prefetch._running[0].join()
    assert [cached(file) for file in two_files] == [[True] * 4] * 2


def test_files_in_the_hubs_cache_are_found(two_files, tmp_path, monkeypatch):
    revision = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    revision.mkdir(parents=True)
    for path in (*two_files, tmp_path / prefetch.INDEX):
        (revision / path.name).symlink_to(path)
    (revision.parents[1] / "refs").mkdir()
    (revision.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert prefetch._files("some/model") == sorted(revision / file.name for file in two_files)
    assert prefetch._files("some/other") == []


def test_reading_ahead_ends_where_loading_has_caught_up(two_files, monkeypatch):
    monkeypatch.setattr(prefetch, "_is_cached", lambda *_: False)  # a system may read more than it is asked for
    last, first = two_files
    preadv, read = os.preadv, []

    def loading(descriptor, buffers, start, flags=0):
        """Comes to where the thread is in the second file, once it is there."""
        done = preadv(descriptor, buffers, start, flags)
        read.append(start // 2**20)
        prefetch.reached(*((first, start - 2**21) if len(read) < 6 else (last, start - 2**20)))
        return done

    one = prefetch.Prefetch([first, last])
    prefetch._running.append(one)
    monkeypatch.setattr(os, "preadv", loading)
    one.start()
    one.join()
    assert read == [0, 1, 2, 3, 0, 1]


def test_what_is_no_checkpoint_is_not_read_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch, "_running", [])
    (tmp_path / "elsewhere").write_text("not of the checkpoint")
    weights = ("1", '"missing"', '"../elsewhere"', f'"{tmp_path}/elsewhere"')
    for content in ("", "[]", "{}", 100_000 * "[", *(f'{{"weight_map": {{"a": {file}}}}}' for file in weights)):
        (tmp_path / prefetch.INDEX).write_text(content)
        prefetch.begin(str(tmp_path))
    prefetch.begin("hub/id")
    assert not prefetch._running
