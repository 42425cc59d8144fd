"""Mistakes of a user: exit status 2, one line that names file, line and field, nothing written."""

import json
import shutil

import pytest
from support.checkpoints import add_tokenizer, save_tiny_llama
from support.runs import run_command

GOOD = {"query": "q", "choices": ["a", "b"], "gold": 0}
HELLASWAG = {"activity_label": "l", "ctx_a": "a", "ctx_b": "b", "endings": ["x", "y"], "label": 1}
ARC = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
CHAT = {"message": [{"role": "user", "content": "x"}], "answer": "a"}
PIQA = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}


def line(row, **changes) -> bytes:
    row = {k: v for k, v in (row | changes).items() if v is not ...}
    return json.dumps(row).encode() + b"\n"


good = line(GOOD)

# name: (content of bad.jsonl, words the message must have)
CONTENTS = {
    "empty file": (b"", ["bad.jsonl", "no rows"]),
    "blank lines only": (b"\n  \n\n", ["bad.jsonl", "no rows"]),
    "not JSON": (good + b"{query: 1}\n", ["bad.jsonl: line 2", "not valid JSON"]),
    "cut off": (good + good + good[:20], ["bad.jsonl: line 3", "not valid JSON"]),
    "two objects on a line": (good.strip() + good, ["bad.jsonl: line 1", "not valid JSON"]),
    "invalid UTF-8": (good + b'{"query": "\xff"}\n', ["bad.jsonl: line 2", "UTF-8"]),
    "UTF-16": (b"\xff\xfe{\x00}\x00\n", ["line 1", "UTF-8"]),
    "a list for a row": (good + b"[1, 2]\n", ["bad.jsonl: line 2", "expected an object"]),
    "a number for a row": (b"3\n", ["bad.jsonl: line 1", "expected an object"]),
    "null for a row": (good + b"null\n", ["bad.jsonl: line 2", "expected an object"]),
    "nested too deeply": (b'{"query":' + b"[" * 200_000 + b"\n", ["bad.jsonl: line 1", "not valid JSON"]),
    "a number of many digits": (b'{"query": ' + b"9" * 10_000 + b"}\n", ["bad.jsonl: line 1", "not valid JSON"]),
    "unknown fields": (b'{"text": "hello"}\n', ["bad.jsonl: line 1", "text", "no known format"]),
    "no fields": (b"{}\n", ["bad.jsonl: line 1", "no known format"]),
    "two formats at once": (line(GOOD | PIQA), ["bad.jsonl: line 1", "query/choices/gold and piqa"]),
    "a format that changes": (good + line(PIQA), ["bad.jsonl: line 2", "'choices'", "missing"]),
    "a chat without messages": (line(CHAT, message=[]), ["bad.jsonl: line 1", "'message'", "an empty list"]),
    "a chat that is a text": (line(CHAT, message="x"), ["bad.jsonl: line 1", "'message'", "a text"]),
    "a message that is a text": (line(CHAT, message=["x"]), ["bad.jsonl: line 1", "'message[0]'", "a text"]),
    "a message without a role": (line(CHAT, message=[{"content": "x"}]), ["'message[0].role'", "nothing"]),
    "a message without content": (line(CHAT, message=[{"role": "user"}]), ["'message[0].content'", "nothing"]),
    "content in parts": (line(CHAT, message=[{"role": "user", "content": ["x"]}]), ["'message[0].content'", "a list"]),
    "an answer that is no text": (line(CHAT, answer=True), ["bad.jsonl: line 1", "'answer'", "truth"]),
    "an answer to some chats": (line(CHAT) + line(CHAT, answer=...), ["bad.jsonl: line 2", "'answer'", "missing"]),
    "a surrogate in a chat": (line(CHAT, answer="\ud800"), ["bad.jsonl: line 1", "'answer'", "surrogate"]),
    "no choices": (good + line(GOOD, choices=[]), ["bad.jsonl: line 2", "'choices'", "0 choices"]),
    "one choice": (good + line(GOOD, choices=["a"]), ["bad.jsonl: line 2", "'choices'", "1 choices"]),
    "an empty choice": (good + line(GOOD, choices=["a", ""]), ["bad.jsonl: line 2", "'choices[1]'", "empty"]),
    "a blank choice": (good + line(GOOD, choices=["  ", "b"]), ["bad.jsonl: line 2", "'choices[0]'", "empty"]),
    "choices of numbers": (line(GOOD, choices=["a", 2]), ["bad.jsonl: line 1", "'choices[1]'", "number"]),
    "choices as a text": (line(GOOD, choices="a, b"), ["bad.jsonl: line 1", "'choices'", "list"]),
    "choices as a set of lists": (line(GOOD, choices="{[]}"), ["bad.jsonl: line 1", "'choices'", "expected a list"]),
    "choices null": (line(GOOD, choices=None), ["bad.jsonl: line 1", "'choices'", "null"]),
    "query a number": (line(GOOD, query=5), ["bad.jsonl: line 1", "'query'", "number"]),
    "query null": (line(GOOD, query=None), ["bad.jsonl: line 1", "'query'", "null"]),
    "a lone surrogate": (b'{"query": "\\ud800", "choices": ["a", "b"]}\n', ["line 1", "'query'", "Unicode"]),
    "gold out of range": (good + line(GOOD, gold=2), ["bad.jsonl: line 2", "'gold'", "out of range"]),
    "gold negative": (line(GOOD, gold=-1), ["bad.jsonl: line 1", "'gold'", "out of range"]),
    "gold a fraction": (line(GOOD, gold=0.5), ["bad.jsonl: line 1", "'gold'", "number (0.5)"]),
    "gold a truth value": (line(GOOD, gold=True), ["bad.jsonl: line 1", "'gold'", "truth value"]),
    "gold a letter": (line(GOOD, gold="A"), ["bad.jsonl: line 1", "'gold'", "'A'"]),
    "gold missing in one row": (good + line(GOOD, gold=...), ["bad.jsonl: line 2", "'gold'", "missing"]),
    "gold in one row only": (line(GOOD, gold=...) + good, ["bad.jsonl: line 2", "'gold'", "unlike"]),
    "id a list": (line(GOOD, id=[1]), ["bad.jsonl: line 1", "'id'", "list"]),
    "HellaSwag without endings": (line(HELLASWAG) + line(HELLASWAG, endings=...), ["line 2", "'endings'", "missing"]),
    "HellaSwag ending of marks": (line(HELLASWAG, endings=["[step]", "y"]), ["line 1", "'endings[0]'", "empty"]),
    "HellaSwag label out of range": (line(HELLASWAG, label="4"), ["bad.jsonl: line 1", "'label'", "out of range"]),
    "HellaSwag ctx_b null": (line(HELLASWAG, ctx_b=None), ["bad.jsonl: line 1", "'ctx_b'", "null"]),
    "ARC choices a list": (line(ARC, choices=["a", "b"]), ["line 1", "'choices'", "object"]),
    "ARC labels too few": (line(ARC, choices={"text": ["a", "b"], "label": ["A"]}), ["line 1", "'choices.label'"]),
    "ARC key not a label": (line(ARC, answerKey="E"), ["bad.jsonl: line 1", "'answerKey'", "'E'"]),
    "ARC text missing": (line(ARC, choices={"label": ["A", "B"]}), ["bad.jsonl: line 1", "'choices.text'"]),
    "PIQA solution empty": (line(PIQA, sol2=""), ["bad.jsonl: line 1", "sol2", "empty"]),
    "PIQA label out of range": (line(PIQA, label=2), ["bad.jsonl: line 1", "'label'", "out of range"]),
    "terminal escapes": (b'{"\\u001b[31mred": 1}\n', ["bad.jsonl: line 1", "\\x1b[31mred"]),
    "terminal escapes in a value": (line(GOOD, gold="\x1b]0;title\x07"), ["'gold'", "\\x1b]0;title\\x07"]),
    "bidirectional marks": (line(GOOD, gold="\u202etxt.exe"), ["'gold'", "\\u202etxt.exe"]),
    "a line break in a key": (b'{"a\\nb": 1}\n', ["bad.jsonl: line 1", "a\\nb"]),
    "a value of ten megabytes": (line(GOOD, gold="x" * 10_000_000), ["bad.jsonl: line 1", "'gold'", "xxx"]),
    "a key of ten megabytes": (b'{"' + b"k" * 10_000_000 + b'": 1}\n', ["bad.jsonl: line 1", "no known format"]),
    "a list written out, nested": (line(GOOD, choices="[" * 100_000), ["'choices'", "expected a list"]),
    "one empty of many choices": (line(GOOD, choices=["x"] * 100_000 + [" "]), ["'choices[100000]'", "empty"]),
    "gold not a number": (b'{"query": "q", "choices": ["a", "b"], "gold": NaN}\n', ["'gold'", "number (nan)"]),
    "gold infinite": (b'{"query": "q", "choices": ["a", "b"], "gold": 1e999}\n', ["'gold'", "number (inf)"]),
    "gold an object": (line(GOOD, gold={"a": 0}), ["'gold'", "object"]),
    "gold of many digits": (line(GOOD, gold="1" * 5000), ["'gold'", "index of a choice"]),
    "id null": (line(GOOD, id=None), ["bad.jsonl: line 1", "'id'", "null"]),
    "id a surrogate": (line(GOOD, id="\ud800"), ["bad.jsonl: line 1", "'id'", "surrogate"]),
    "choices in choices": (line(GOOD, choices=[["a"], ["b"]]), ["'choices[0]'", "a list"]),
    "an array cut off": (b'[{"query": "q", ', ["bad.jsonl: line 1", "not valid JSON"]),
    "an array with more after it": (b"[] []", ["bad.jsonl: line 1", "not valid JSON"]),
    "an empty array": (b"[]", ["bad.jsonl", "no rows"]),
    "an array of arrays": (b"[[1]]", ["bad.jsonl: item 1", "expected an object"]),
    "an array nested too deeply": (b"[" * 200_000, ["not valid JSON", "nested too deeply"]),
    "zeros": (bytes(1000), ["bad.jsonl: line 1", "not valid JSON"]),
    "control characters": (b'{"query": "a\x00b"}\n', ["bad.jsonl: line 1", "not valid JSON"]),
    "a program": (b"\x7fELF\x02\x01\x01\x00\n", ["bad.jsonl: line 1", "not valid JSON"]),
    "compressed": (b"\x1f\x8b\x08\x00\xff\xff", ["bad.jsonl: line 1", "UTF-8"]),
    "a chat role of a number": (line(CHAT, message=[{"role": 1, "content": "x"}]), ["'message[0].role'", "number"]),
    "ARC labels of numbers": (line(ARC, choices={"text": ["a", "b"], "label": [1, 2]}), ["'choices.label[0]'"]),
    "ARC key a number": (line(ARC, answerKey=1), ["'answerKey'", "expected a text"]),
}


