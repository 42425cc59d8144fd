"""Graph passes of compiling for CUDA, checked on the CPU: the passes do not depend on the device."""

import pytest
import torch
from support.models import ARCHITECTURES, tiny_model
from support.passes import assert_scored_as_stock, random_sequences, score

from cecompile.engine import forward, inductor_cuda
from cecompile.engine.forward import inputs_are_free
from cecompile.model.structure import decoder_layers

IN_PLACE = torch.ops.aten.addmm_.default


class Counting(inductor_cuda.FewerMemoryPasses):
    """The pass, and how many in-place products it left in each graph."""

    def __init__(self, free: bool) -> None:
        super().__init__(free)
        self.counts: list[int] = []

    def __call__(self, graph) -> None:
        super().__call__(graph)
        self.counts.append(sum(node.target is IN_PLACE for node in graph.nodes))

    def uuid(self) -> None:
        """None: graphs are compiled anew, not taken from a cache."""


@pytest.fixture(params=[True, False], ids=["free", "kept"])
def counting(request, monkeypatch):
    one = Counting(request.param)
    monkeypatch.setattr(forward, "compile_options", lambda *_: {"post_grad_custom_post_pass": one})
    torch._dynamo.reset()
    return one


@pytest.mark.compiles
@pytest.mark.parametrize("kind", ["llama", "phi3", "opt"])
def test_scores_stay(counting, kind):
    assert_scored_as_stock(tiny_model(kind), random_sequences(questions=5), "flex", compiled=True)


@pytest.mark.compiles
def test_products_are_added_to_the_residual_in_place(counting):
    """Both of a Llama layer where its input may be overwritten, else the second, whose residual is its own."""
    score(tiny_model("llama"), random_sequences(questions=5), "flex", compiled=True)
    assert max(counting.counts) == (2 if counting._inputs_are_free else 1)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_stock_models_read_a_layers_input_in_that_layer_only(kind):
    model = tiny_model(kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert inputs_are_free(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.config._attn_implementation == "eager"


def test_an_input_read_later_is_found_out():
    model = tiny_model("llama")
    first, last = decoder_layers(model)
    kept = []
    first.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    last.register_forward_hook(lambda module, args, output: output + kept.pop())
    assert not inputs_are_free(model)
