"""Chat questions: what is read from them, and that answers are those of transformers' text-generation pipeline."""

import shutil
import signal

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import add_llama2_tokenizer, add_tokenizer, change_json, save_tiny_llama
from support.models import save
from support.passes import stock_texts
from support.rows import MADE_UP, ask, shared_file
from support.runs import json_lines, run_command
from support.runs import results as results_of
from support.runs import samples as samples_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cecompile import Answerer, ChatQuestion, demo, read_questions
from cecompile.cli import cli
from cecompile.engine import decode as decode_module
from cecompile.engine.stock_pipeline import stop_tokens
from cecompile.errors import UserError
from cecompile.tasks.chat import find_choices, judge_answer
from cecompile.workload.chat_tree import graft, prompts_of, walk

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


LISTS = {
    "choices: ['a', 'b']": ("a", "b"),
    "question: x\nchoices: ['the sun', 'it is']\n": ("the sun", "it is"),
    "choices: [True, False]": ("True", "False"),
    "choices: [1, 2.5, -3]": ("1", "2.5", "-3"),
    'choices: ["it\'s", \'a "quoted" word\']': ("it's", 'a "quoted" word'),
    r"choices: ['it\'s', 'back\\slash', 'two\nlines']": ("it's", "back\\slash", "two\nlines"),
    "choices: ['it's', 'the dogs' tails']": ("it's", "the dogs' tails"),
    "choices: ['[in] brackets', 'a, comma', \"', '\"]": ("[in] brackets", "a, comma", "', '"),
    "choices: ['only one']": ("only one",),
    "choices: ['a', 'a', '', '  ', 'b']": ("a", "b"),
    "choices: []": (),
    "choices: none": (),
    "choices: ['a', 'b'": (),
    "my choices: ['a', 'b']": (),
    "Choices:['a','b'] and more": ("a", "b"),
    "choices: ['a', 'b']\nquestion: again\nchoices: ['c', 'd']": ("c", "d"),
    "choices: ['a', __import__('os').system('touch pwned')]": (),
    "choices: [__import__('os').system('touch pwned') or 'a', 'b']": (),
    "choices: ['a' + __import__('os').system('touch pwned') + 'b', 'c']": (
        "a' + __import__('os').system('touch pwned') + 'b",
        "c",
    ),
    "choices: [[1, 2], {'a': 1}]": (),
    "choices: [{{}: 1}]": (),  # what has no hash cannot be a key
    "choices: [{[]}, 'a']": (),
    "no list": (),
    "": (),
}


@pytest.mark.parametrize("text", LISTS)
def test_choices_are_found(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_choices(text) == LISTS[text]
    assert not list(tmp_path.iterdir())


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=20, unique=True))
def test_what_python_writes_as_a_list_is_read_back(choices):
    assert find_choices(f"question: x\nchoices: {choices}\n") == tuple(choices)


@given(st.text())
def test_any_text_is_searched_for_choices(text):
    find_choices(f"choices: [{text}]")


def test_the_last_user_message_is_asked():
    turns = (("user", "choices: ['a', 'b']"), ("assistant", "choices: ['x', 'y']"))
    assert ask("which?\nchoices: ['c', 'd']", before=turns).choices == ("c", "d")
    assert ChatQuestion("0", turns, None).choices == ("a", "b")


JUDGED = [("a", "a", True), (" \na", "a", True), ("a\n", "a", True), ("a ", "a", False), ("b", "a", False)]


@pytest.mark.parametrize(("text", "answer", "correct"), [*JUDGED, ("a", None, None)])
def test_answers_are_judged_as_the_contest_does(text, answer, correct):
    assert judge_answer(ask("x", label=answer), text, 1, 0).correct is correct


