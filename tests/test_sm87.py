"""Kernels for the Jetson AGX Orin, compiled and not run; Triton compiles for a device that is not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.waiting import HANG
from torch.torch_version import TorchVersion

from cecompile.engine import attention

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_sm87"
ORIN = 164 * 1024  # bytes of shared memory that a multiprocessor of sm_87 has


def tiles(monkeypatch, shared_memory: int, head_size: int, dtype: torch.dtype = torch.bfloat16) -> tuple | None:
    monkeypatch.setattr(attention, "_shared_memory", shared_memory)
    head = torch.empty(1, 1, 1, head_size, dtype=dtype)
    found = attention._kernel_options(head, head)
    return found and tuple(found[name] for name in ("BLOCK_M", "BLOCK_N", "num_stages"))


def estimate(queries: int, keys: int, stages: int, head_size: int) -> int:
    """Bytes of 16-bit queries, keys and values that a block holds at most."""
    return 2 * head_size * (queries + 2 * stages * keys)


@pytest.mark.parametrize(
    ("shared_memory", "chosen"), [(ORIN, (64, 64, 3)), (102_400, (64, 64, 2)), (65_536, (64, 32, 2))]
)
def test_tiles_are_as_large_as_the_device_allows(monkeypatch, shared_memory, chosen):
    assert tiles(monkeypatch, shared_memory, 128) == chosen
    assert estimate(*chosen, 128) <= shared_memory - 1024


def test_tiles_in_float32_fit_the_orin(monkeypatch):
    queries, keys, stages = tiles(monkeypatch, ORIN, 128, torch.float32)
    assert 2 * estimate(queries, keys, stages, 128) <= ORIN - 1024


@pytest.mark.process
def test_a_kernel_that_takes_too_much_is_named(monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    if TorchVersion(torch.__version__) < "2.13":
        pytest.skip("the script needs torch 2.13")
    limit, head_size = 16_384, 64
    command = [sys.executable, SCRIPT, "--shape", "tiny", "--attention", "flex", "--tokens-per-bucket", "128"]
    command += ["--shared-memory-limit", str(limit)]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == 1, done.stderr
    [problem] = [line for line in done.stderr.splitlines() if line.startswith("tiny, flex: ")]
    match = re.search(r"flex_attention.*: ([\d,]+) bytes of shared memory a block, 16,384 are there", problem)
    taken = int(match[1].replace(",", ""))
    assert limit < taken <= estimate(*tiles(monkeypatch, ORIN, head_size), head_size)
    assert re.search(r"tiny +│ flex +│ 1 x 128 +│ +7 +│", done.stdout)
