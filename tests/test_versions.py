"""Internals of torch and transformers that the engine needs are found by trying; one line says if one is absent."""

import os
import re
import subprocess
import sys

import pytest
import torch
from support.models import tiny_model
from support.passes import prepared, random_sequences
from support.rows import write_table
from torch import nn
from transformers import PreTrainedModel

from cecompile import Question, Scorer, read_questions
from cecompile.engine import longrope
from cecompile.engine.decode import Decoder, NotDecodableError, _Recorder
from cecompile.engine.head import head_of
from cecompile.errors import UserError
from cecompile.model import structure, support
from cecompile.model.support import refusal
from cecompile.workload.decode_schedule import DecodeShape

ROWS = [{"query": f"Question {i} is", "choices": ["short", "rather longer"], "gold": i % 2} for i in range(4)]


class Other(nn.Module):
    """A class that transformers has under another name."""


def decoder_of(model) -> Decoder:
    engine, _ = prepared(model, random_sequences(), "sdpa", compiled=False)
    return engine.decoder(DecodeShape(64, 2, (8, 2)))


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "data", "own"),
    [("eval", "rows.csv", r"model +\S*tiny_llama"), ("plan", "rows.parquet", r"useful tokens ")],
)
def test_the_command_prints_its_own_lines_alone(name, data, own, tmp_path, tiny_llama):
    """With caches that are empty yet, as where it runs for the first time; compiled, in one case."""
    file = write_table(tmp_path / data, ROWS)
    command = [name, *(["--output", tmp_path / "out"] if name == "eval" else [])]
    command += ["--model", tiny_llama, "--data", file, "--device", "cpu", "--cache-dir", tmp_path / "code"]
    environment = {k: v for k, v in os.environ.items() if k != "HF_DATASETS_DISABLE_PROGRESS_BARS"}
    environment |= {"HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "cecompile", *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(own, done.stdout)


@pytest.mark.process
def test_a_name_that_is_gone_is_one_line_with_the_versions():
    code = (
        "import transformers.modeling_layers as m; del m.GradientCheckpointingLayer; "
        "import sys; sys.argv = ['cecompile', 'plan', '--device', 'cpu']; "
        "from cecompile.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    versions = r"installed: torch \S+, transformers \S+, .*\n"
    assert re.fullmatch(rf"cecompile: cannot import name 'GradientCheckpointingLayer' .*; {versions}", done.stderr)


def test_tables_without_the_library_that_reads_them(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    path.write_text("")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"rows\.parquet: read by the library pyarrow, which fails: import of pyarrow"):
        read_questions(path)
    with pytest.raises(UserError, match=r"owner/name: read by the library datasets, which fails: import of datasets"):
        read_questions("owner/name")


def test_layers_of_a_class_unknown_are_refused(monkeypatch):
    monkeypatch.setattr(structure, "GradientCheckpointingLayer", Other)
    assert "makes its decoder layers of a class unknown here" in refusal(tiny_model("llama"))


def test_compiled_code_in_a_place_unknown_is_refused(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.delattr(nn.Module, "_compiled_call_impl")
    assert "keeps a module's compiled code in a place unknown here" in refusal(model)


def test_attention_of_which_nothing_is_said_is_refused(monkeypatch):
    monkeypatch.delattr(PreTrainedModel, "_can_set_attn_implementation")
    support._asks_by_name.cache_clear()
    with pytest.raises(UserError, match="does not say which models' attention can be replaced"):
        refusal(tiny_model("llama"))


def test_options_that_torch_does_not_know_leave_a_run_uncompiled(monkeypatch, tiny_llama):
    monkeypatch.setattr(torch._inductor, "list_options", lambda: [])
    scorer = Scorer.from_pretrained(tiny_llama, device="cpu")
    scorer.score([Question("0", "Question 0 is", ("short", "rather longer"), 0)])
    note = r"ran uncompiled: torch \S+ has no Inductor option post_grad_custom_pre_pass"
    assert re.fullmatch(note, scorer.runtime.mode.note)


def test_longrope_without_frequencies_is_refused(monkeypatch):
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    parameters = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64} | factors
    model = tiny_model("phi3", rope_parameters=parameters)
    monkeypatch.setattr(longrope, "_USED", ("frequencies",))
    with pytest.raises(UserError, match="longrope: no frequencies found"):
        longrope.Frequencies(model)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_cache_is_found_by_place_or_by_name(kind):
    """GPT-2's decoder passes the cache by place; Llama's passes it by a name that depends on the version."""
    places = decoder_of(tiny_model(kind))._places
    assert [type(place) for place in places] == [int if kind == "gpt2" else str] * 2


def test_a_layer_that_asks_more_of_its_cache_is_not_decoded():
    model = tiny_model("llama")
    attention = model.base_model.layers[0].self_attn

    def asks_more(module, args, kwargs):
        for value in kwargs.values():
            if isinstance(value, _Recorder):
                value.something_new()

    attention.register_forward_pre_hook(asks_more, with_kwargs=True)
    with pytest.raises(NotDecodableError, match=r"with a key-value cache: .*something_new"):
        decoder_of(model)


def test_a_head_finds_none_where_it_looks_for_what_a_decoder_may_return():
    class Asking(nn.Module):
        base_model_prefix = "model"

        def __init__(self) -> None:
            super().__init__()
            self.model, self.lm_head = nn.Identity(), nn.Linear(4, 8)

        def forward(self, inputs_embeds, use_cache):
            out = self.model(inputs_embeds=inputs_embeds, use_cache=use_cache)
            assert out.cache is out.past_key_values is out.whatever_it_is_called is None
            self.logits = self.lm_head(out[0])
            return self

    hidden = torch.ones(3, 4)
    assert head_of(Asking())(hidden).shape == (3, 8)
