"""Faults of the machine: damaged checkpoints, full disks, failing devices, jumping clocks.

Each ends with its exit status and one line, and leaves a journal that can be resumed, or nothing.
"""

import dataclasses
import json
import os
import resource
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import WEIGHTS, change_json, tensors_of
from support.rows import ROWS, write_rows
from support.runs import Runs, run_command, samples, whole_run
from transformers import AutoTokenizer

from cecompile import demo
from cecompile.engine.decode import Decoder
from cecompile.engine.forward import Engine
from cecompile.planning.bucket_size import TUNING
from cecompile.results.journal import ANSWERS, NAME, Journal, read
from cecompile.run import evaluation
from cecompile.tasks import read as reading
from cecompile.workload.decode_schedule import DecodeShape

INDEX = "model.safetensors.index.json"


def evaluate(tmp_path: Path, *arguments: object, status: int = 2) -> str:
    """Runs eval; checks the status, one printable line, no traceback and no output directory; returns the line."""
    how = ("eval", "--device", "cpu", "--engine", "eager", "--output", tmp_path / "out")
    output = run_command(*how, *arguments, exit_code=status)
    lines = output.splitlines()
    assert len(lines) == 1, output
    assert lines[0].isprintable()
    assert "Traceback" not in lines[0]
    assert not (tmp_path / "out").exists()
    return lines[0]


# ---- checkpoints


def flip(path: Path, place: int, bits: int = 0xFF) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= bits
    path.write_bytes(content)


def replace(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) >= 1
    path.write_bytes(content.replace(old, new, 1))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def shard(model: Path, **index: object) -> Path:
    """Names the weights in an index, as of two files; `index` is put into it. Returns the file that has them."""
    names = dict.fromkeys(load_file(model / WEIGHTS), "one.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": names} | index))
    return (model / WEIGHTS).rename(model / "one.safetensors")


def index(model: Path, content: bytes) -> None:
    shard(model)
    (model / INDEX).write_bytes(content)


def config(**changes: object):
    return lambda model: change_json(model / "config.json", **changes)


def content_of(name: str, content: bytes):
    return lambda model: (model / name).write_bytes(content)


