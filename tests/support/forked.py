"""The command line in processes forked from one that has imported torch and transformers.

Importing both takes most of the time of a short command. A forked process stands for one of its own where a test is
about neither imports nor memory, nor about variables that libraries read as they are imported.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "datasets",
     "cecompile.cli", "cecompile.lm_eval"]
)  # fmt: skip


def run_forked(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs `cecompile` with these arguments, in this process's directory, to its end."""
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        process = _CONTEXT.Process(target=_command, args=(arguments, environment, os.getcwd(), out.name, err.name))
        process.start()
        process.join()
        texts = (file.read().decode() for file in (out, err))
        return subprocess.CompletedProcess(["cecompile", *arguments], process.exitcode, *texts)


def _command(arguments: list[str], environment: dict[str, str], directory: str, out: str, err: str) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = ["cecompile", *arguments]
    try:
        runpy.run_module("cecompile", run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()  # which multiprocessing leaves out