@pytest.fixture(scope="module", params=["llama", "phi3", "llama with the Llama-2 tokenizer"])
def babbler(request, tmp_path_factory):
    """A tiny random model with a chat template: it says nothing that anybody would graft."""
    directory = tmp_path_factory.mktemp("babbler")
    if request.param.endswith("tokenizer"):
        special = ["<|user|>", "<|assistant|>", "<|end|>", "<|system|>"]
        add_llama2_tokenizer(directory, chat_template=TEMPLATE, extra_special_tokens=special)
        return save_tiny_llama(directory, 32_008, max_position_embeddings=4096)
    add_tokenizer(directory)
    if request.param == "llama":
        return save_tiny_llama(directory, 1024, max_position_embeddings=4096)
    positions = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.3}  # so that no two tokens are near
    return save(directory, "phi3", vocab_size=1024, pad_token_id=3, **positions, **sizes)


def test_babble_equals_the_pipelines(babbler):
    """Nothing is in the tree: all is decoded outside."""
    questions = [*MADE_UP, *read_questions(demo.CHAT, limit=4)]
    answers = Answerer.from_pretrained(babbler, engine="eager", device="cpu", new_tokens=40).answer(questions).answers
    assert [a.text for a in answers] == stock_texts(babbler, questions, 40)
    assert sum(a.decoded_tokens for a in answers) > 0.9 * sum(a.tokens for a in answers)


def test_official_rows_equal_the_pipelines(babbler):
    files = ("ce2024_test_dataset.jsonl", "ce2024_sample_longest.jsonl")
    questions = [question for file in files for question in read_questions(shared_file(file))]
    assert len(questions) == 31
    assert all(len(q.choices) >= 2 and q.label in q.choices for q in questions)
    answers = Answerer.from_pretrained(babbler, device="cpu", engine="eager", new_tokens=40).answer(questions).answers
    assert [a.text for a in answers] == stock_texts(babbler, questions, 40)


@pytest.mark.parametrize(
    ("engine", "new_tokens"),
    [pytest.param("compiled", 500, marks=pytest.mark.compiles), ("eager", 3), ("reference", 500)],
)
def test_demo_answers_equal_the_pipelines(engine, new_tokens):
    questions = [*read_questions(demo.CHAT), *MADE_UP]
    answers = Answerer.from_pretrained(device="cpu", engine=engine, new_tokens=new_tokens).answer(questions).answers
    assert [a.text for a in answers] == stock_texts(demo.MODEL, questions, new_tokens)
    if engine != "reference":
        assert sum(a.decoded_tokens == 0 for a in answers[:80]) >= 0.9 * 80
        assert all(a.tokens <= new_tokens for a in answers)


def test_a_model_that_cannot_be_decoded_here_is_left_to_generate(monkeypatch):
    class Other:
        """A cache of another kind, as another version of transformers may give to layers."""

    monkeypatch.setattr(decode_module, "Cache", Other)
    questions = MADE_UP[:6]
    answerer = Answerer.from_pretrained(device="cpu", engine="eager", new_tokens=12)
    answers = answerer.answer(questions).answers
    assert any(a.decoded_tokens for a in answers)
    assert [a.text for a in answers] == stock_texts(demo.MODEL, questions, 12)
    assert "stock model alone: LlamaDecoderLayer is given no key-value cache" in answerer.runtime.mode.note


def test_the_answer_does_not_depend_on_what_is_grafted():
    """Choices that the model never says, cut choices, and none give the answers of the right ones."""
    questions = read_questions(demo.CHAT, limit=8)
    answerer = Answerer.from_pretrained(device="cpu", engine="eager", new_tokens=20)
    texts = [a.text for a in answerer.answer(questions).answers]
    full = graft(questions, answerer.tokenizer, 1024, 20)
    bare = graft(questions, answerer.tokenizer, int(full.longest_prompt), 20)  # the longest prompt leaves no room
    assert [p.tolist() for p in prompts_of(full)] == [p.tolist() for p in prompts_of(bare)]
    assert len(bare) < len(full)
    other = [ChatQuestion(q.id, q.messages, q.label) for q in questions]
    assert [a.text for a in answerer.answer(other).answers] == texts


