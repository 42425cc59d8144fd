"""Tiny models with random weights, tokenizers trained on the spot, and the real inputs where they are at hand."""

import atexit
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CECOMPILE_CACHE"] = tempfile.mkdtemp(prefix="cecompile-tests-")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="cecompile-tests-")  # lm_eval's data; a home may not be writable
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compiling processes beside each test's
if "PYTEST_XDIST_WORKER" in os.environ:  # the others use the other cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings
from support.checkpoints import add_llama2_tokenizer, save_demo_llama, save_tiny_llama
from support.objects import keep
from support.runs import run_command

pytest_plugins = ["support.quick"]
for name in ("CECOMPILE_CACHE", "HF_HOME"):
    atexit.register(shutil.rmtree, os.environ[name], ignore_errors=True)
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_addoption(parser):
    parser.addoption("--ratios", action="store_true", help="tests/benchmarks: measure and assert ratios of times")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Benchmarks run once and measure nothing, unless an option of pytest-benchmark asks for their times.

    Where no times are asked for, code that is compiled again is copied.
    """
    asks = ("enable", "autosave", "save", "compare", "compare_fail", "json", "histogram", "cprofile")
    if not any(config.getoption(f"benchmark_{name}", None) for name in asks):
        config.option.benchmark_disable = True
        if not config.getoption("--ratios") and "PYTEST_XDIST_WORKER" not in os.environ:
            keep()


def pytest_collection_finish():
    """Leaves what the tests import out of all later collections of garbage, as the command line does."""
    gc.freeze()


@pytest.fixture(scope="session")
def ratios(pytestconfig) -> bool:
    """True where ratios of times are to be asserted."""
    return pytestconfig.getoption("--ratios")


@pytest.fixture
def one_thread():
    """As torchrun has it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A random Llama of 96 positions with the demo's tokenizer."""
    return save_demo_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def babbler(tmp_path_factory) -> Path:
    """The tiny Llama with the positions and the template that chats need."""
    return save_demo_llama(tmp_path_factory.mktemp("babbler"), max_position_embeddings=512)


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory) -> Path:
    """A random Llama of 27 MB whose activations take most of its memory, twelve times that in 2,048 tokens."""
    sizes = {"hidden_size": 128, "intermediate_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 8}
    sizes |= {"max_position_embeddings": 1024, "initializer_range": 0.02}
    return save_demo_llama(tmp_path_factory.mktemp("wide_llama"), **sizes)


@pytest.fixture(scope="session")
def scored(tmp_path_factory) -> Path:
    """The demo model's result on 40 questions, to be left as it is."""
    return evaluated(tmp_path_factory.mktemp("report") / "scored", "--limit", 40)


@pytest.fixture(scope="session")
def answered(tmp_path_factory) -> Path:
    """The demo model's result on five chats, to be left as it is."""
    return evaluated(tmp_path_factory.mktemp("report") / "answered", "--task", "chat", "--limit", 5)


def evaluated(output: Path, *arguments: object) -> Path:
    run_command("eval", "--engine", "eager", "--device", "cpu", *arguments, "--output", output)
    return output


@pytest.fixture(scope="session")
def held(tiny_llama) -> int:
    """Megabytes of a process about to load a model on the CPU; some builds of torch take 300 more than others."""
    code = (
        "import torch, cecompile.cli; from cecompile import Scorer, device; "
        f"Scorer.from_pretrained({str(tiny_llama)!r}, device='cpu'); print(device.used_already(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout) // 10**6


@pytest.fixture(scope="session")
def llama_tokenizer_dir(tmp_path_factory) -> Path:
    """A small random Llama with the Llama-2 tokenizer."""
    directory = tmp_path_factory.mktemp("llama_tokenizer")
    add_llama2_tokenizer(directory, add_bos_token=True)
    return save_tiny_llama(directory, 32_000, max_position_embeddings=2048)


@pytest.fixture(scope="session")
def rows_with_everything() -> list[dict]:
    """`query/choices/gold` rows with every quirk that tokenisation and truncation have to get right."""
    sentence = "the baker of the small town puts the warm bread on the long wooden table before the bell "
    long = (sentence * 14).strip()  # longer than the tiny model's positions
    return [
        {"query": "A plain question about bread", "choices": ["is good", "is bad", "is here", "is not"], "gold": 2},
        {"query": "", "choices": ["an empty context", "is nothing", "at all"], "gold": 0},
        {"query": "   ", "choices": ["only spaces before", "me and you"], "gold": 1},
        {"query": "Trailing spaces move  ", "choices": ["to the right", "to the left"], "gold": 0},
        {"query": "A line ends here\n", "choices": ["and goes on", "and stops", "and"], "gold": 2},
        {"query": "Two  spaces  inside", "choices": ["one  two", "one two", "one"], "gold": 0},
        {"query": "Choices that begin alike:", "choices": ["red", "red bread", "red bread table", "re"], "gold": 1},
        {"query": "One token each:", "choices": ["a", "b", "c", "d", "e"], "gold": 4},
        {"query": "The same twice:", "choices": ["again", "again"], "gold": 1},
        {"query": long, "choices": ["is too long", "is cut on the left side of the text", "no"], "gold": 1},
        {"query": long + " and", "choices": ["more", (sentence * 2).strip()], "gold": 0},
        {"query": "Ünïcödé — 漢字 🙂", "choices": ["ist schön", "は良い", "🙂🙂"], "gold": 2},
        {"query": "<s> written out", "choices": ["keeps one", "not two"], "gold": 0},
        {"query": "Questions that share a start: first", "choices": ["yes", "no"], "gold": 0},
        {"query": "Questions that share a start: second", "choices": ["yes", "no", "maybe so"], "gold": 1},
        {"query": "Questions that share a start", "choices": [": first yes", "of none"], "gold": 1},
    ]