def refuse(tmp_path, *arguments) -> str:
    """Runs eval; checks status 2, one line, no traceback, no output directory; returns the line."""
    output = tmp_path / "out"
    result = run_command("eval", "--device", "cpu", "--output", output, *map(str, arguments), exit_code=2)
    assert "Traceback" not in result
    lines = result.strip().splitlines()
    assert len(lines) == 1, result
    assert lines[0].isprintable()
    assert not output.exists()
    return lines[0]


def refuse_rows(tmp_path, content: bytes, *arguments, name: str = "rows.jsonl") -> str:
    (tmp_path / name).write_bytes(content)
    return refuse(tmp_path, "--data", tmp_path / name, *arguments)


@pytest.mark.parametrize("name", CONTENTS)
def test_bad_rows(name, tmp_path):
    content, words = CONTENTS[name]
    message = refuse_rows(tmp_path, content, name="bad.jsonl")
    for word in words:
        assert word in message


ARRAY = json.dumps([GOOD, GOOD | {"gold": 9}]).encode()
ONE_CHOICE = b'query,choices,gold\nq,"[""a"", ""b""]",0\nq,"[""a""]",0\n'
TABLES = {
    "an array": ("bad.json", ARRAY, "bad.json: item 2: field 'gold': 9 is out of range"),
    "CSV of one choice": ("bad.csv", ONE_CHOICE, "bad.csv: row 2: field 'choices': 1 choices"),
    "parquet that is not": ("bad.parquet", b"not parquet", "bad.parquet: not readable as parquet"),
    "parquet of nothing": ("bad.parquet", b"", "bad.parquet: not readable as parquet"),
    "parquet cut off": ("bad.parquet", b"PAR1" + bytes(40), "bad.parquet: not readable as parquet"),
    "a text": ("rows.txt", b"{}", "rows.txt: unknown file type"),
    "CSV of nothing": ("bad.csv", b"", "bad.csv: not readable as csv"),
    "CSV of a header alone": ("bad.csv", b"query,choices,gold\n", "bad.csv: not readable as csv"),
    "CSV of other columns": ("bad.csv", b"a,b\n1,2\n", "bad.csv: row 1: fields a, b: no known format"),
    "CSV of uneven rows": ("bad.csv", b"query,choices\na,\"['b', 'c']\"\na,b,c,d\n", "bad.csv: not readable as csv"),
    "CSV not in UTF-8": ("bad.csv", b"query,choices\n\xff,b\n", "bad.csv: not readable as csv"),
    "CSV with an open quote": ("bad.csv", b'query,choices\n"a,b\n', "bad.csv"),
}