def test_the_walk_stops_where_the_tree_ends():
    tokenizer = Answerer.from_pretrained(device="cpu").tokenizer
    sequences = graft([ask("choices: ['ab', 'a']")], tokenizer, 1024, 9)
    forms = [sequences.targets(i)[:-1].tolist() for i in range(len(sequences))]
    prompt, longest, stop = prompts_of(sequences)[0], max(forms, key=len), frozenset([7])

    def argmax_along(answer):
        """Most likely tokens of a model that says `answer`: its next token, or 0 off its path."""
        paths = [form[:at] for form in forms for at in range(len(form) + 1)]
        here = [len(path) < len(answer) and path == answer[: len(path)] for path in paths]
        says = [answer[len(path)] if on_path else 0 for path, on_path in zip(paths, here, strict=True)]
        return np.array(says, dtype=np.int32)

    assert all(sequences.inputs(i)[: len(prompt)].tolist() == prompt.tolist() for i in range(len(sequences)))
    for said, most, tokens, complete in (
        ([*longest, 7], 9, [*longest, 7], True),
        ([7], 9, [7], True),
        ([*longest, 9, 9, 7], 9, [*longest, 9], False),  # leaves the tree
        ([*longest, 7], len(longest), longest, True),  # is cut
    ):
        (walked,) = walk(sequences, argmax_along(said), stop, most)
        assert (walked.tokens, walked.complete) == (tokens, complete)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("tokenizer_config", {"chat_template": None}, ["question '0'", "chat template"]),
        ("tokenizer_config", {"chat_template": "{{ raise_exception('roles!') }}"}, ["question '0'", "roles!"]),
        ("tokenizer_config", {"chat_template": "{{ nothing.at.all }}"}, ["question '0'", "chat template"]),
        ("generation_config", {"repetition_penalty": 1.1}, ["generation_config.json", "repetition_penalty 1.1"]),
        ("generation_config", {"num_beams": 4}, ["num_beams 4", "--engine reference"]),
        ("generation_config", {"suppress_tokens": [5]}, ["suppress_tokens"]),
        ("generation_config", {"encoder_repetition_penalty": 1.5}, ["encoder_repetition_penalty 1.5"]),
        ("generation_config", {"encoder_no_repeat_ngram_size": 2}, ["encoder_no_repeat_ngram_size 2"]),
        ("generation_config", {"token_healing": True}, ["token_healing True"]),
    ],
)
def test_models_that_cannot_answer_are_refused(file, changes, words, tmp_path):
    model = shutil.copytree(demo.MODEL, tmp_path / "model")
    change_json(model / f"{file}.json", **changes)
    how = ("--model", model, "--task", "chat", "--limit", 2, "--engine", "eager", "--device", "cpu")
    refused = run_command("eval", *how, "--output", tmp_path / "out", exit_code=2)
    assert not (tmp_path / "out").exists()
    assert len(refused.splitlines()) == 1
    assert all(word in refused for word in words), refused


