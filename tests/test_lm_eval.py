"""The lm-evaluation-harness backend against lm_eval's own `hf` backend: every metric and every sample."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from support.checkpoints import add_tokenizer, tensors_of
from support.models import ARCHITECTURES
from support.rows import SHARED_DATA, write_rows
from support.runs import run_command
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma2ForCausalLM, PreTrainedTokenizerFast

from cecompile import Answerer, Scorer, demo, read_questions
from cecompile import evaluate as evaluate_questions
from cecompile.errors import UserError
from cecompile.lm_eval import CecompileLM

KINDS = ["llama", "opt", "phi3", "qwen2", "gemma2", "gpt_neox"]
SENTENCES = [
    "The baker of the small town puts the warm bread on the long wooden table before the bell rings",
    "A cow and a dog wait at the gate while Finn brings a bucket of clover and a bucket of bones",
    "Roll the dress in a dry towel and lay it flat on the grass until the evening comes",
    "Tom thanks Mara for the ball  and Emil thanks Ida for the whistle",
    "Nina looks for Karl in the stable, but Karl is at the mill with the miller's two donkeys",
    "In the morning the ferry crosses the river; in the evening it comes back empty",
]


def real_rows(name, count):
    """The first rows of a real set, none where it is not at hand."""
    path = SHARED_DATA / name
    if not path.is_file():
        return []
    with path.open() as file:
        return [json.loads(next(file)) for _ in range(count)]


def rows():
    """HellaSwag-form rows, a few from the real set where it is at hand."""
    own = [json.loads(line) for line in demo.HELLASWAG.read_text().splitlines()[:14]]
    own += real_rows("hellaswag_val.jsonl", 4)
    return [{k: row[k] for k in ("activity_label", "ctx_a", "ctx_b", "endings", "label")} for row in own]


def queries():
    """query/choices/gold rows: short choices, prefixes of each other, and real ones where they are at hand."""
    own = [
        {"query": "Choices that begin alike:", "choices": ["red", "red bread", "red bread table"], "gold": 1},
        {"query": "One token each:", "choices": ["a", "b", "c"], "gold": 2},
        {"query": "Trailing spaces  ", "choices": ["move", "to the right", "of it"], "gold": 0},
        {"query": "Ünïcödé — 漢字", "choices": ["ist schön", "は良い", "🙂🙂"], "gold": 2},
        {"query": "The same twice:", "choices": ["again", "again", "never"], "gold": 1},
        {"query": "And then the baker", "choices": ["sleeps", "bakes", "bakes bread"], "gold": 1},
    ]
    return own + real_rows("piqa.jsonl", 3) + real_rows("openbook_qa.jsonl", 3)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Configurations of one task of each output type, without and with examples."""
    folder = tmp_path_factory.mktemp("tasks")
    common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    examples = {"fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}}
    choice = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    hellaswag = {"doc_to_text": "{{activity_label}}: {{ctx_a}} {{ctx_b}}", "doc_to_target": "label"}
    query = {"doc_to_text": "query", "doc_to_target": "gold", "doc_to_choice": "choices"}
    words = {"output_type": "loglikelihood", "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]}
    words |= {"doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}", "doc_to_target": "{{' '+text.split(' ')[-1]}}"}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    rolling |= {"metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")]}
    lines = [{"text": text} for text in SENTENCES]
    book = [{"text": " ".join(SENTENCES * n)} for n in (1, 3, 9)] + [{"text": "short"}]
    kinds = {"hs": (choice | hellaswag | {"doc_to_choice": "endings"}, rows()), "qa": (choice | query, queries())}
    kinds |= {"lines": (words, lines), "book": (rolling, book)}
    out = []
    for name, (kind, content) in kinds.items():
        files = {"test": str(write_rows(folder / f"{name}.jsonl", content))}
        base = common | kind | {"dataset_kwargs": {"data_files": files}}
        out.append(base | {"task": f"{name}_0", "num_fewshot": 0})
        if name != "book":
            out.append(base | examples | {"task": f"{name}_5", "num_fewshot": 5})
    return out


def byte_tokenizer(begin):
    """Byte-level pieces, and `</s>` before every text (OPT's) or nothing (Qwen's)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>" if begin else None,
        eos_token="</s>", unk_token="</s>", pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:",
    )  # fmt: skip


def save_model(directory, kind, **more):
    """A tiny random model of the real class, with a tokenizer."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 3,
    }  # fmt: skip
    changes = ARCHITECTURES.get(kind, {}) | ({"original_max_position_embeddings": 512} if kind == "phi3" else {})
    config = AutoConfig.for_model(kind, **(sizes | changes | more))
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    if kind in ("opt", "qwen2", "gpt_neox"):
        byte_tokenizer(begin=kind == "opt").save_pretrained(directory)
        return directory
    return add_tokenizer(directory)