@pytest.mark.parametrize("name", TABLES)
def test_bad_tables(name, tmp_path):
    file, content, words = TABLES[name]
    assert words in refuse_rows(tmp_path, content, name=file)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("no/such/dir/file.csv", "no/such/dir/file.csv: no such file"),
        ("x" * 5000, "cannot be read"),
        ("nobody/nothing-of-the-kind", "neither a file nor a dataset that loads"),
        ("not a hub id", "no such file"),
        ("zero\0byte.jsonl", "zero\\x00byte.jsonl"),
        ("\x1b[2J.jsonl", "\\x1b[2J.jsonl: no such file"),
        ("/dev/zero", "neither a file nor a directory"),
        ("/dev", "is a directory"),
        ("", "is a directory"),
        ("../../../../../../etc/passwd", "unknown file type"),
        ("file:///etc/passwd", "no such file"),
        ("https://example.org/rows.jsonl", "no such file"),
    ],
)
def test_data_that_is_not_there(data, words, tmp_path):
    assert words in refuse(tmp_path, "--data", data)


def test_task_that_does_not_fit(tmp_path):
    message = refuse_rows(tmp_path, good, "--task", "hellaswag")
    assert "rows.jsonl: line 1" in message
    assert "no known format" in message


@pytest.mark.process
def test_models_that_are_not(tmp_path, tiny_llama):
    assert "no such directory" in refuse(tmp_path, "--model", "./nowhere")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refuse(tmp_path, "--model", tmp_path / "empty")
    assert "config.json" in refuse(tmp_path, "--model", "nobody/nothing-of-the-kind")

    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(tiny_llama / "config.json", model)
    assert "tokenizer" in refuse(tmp_path, "--model", model)
    add_tokenizer(model)
    assert "weights" in refuse(tmp_path, "--model", model)
    weights = (tiny_llama / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "weights" in refuse(tmp_path, "--model", model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "safetensors" in refuse(tmp_path, "--model", model)


def with_config(directory, model, **changes):
    """Copies a checkpoint, its configuration changed."""
    shutil.copytree(model, directory, dirs_exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


@pytest.mark.parametrize(
    ("changes", "words"), [({"intermediate_size": 256}, "weights"), ({"hidden_size": "wide"}, "config.json")]
)
def test_weights_of_another_shape(changes, words, tmp_path, tiny_llama):
    assert words in refuse(tmp_path, "--model", with_config(tmp_path, tiny_llama, **changes))


@pytest.mark.parametrize(
    ("row", "how"),
    [
        (line(GOOD, query="a question of many words " * 4), ["--stream-weights"]),
        (line(CHAT), ["--max-new-tokens", "16"]),
    ],
)
def test_longrope_where_inputs_grow_beyond_its_boundary(tmp_path, tiny_llama, row, how):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 10000.0}
    boundary = {"original_max_position_embeddings": 16}
    with_config(tmp_path, tiny_llama, **boundary, rope_parameters=rope | boundary)
    assert "longrope" in refuse_rows(tmp_path, row, "--model", tmp_path, *how)


def test_encoder_decoder_models(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert "encoder-decoder" in refuse(tmp_path, "--model", tmp_path)


def test_tokenizer_of_another_model(tmp_path):
    wrong = add_tokenizer(save_tiny_llama(tmp_path / "wrong", 100))
    assert "not this model's tokenizer" in refuse(tmp_path, "--model", wrong)


def test_choice_longer_than_the_model(tmp_path, tiny_llama):
    message = refuse_rows(tmp_path, good + line(GOOD, choices=["a", "word " * 300]), "--model", tiny_llama)
    assert "question '1': choice 1" in message
    assert "the model reads 96" in message


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "mps"])
def test_devices_that_are_not(device, tmp_path):
    output = tmp_path / "out"
    assert f"--device {device}" in run_command("eval", "--device", device, "--output", output, exit_code=2)
    assert not output.exists()


def test_output_directories(tmp_path):
    for name in ("file", "else/thesis.tex", "done/results.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    for name, words in (("file", "is a file"), ("else", "not a result directory"), ("done", "--overwrite")):
        assert words in run_command("eval", "--output", tmp_path / name, exit_code=2)
    assert "cannot be written" in run_command("eval", "--output", "/proc/nowhere/out", exit_code=2)


@pytest.mark.parametrize(
    "arguments",
    [*(["--limit", number] for number in ("0", "1.5", "inf", "nan")), ["--tokens-per-bucket", "12"], ["--what"]],
)
def test_usage(arguments):
    assert "Traceback" not in run_command("eval", *arguments, exit_code=2)