TEMPLATES = {
    "divides by nothing": "{{ 1/0 }}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "is too large": "{{ 'x' * 10**18 }}",
    "is no template": "{% for %}",
    "asks for a file": "{% include 'roles' %}",
    "leaves the sandbox": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "counts too far": "{% for i in range(10**9) %}{% endfor %}",
    "has a wrong index": "{{ [1][2].x }}",
}
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "computes": "{{ (9**(9**9 + messages|length)) % 7 }}",
    "computes as it is compiled": "{{ 9**(9**9) }}",
    "calls": "{% macro f(n) %}{% for i in range(9999) %}{{ f(n - 1) if n else 1 }}{% endfor %}{% endmacro %}{{ f(9) }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_whatever_a_template_raises_is_one_line(name, tmp_path):
    model = shutil.copytree(demo.MODEL, tmp_path / "model")
    change_json(model / "tokenizer_config.json", chat_template=TEMPLATES[name])
    args = ["--model", str(model), "--task", "chat", "--limit", "2", "--engine", "eager", "--device", "cpu"]
    result = CliRunner().invoke(cli, ["eval", *args, "--output", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("cecompile: question '0': chat template: ")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_never_ends_is_ended(name, monkeypatch):
    monkeypatch.setattr("cecompile.workload.chat_tree.RENDERING", 0.3)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    tokenizer.chat_template = ENDLESS[name]
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(UserError, match=r"question '0': chat template: not done after 0\.3 seconds"):
        graft([ask("who?")], tokenizer, 100, 5)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_settings_that_change_no_greedy_answer_are_accepted():
    config = GenerationConfig(eos_token_id=[2, 3], min_new_tokens=0, guidance_scale=1, temperature=0.3, top_p=0.5)
    assert stop_tokens("m", config) == {2, 3}


def test_a_prompt_longer_than_the_model_is_refused():
    with pytest.raises(UserError, match=r"question 'long': a prompt of \d+ tokens, the model reads 1024"):
        Answerer.from_pretrained(device="cpu").prepare([ask("a b c " * 1000, id="long")])


@pytest.mark.compiles
def test_eval_writes_predictions_as_the_pipeline_does_and_warm_prepares_it(tmp_path):
    out = tmp_path / "out"
    same = ["--task", "chat", "--limit", 8, "--device", "cpu", "--max-new-tokens", 30]
    same += ["--cache-dir", tmp_path / "cache"]
    for command, word, more in (("warm", "decoding", ()), ("eval", "exact_match", ("--require-warm", "--output", out))):
        done = CliRunner().invoke(cli, [command, *map(str, (*same, *more))])
        assert done.exit_code == 0, done.output
        assert word in done.stdout

    results, samples, questions = results_of(out), samples_of(out), read_questions(demo.CHAT, limit=8)
    assert (results["task"], results["cache"]["state"]) == ("chat", "warm")
    assert json_lines(out / "predictions.jsonl") == [[{"generated_text": s["text"]}] for s in samples]
    right = [s["text"].lstrip().replace("\n", "") == q.label for s, q in zip(samples, questions, strict=True)]
    assert [s["correct"] for s in samples] == right
    assert results["metrics"]["exact_match"] == sum(right) / 8
    assert all(results["answers"][name] == sum(s[name] for s in samples) for name in ("in_tree", "decoded_tokens"))
    assert results["plan"]["decoding"]["slots"] >= 30

    scored = ("eval", "--limit", 4, "--engine", "eager", "--device", "cpu", "--output", out)
    run_command(*scored, exit_code=2)
    run_command(*scored, "--overwrite")
    assert not (out / "predictions.jsonl").exists()


def test_warm_up_without_the_data_serves_any_data_up_to_its_length():
    answerer = Answerer.from_pretrained(device="cpu", engine="eager", new_tokens=20)
    answerer.warm_up(MADE_UP[:2], longest=300)
    warmed = answerer.runtime.warmup.warmed
    questions = read_questions(demo.CHAT, limit=20)
    answers = answerer.answer(questions).answers
    assert answerer.runtime.warmup.warmed is warmed
    fresh = Answerer.from_pretrained(device="cpu", engine="eager", new_tokens=20).answer(questions).answers
    assert [a.text for a in answers] == [a.text for a in fresh]
    long = ask("the long road " * 180)
    (answer,) = answerer.answer([long]).answers
    assert answerer.runtime.warmup.warmed is not warmed
    assert [answer.text] == stock_texts(demo.MODEL, [long], 20)


def test_a_loaded_model_is_taken_as_it_is(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    questions = read_questions(demo.CHAT, limit=6)
    answers = Answerer.from_model(model, tokenizer, engine="eager", new_tokens=20).answer(questions).answers
    assert [a.text for a in answers] == stock_texts(demo.MODEL, questions, 20)
    with pytest.raises(UserError, match="engine 'fast': one of"):
        Answerer.from_model(model, tokenizer, engine="fast")
