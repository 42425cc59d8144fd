"""`--quick`: the tests that start no process and compile nothing.

The others are marked `process` or `compiles`. One that should be and is not fails here, so that the marks stay right.
Processes that do not count: asking a tool for its version, and those by which torch finds out once what it can compile
with. Compiling itself is noticed by its graphs.
"""

import sys
import threading
from types import FrameType

import pytest

SLOW = ("process", "compiles")
_started: list[str] = []


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="only tests that start no process and compile nothing")


def pytest_configure(config):
    for mark, does in (("process", "starts a process of its own"), ("compiles", "compiles code")):
        config.addinivalue_line("markers", f"{mark}: {does}; left out by --quick")
    if config.getoption("--quick"):
        sys.addaudithook(_notice)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        slow = [item for item in items if any(item.get_closest_marker(mark) for mark in SLOW)]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    _started.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Set-up counts too: whoever first uses a fixture that does so is told."""
    before = _graphs()
    result = yield
    if item.config.getoption("--quick"):
        if _started:
            pytest.fail(f"starts {_started[0]}: mark it `process`", pytrace=False)
        if _graphs() > before:
            pytest.fail("compiles: mark it `compiles`", pytrace=False)
    return result


def _notice(event: str, arguments: tuple) -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # what is set up beside loading, whichever test is then running
    if event == "subprocess.Popen":
        if "--version" not in map(str, arguments[1] or ()) and not _is_torchs(sys._getframe()):
            _started.append(str(arguments[0]))
    elif event in ("os.fork", "os.forkpty", "os.posix_spawn"):
        _started.append("a process")


def _is_torchs(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch._inductor."):
            return True
        frame = frame.f_back
    return False


def _graphs() -> int:
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else utils.counters["stats"]["unique_graphs"]