def weights_as(model: Path, name: str) -> None:
    (model / WEIGHTS).unlink()
    (model / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


def code_from_the_hub(model: Path) -> None:
    classes = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (model / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": classes}))
    (model / "mine.py").write_text("open('pwned', 'w')")


DEEP = b"[" * 100_000 + b"]" * 100_000
MINE = {"auto_map": {"AutoTokenizer": ["mine.T", None]}, "tokenizer_class": "Mine"}
NO_INDEX = ["weights: ", INDEX, "not an index"]
CHECKPOINTS = {
    "an empty file": (lambda m: cut(m / WEIGHTS, 0), ["weights", WEIGHTS]),
    "cut in the header's length": (lambda m: cut(m / WEIGHTS, 5), ["weights", WEIGHTS]),
    "cut in the header": (lambda m: cut(m / WEIGHTS, 100), ["weights", WEIGHTS]),
    "cut in the last tensor": (lambda m: cut(m / WEIGHTS, -1), ["weights", WEIGHTS]),
    "longer than its header says": (lambda m: (m / WEIGHTS).open("ab").write(b"\0" * 64), ["weights", WEIGHTS]),
    "a bit of the header's length": (lambda m: flip(m / WEIGHTS, 6, 1), ["weights", WEIGHTS]),
    "a brace of the header": (lambda m: flip(m / WEIGHTS, 8), ["weights", WEIGHTS]),
    "a tensor's name": (lambda m: replace(m / WEIGHTS, b"model.norm", b"model.nurm"), ["weights", "model.norm"]),
    "a tensor's dtype": (lambda m: replace(m / WEIGHTS, b'"F32"', b'"F23"'), ["weights", WEIGHTS]),
    "a tensor's place": (lambda m: replace(m / WEIGHTS, b'_offsets":[0,', b'_offsets":[1,'), ["weights", WEIGHTS]),
    "a tensor's shape": (lambda m: replace(m / WEIGHTS, b'"shape":[64]', b'"shape":[46]'), ["weights"]),
    "a directory for a file": (lambda m: ((m / WEIGHTS).unlink(), (m / WEIGHTS).mkdir()), ["weights"]),
    "a link to nothing": (lambda m: ((m / WEIGHTS).unlink(), (m / WEIGHTS).symlink_to("gone")), ["weights"]),
    "a shard that is not there": (lambda m: shard(m).unlink(), [f"weights: no one.safetensors, which {INDEX} names"]),
    "a shard cut off": (lambda m: cut(shard(m), 999), ["weights: one.safetensors: "]),
    "a shard without its last byte": (lambda m: cut(shard(m), -1), ["weights: one.safetensors: "]),
    "an empty index": (lambda m: index(m, b""), NO_INDEX),
    "an index that is not JSON": (lambda m: index(m, b'{"weight_map": {"mod'), NO_INDEX),
    "an index that is a list": (lambda m: index(m, b"[]"), NO_INDEX),
    "an index without a map": (lambda m: index(m, b"{}"), NO_INDEX),
    "an index whose map is a number": (lambda m: index(m, b'{"weight_map": 3}'), NO_INDEX),
    "an index nested deeply": (lambda m: index(m, DEEP), NO_INDEX),
    "an index that climbs out": (lambda m: shard(m, weight_map={"a": f"../{m.name}/{WEIGHTS}"}), [INDEX, "'../"]),
    "an index of absolute paths": (lambda m: shard(m, weight_map={"a": "/etc/passwd"}), [INDEX, "'/etc/passwd'"]),
    "an index of numbers": (lambda m: shard(m, weight_map={"a": 1}), [INDEX, "names 1"]),
    "a pickle": (lambda m: weights_as(m, "pytorch_model.bin"), ["safetensors"]),
    "another pickle": (lambda m: weights_as(m, "model.pt"), ["safetensors"]),
    "a GGUF file": (lambda m: weights_as(m, "model.gguf"), ["safetensors"]),
    "code from the hub": (code_from_the_hub, ["config.json"]),
    "a tokenizer of code from the hub": (lambda m: change_json(m / "tokenizer_config.json", **MINE), ["tokenizer"]),
    "an empty config": (content_of("config.json", b""), ["config.json"]),
    "a config that is a list": (content_of("config.json", b"[]"), ["config.json"]),
    "a config that is not JSON": (content_of("config.json", b"\xff\xfe{"), ["config.json"]),
    "a config nested deeply": (content_of("config.json", b'{"a":' + DEEP + b"}"), ["config.json"]),
    "a config of no model": (content_of("config.json", b"{}"), ["config.json"]),
    "a config of an unknown model": (content_of("config.json", b'{"model_type": "\\u001b[31m"}'), ["config.json"]),
    "no layers": (config(num_hidden_layers=-1), ["num_hidden_layers is -1"]),
    "more layers than stored": (config(num_hidden_layers=3), ["weights", "missing"]),
    "heads that do not divide": (config(num_attention_heads=3, head_dim=None), ["config.json", "attention heads"]),
    "a vocabulary of another size": (config(vocab_size=77), ["tokenizer"]),
    "a tokenizer cut off": (lambda m: cut(m / "tokenizer.json", 1000), ["tokenizer"]),
    "an empty tokenizer": (content_of("tokenizer.json", b""), ["tokenizer"]),
    "a tokenizer that is a list": (content_of("tokenizer.json", b"[]"), ["tokenizer"]),
    "a tokenizer config cut off": (lambda m: cut(m / "tokenizer_config.json", 10), ["tokenizer"]),
}


@pytest.fixture
def model(tiny_llama, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_damaged_checkpoints(name, model, tmp_path, monkeypatch):
    damage, words = CHECKPOINTS[name]
    damage(model)
    monkeypatch.chdir(tmp_path)
    message = evaluate(tmp_path, "--model", model, "--limit", 3)
    assert all(word in message for word in (str(model)[:200], *words)), message
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("engine", ["eager", "reference"])
def test_weights_that_are_not_numbers(value, engine, model, tmp_path):
    with tensors_of(model) as tensors:
        tensors["model.norm.weight"][:] = value
    message = evaluate(tmp_path, "--model", model, "--limit", 3, "--engine", engine, status=1)
    words = {"eager": "the stock model's logits are not numbers", "reference": "question '0': the model's log-prob"}
    assert words[engine] in message


def test_the_question_that_gives_no_number_is_named(babbler, tmp_path):
    """One token's embedding is no number, and one late question has it. To go on would end in the same."""
    model = shutil.copytree(babbler, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    token = tokenizer("Question Z is", add_special_tokens=False)["input_ids"]
    usual = set(tokenizer("".join(map(str, ROWS)))["input_ids"])
    with tensors_of(model) as tensors:
        tensors["model.embed_tokens.weight"][next(t for t in token if t not in usual)] = float("nan")
    rows = [*ROWS[:3], ROWS[0] | {"id": "the odd one", "query": "Question Z is"}, ROWS[4]]
    run = Runs(tmp_path, model, rows, "--engine", "reference")
    for more in ([], ["--resume"]):
        failed = run("out", *more)
        assert failed.exit_code == 1
        assert "question 'the odd one': the model's log-probability is nan; no result was written" in failed.output
        assert "continue with" not in failed.output
        assert [p.name for p in (tmp_path / "out").iterdir()] == [NAME]


# ---- the run


@pytest.fixture(scope="module")
def trees(babbler, tmp_path_factory) -> Runs:
    return whole_run(tmp_path_factory.mktemp("trees"), babbler, "trees")


def goes_on(run: Runs, name: str, failed, status: int, *words: str) -> None:
    """The run failed with one line that has these words, and can be resumed to the same result."""
    assert (failed.exit_code, len(failed.stderr.splitlines())) == (status, 1), failed.output
    assert all(word in failed.stderr for word in (*words, "; continue with: cecompile eval ")), failed.stderr
    assert [p.name for p in (run.directory / name).iterdir()] == [NAME]
    assert run.go_on(name)


@contextmanager
def files_of_at_most(size: int):
    """Limits files as a full disk does: writes are cut short, then refused."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("records", [1, 3])
def test_the_disk_is_full_before_the_end(records, trees):
    """In the middle of a record."""
    name, add = f"full {records}", Journal.add

    def add_and_fill(self, *record):
        if self._added == records:
            size = self.path.stat().st_size + 30
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        add(self, *record)

    with files_of_at_most(resource.RLIM_INFINITY):
        failed = trees.patched(name, Journal, "add", add_and_fill)
    assert len(list(read((trees.directory / name / NAME).read_bytes()))) == 1 + records
    goes_on(trees, name, failed, 2, "cannot be written: File too large")


def test_the_disk_is_full_from_the_start(trees):
    with files_of_at_most(10):
        failed = trees("full")
    assert failed.exit_code == 2
    assert "cannot be written: File too large" in failed.output
    assert "continue" not in failed.output
    assert not (trees.directory / "full").exists()


@pytest.mark.parametrize("kind", ["write_samples", "write_results"])
def test_the_disk_is_full_at_the_end(kind, trees):
    write = getattr(evaluation, kind)

    def full(*arguments):
        with files_of_at_most(100):
            write(*arguments)

    failed = trees.patched(kind, evaluation, kind, full)
    if kind == "write_results":  # samples.jsonl is whole by then, and written again
        (trees.directory / kind / "samples.jsonl").unlink()
    goes_on(trees, kind, failed, 2, "cannot be written: File too large")


def test_a_disk_that_is_really_full(trees):
    """/dev/full answers every write as a full disk does."""
    write = os.write
    with open("/dev/full", "wb") as full:

        def write_full(file, data):
            is_journal = os.readlink(f"/proc/self/fd/{file}").endswith(NAME)
            return write(full.fileno() if is_journal else file, data)

        failed = trees.patched("dev full", os, "write", write_full)
    assert (failed.exit_code, len(failed.output.splitlines())) == (2, 1)
    assert "No space left on device" in failed.output
    assert not (trees.directory / "dev full").exists()


@pytest.mark.parametrize("error", [RuntimeError, torch.AcceleratorError, torch.OutOfMemoryError])
def test_a_device_that_fails(error, trees):
    forward, calls, name = Engine._forward, [], error.__name__

    def fail_later(self, slot, readouts):
        calls.append(1)
        if len(calls) == 7:
            raise error("CUDA error: an illegal memory access\nCUDA kernel errors might be reported later")
        forward(self, slot, readouts)

    failed = trees.patched(name, Engine, "_forward", fail_later)
    goes_on(trees, name, failed, 1, "inference failed after", "passes: CUDA error: an illegal memory access")


def test_a_device_that_fails_while_decoding(babbler, tmp_path, monkeypatch):
    few = DecodeShape(slots=4096, lanes=4, step_tokens=(256, 4))  # so that some rows are done before others begin
    monkeypatch.setitem(TUNING, "cpu", dataclasses.replace(TUNING["cpu"], decoding=few))
    run, decode, add = whole_run(tmp_path, babbler, "chats"), Decoder.run, Journal.add
    kinds = []
    monkeypatch.setattr(Journal, "add", lambda self, *record: (add(self, *record), kinds.append(record[0]))[0])

    def fail_later(self, step):
        if ANSWERS in kinds:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return decode(self, step)

    failed = run.patched("out", Decoder, "run", fail_later)
    goes_on(run, "out", failed, 1, "answers decoded: CUDA error")


def test_data_that_changes_while_it_is_read(tmp_path, tiny_llama, monkeypatch):
    data = write_rows(tmp_path / "rows.jsonl", ROWS[:3])
    convert = reading.to_question

    def convert_while_others_write(row, fmt, where, position):
        if position == 1:
            with data.open("a") as file:
                file.write(json.dumps(ROWS[0]) + "\n")
        return convert(row, fmt, where, position)

    monkeypatch.setattr(reading, "to_question", convert_while_others_write)
    assert "rows.jsonl: changed while it was read" in evaluate(tmp_path, "--model", tiny_llama, "--data", data)


def test_data_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "neither a file nor a directory" in evaluate(tmp_path, "--data", tmp_path / "rows.jsonl")


def test_links_that_go_round(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("b.jsonl")
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    evaluate(tmp_path, "--data", tmp_path / "a.jsonl")
    evaluate(tmp_path, "--model", tmp_path / "a.jsonl")


def test_clocks_that_are_set_back(trees):
    """The wall clock may jump, as at the end of summer time: no phase is longer or shorter for it."""
    now, jumps = time.time, iter(range(10_000))
    assert trees.patched("clock", time, "time", lambda: now() - 86_400 * next(jumps)).exit_code == 0
    phases = trees.results("clock")["phases_s"]
    assert all(seconds >= 0 for seconds in phases.values())
    assert sum(phases.values()) < 86_400
    assert trees.samples("clock") == trees.samples("whole")


def test_an_output_directory_that_disappears(trees):
    """Results are written all the same; only the journal is gone."""
    write = evaluation.write_samples

    def write_after_loss(to, samples):
        shutil.rmtree(to)
        write(to, samples)

    assert trees.patched("gone", evaluation, "write_samples", write_after_loss).exit_code == 0
    assert trees.samples("gone") == trees.samples("whole")


# ---- where results go


OUTPUTS = {
    "a device": ("/dev/full", "is a file"),
    "below a file": (f"{demo.HELLASWAG}/out", ""),
    "below a device": ("/dev/null/out", ""),
    "where nothing can be made": ("/proc/out", "cannot be written"),
    "a name that is too long": ("x" * 300, ""),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_cannot_be(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output, words = OUTPUTS[name]
    for more in ([], ["--overwrite"], ["--resume"]):
        result = run_command("eval", "--output", output, *more, exit_code=2)
        assert len(result.splitlines()) == 1 or "Usage:" in result
        assert words in result
    assert not list(tmp_path.iterdir())


def test_an_output_that_links_to_nothing(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    result = run_command("eval", "--output", tmp_path / "link", exit_code=2)
    assert len(result.splitlines()) == 1
    assert "a link to nothing" in result


def test_links_among_the_results_are_replaced_not_followed(trees, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    output = trees.directory / "links"
    output.mkdir()
    for file in ("results.json", "samples.jsonl", ".samples.jsonl.1"):
        (output / file).symlink_to(theirs)
    assert trees("links", "--overwrite").exit_code == 0
    assert theirs.read_text() == "theirs"
    assert sorted(p.name for p in output.iterdir() if not p.is_symlink()) == ["results.json", "samples.jsonl"]


def test_names_in_the_data_are_no_paths(babbler, tmp_path):
    rows = [ROWS[0] | {"id": "../../climbed"}, ROWS[1] | {"id": "/tmp/climbed\x1b[31m"}]
    run = Runs(tmp_path, babbler, rows, "--engine", "eager")
    done = run("out")
    assert done.exit_code == 0
    assert "\x1b" not in done.output
    assert [sample["id"] for sample in samples(tmp_path / "out")] == [row["id"] for row in rows]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def test_a_cache_directory_that_is_a_link(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "real")
    assert "is a symbolic link" in evaluate(tmp_path, "--engine", "compiled", "--cache-dir", tmp_path / "cache")
    assert not list((tmp_path / "real").iterdir())