def run(lm, tasks, **options):
    """Results and samples of lm_eval's own evaluation."""
    loaded = TaskManager(include_defaults=False).load([dict(task) for task in tasks])
    out = evaluate(lm, loaded, bootstrap_iters=0, log_samples=True, verbosity="ERROR", **options)
    return out["results"], out["samples"]


def compare(ours, theirs):
    """Asserts that two runs agree in everything; returns how many answers were compared."""
    (results, samples), (expected, expected_samples) = ours, theirs
    assert results.keys() == expected.keys()
    for task, metrics in expected.items():
        for name, value in metrics.items():
            wanted = pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
            assert results[task][name] == wanted, (task, name)
    count = 0
    for task, listed in expected_samples.items():
        for one, other in zip(samples[task], listed, strict=True):
            assert one["doc_id"] == other["doc_id"]
            got, want = np.ravel(one["filtered_resps"]), np.ravel(other["filtered_resps"])
            if want.dtype == bool or want.dtype.kind in "US":
                got, want = (np.array(v["filtered_resps"], dtype=object).reshape(-1, 2) for v in (one, other))
                assert got[:, 1].tolist() == want[:, 1].tolist(), task
                got, want = got[:, 0], want[:, 0]
            np.testing.assert_allclose(got.astype(float), want.astype(float), rtol=0, atol=1e-3)
            count += len(want)
    return count


@pytest.mark.parametrize(
    ("kind", "engine"), [(k, "eager") for k in KINDS] + [pytest.param("llama", "compiled", marks=pytest.mark.compiles)]
)
def test_equals_the_hf_backend(kind, engine, tasks, tmp_path):
    if kind == "gemma2" and Gemma2ForCausalLM._supports_sdpa:
        pytest.skip("this transformers' own gemma2 leaves out the soft cap; trees are refused")
    model = save_model(tmp_path, kind)
    ours = CecompileLM(pretrained=str(model), device="cpu", dtype="float32", engine=engine)
    theirs = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=8)
    assert compare(run(ours, tasks), run(theirs, tasks)) > 100
    if engine == "eager":
        chosen = [task for task in tasks if task["output_type"] != "loglikelihood_rolling"]
        options = {"apply_chat_template": True, "fewshot_as_multiturn": True}
        assert compare(run(ours, chosen, **options), run(theirs, chosen, **options)) > 100


def another_head(directory: Path) -> None:
    with tensors_of(directory) as tensors:
        (embedding,) = (name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
        tensors["lm_head.weight"] = tensors[embedding].flip(0).clone()


def with_dropout(directory: Path) -> None:
    config = AutoConfig.from_pretrained(directory)
    config.update(dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.5))
    config.save_pretrained(directory)


def without_padding(directory: Path) -> None:
    """No token of a kind that lm_eval pads with: lm_eval then adds one to the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.unk_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(directory)


CHANGED = {  # what lm_eval does to a model and its tokenizer after loading: the model, and a change of its files
    "a tied head": ("llama", another_head),
    "a head tied by the family's default": ("gpt2", another_head),
    "a head tied to another name": ("opt", another_head),
    "dropout": ("gpt2", with_dropout),
    "no token to pad with": ("llama", without_padding),
}


@pytest.mark.parametrize("engine", ["eager", "reference"])
@pytest.mark.parametrize("name", CHANGED)
def test_the_same_through_both_doors_and_lm_evals(name, engine, tmp_path):
    """lm_eval ties a head that transformers leaves as stored; answers of chats are the pipeline's."""
    kind, change = CHANGED[name]
    path = str(save_model(tmp_path, kind, tie_word_embeddings="head" in name))
    change(tmp_path)
    questions = read_questions(demo.HELLASWAG, limit=5)
    asked = [(q.context, f" {choice}") for q in questions for choice in q.choices]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
    how = {"pretrained": path, "device": "cpu", "dtype": "float32"}
    theirs = [value for value, _ in HFLM(**how, batch_size=8).loglikelihood(requests)]
    through_lm_eval = [value for value, _ in CecompileLM(**how, engine="eager").loglikelihood(requests)]
    scorer = Scorer.from_pretrained(path, device="cpu", engine=engine)
    scored = evaluate_questions(scorer, questions)
    ours = [value for sample in scored.samples for value in sample.loglikelihoods]
    np.testing.assert_allclose(through_lm_eval, theirs, rtol=0, atol=1e-3)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    said = "the checkpoint's head is not used" in json.dumps(scored.results["engine"])
    assert said == ("head" in name)
    if said:
        kept = Answerer.from_pretrained(path, device="cpu", engine=engine).runtime.load()
        assert not torch.equal(kept.get_output_embeddings().weight, kept.get_input_embeddings().weight)


def test_several_tasks_are_one_plan_and_examples_are_shared(tasks, tmp_path, monkeypatch):
    ours = CecompileLM(pretrained=str(save_model(tmp_path, "llama")), device="cpu", engine="eager")
    plans = []
    planner = type(ours._scorer.runtime.planner)
    plan = planner.plan

    def remember(self, *args, **kwargs):
        plans.append(plan(self, *args, **kwargs))
        return plans[-1]

    monkeypatch.setattr(planner, "plan", remember)
    five = [task for task in tasks if task["task"] in ("hs_5", "qa_5", "lines_5")]
    run(ours, five)
    assert len(plans) == 1
    assert plans[0].unshared_tokens > 4 * plans[0].useful_tokens


