"""Processes forked from one that has imported torch and transformers.

Importing both takes most of the time of a short command. A forked process stands for one of its own where a test is
about neither imports nor memory, nor about variables that libraries read as they are imported. Where there is a CUDA
device, each process imports anew: CUDA does not bear a fork.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed.run", "transformers.models.llama.modeling_llama", "datasets", "cecompile.cli",
     "cecompile.lm_eval"]
)  # fmt: skip


def run_command(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs `cecompile` with these arguments, in this process's directory, to its end."""
    return run(_command, (arguments,), environment)


def run(
    function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs a module's function in a forked process to its end; an exception ends the process as it ends a program."""
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        place = (os.getcwd(), out.name, err.name)
        process = _CONTEXT.Process(target=_begin, args=(environment, *place, function, arguments))
        process.start()
        process.join()
        texts = (file.read().decode() for file in (out, err))
        return subprocess.CompletedProcess([function.__name__, *map(str, arguments)], process.exitcode, *texts)


def _begin(
    environment: dict[str, str], directory: str, out: str, err: str, function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    try:
        function(*arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def _command(arguments: list[str]) -> None:
    sys.argv = ["cecompile", *arguments]
    runpy.run_module("cecompile", run_name="__main__", alter_sys=True)