def test_what_lm_eval_caches_and_generates_stays_its_own(tasks, tmp_path):
    model = save_model(tmp_path / "model", "llama")
    questions = next(t for t in tasks if t["task"] == "qa_0")
    generate = {name: questions[name] for name in ("dataset_path", "dataset_kwargs", "test_split", "num_fewshot")}
    generate |= {"task": "say", "output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    generate |= {"doc_to_text": "query", "doc_to_target": "{{choices[gold]}}"}
    generate |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}}
    chosen = [questions, generate]
    ours = CecompileLM(pretrained=str(model), device="cpu", dtype="float32", engine="eager")
    theirs = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=1)
    (_, samples), (_, expected) = run(ours, chosen), run(theirs, chosen)
    assert [s["resps"] for s in samples["say"]] == [s["resps"] for s in expected["say"]]
    kept = []
    ours.cache_hook.add_partial = lambda attr, asked, answer: kept.append((attr, asked, answer))
    run(ours, chosen[:1])
    assert {(attr, len(asked)) for attr, asked, _ in kept} == {("loglikelihood", 2)}
    assert len(kept) == sum(len(sample["resps"]) for sample in expected["qa_0"])


@pytest.mark.parametrize(
    ("options", "words"), [({"engine": "fast"}, "engine 'fast'"), ({"memory_limit": "much"}, "memory_limit 'much'")]
)
def test_options_are_checked(options, words, tmp_path):
    with pytest.raises(UserError, match=words):
        CecompileLM(pretrained=str(save_model(tmp_path, "llama")), device="cpu", **options)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"choices": ["yes", ""]}, "an empty continuation; look at the task's doc_to_choice"),
        ({"query": "", "choices": ["yes", ""]}, "an empty continuation; look at the task's doc_to_choice"),
        ({"query": "th", "choices": ["e", "no"]}, "continuation 'e' adds no token to its context; look at the"),
        ({"choices": ["yes", "word " * 600]}, r"a continuation of \d+ tokens; the model reads 512"),
    ],
)
def test_what_cannot_be_scored_is_named_by_its_task_and_document(row, line, tasks, tmp_path):
    rows = [{"query": "q", "choices": ["yes", "no"], "gold": 0} | more for more in ({}, row)]
    files = {"test": str(write_rows(tmp_path / "rows.jsonl", rows))}
    task = next(t for t in tasks if t["task"] == "qa_0") | {"dataset_kwargs": {"data_files": files}}
    model = save_model(tmp_path / "model", "llama")
    ours = CecompileLM(pretrained=str(model), device="cpu", dtype="float32", engine="eager")
    with pytest.raises(UserError, match=f"task 'qa_0', document 1: {line}"):
        run(ours, [task | {"target_delimiter": ""}])


@pytest.mark.process
def test_the_command_line_is_lm_evals(tasks, tmp_path, monkeypatch):
    import yaml

    model = save_model(tmp_path / "model", "llama")
    folder = tmp_path / "tasks"
    folder.mkdir()
    task = next(t for t in tasks if t["task"] == "qa_0")
    (folder / "qa_0.yaml").write_text(yaml.safe_dump(task))
    arguments = ["--model", "cecompile", "--model_args", f"pretrained={model},engine=eager,dtype=float32"]
    arguments += ["--include_path", str(folder), "--tasks", "qa_0", "--device", "cpu", "--limit", "5"]
    arguments += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    before = list(sys.argv)
    run_command("lm-eval", "--", *arguments)
    assert sys.argv == before
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())
    assert found["config"]["model"] == "cecompile"
    assert found["n-samples"]["qa_0"]["effective"] == 5


@pytest.mark.process
@pytest.mark.parametrize("model", ["cecompile", "hf"])
def test_metrics_whose_errors_a_pool_of_processes_finds(model, tasks, tmp_path):
    """The harness draws samples of a perplexity in processes, which it ends by signals; none of them is left."""
    import multiprocessing

    import yaml

    folder = tmp_path / "tasks"
    folder.mkdir()
    task = next(t for t in tasks if t["task"] == "lines_0")
    (folder / "lines_0.yaml").write_text(yaml.safe_dump(task))
    options = f"pretrained={save_model(tmp_path / 'model', 'llama')},dtype=float32"
    options += ",engine=eager" if model == "cecompile" else ""
    arguments = ["--model", model, "--model_args", options, "--include_path", str(folder), "--tasks", "lines_0"]
    run_command("lm-eval", "--", *arguments, "--device", "cpu", "--output_path", str(tmp_path / "out"))
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["lines_0"]["perplexity_stderr,none"] > 0
    assert not multiprocessing.active_children()
