"""A graph from the cache is the graph that was compiled, and whatever changes it makes another one."""

import copy
import dataclasses
import textwrap
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from caching import events, first_call, new_process
from compiling import run_python
from graphs import GatedMLP, PostNorm, ReluMLP
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    StaticCache,
)

from qcompile import backend
from qcompile.lowering.cpu_library import ATTENTION, KERNELS, Kernel
from qcompile.lowering.target import detect
from qcompile.saved_graph import cache as graph_cache

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("kind", [GatedMLP, PostNorm, ReluMLP])
def test_the_second_process_computes_the_same_without_tracing(
    kind: type[nn.Module], inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = kind(), torch.randn(2, 5, 16)
    expected = first_call(model, x, inner=inner)
    assert events() == {"miss": 1, "kept": 1}
    monkeypatch.setattr(backend, "trace", None)
    assert torch.equal(first_call(model, x, inner=inner), expected)
    assert events() == {"hit": 1}


def test_the_second_process_loads_the_kernels_that_its_graph_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """It selects none for the graph, which is what loads them in the first one."""
    target = detect(torch.device("cpu"))
    if reason := ATTENTION.runs_on(target):
        pytest.skip(reason)
    model, ids = MODELS["llama"]().eval(), torch.ones(1, 8, dtype=torch.long)
    first_call(model, ids)
    loaded: set[Kernel] = set()
    monkeypatch.setattr(Kernel, "not_built", lambda self: loaded.add(self) or "")
    monkeypatch.setattr(backend, "trace", None)
    first_call(model, ids)
    assert events()["hit"] == 1
    products = {kernel for kernel in KERNELS if kernel.operator.startswith("scaled_mm")}
    assert ATTENTION in loaded
    assert len(loaded & products) == 1


def test_an_entry_whose_kernels_cannot_be_built_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    if reason := ATTENTION.runs_on(detect(torch.device("cpu"))):
        pytest.skip(reason)
    model, ids = MODELS["llama"]().eval(), torch.ones(1, 8, dtype=torch.long)
    expected = first_call(model, ids).logits
    built = Kernel.not_built
    monkeypatch.setattr(Kernel, "not_built", lambda self: "needs luck" if self is ATTENTION else built(self))
    events()
    assert torch.allclose(first_call(model, ids).logits, expected, atol=1e-5)
    assert events() == {"miss": 1, "kept": 1}
    assert any("qcompile_cpu::attention needs luck" in line for line in told)


def small(config: type[Any], **more: Any) -> Any:
    return config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, **more,
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(small(LlamaConfig)),
    "mixtral": lambda: MixtralForCausalLM(small(MixtralConfig, num_local_experts=4)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=0)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_language_model_calibrates_prefills_and_decodes_from_the_cache(name: str) -> None:
    model = MODELS[name]().eval()

    def conversation() -> list[Tensor]:
        new_process()
        run = torch.compile(model, backend="w8a8", options={"inner": "eager", "calibrate": 1}, dynamic=False)
        kept = StaticCache(model.config, max_cache_len=16)
        ids = torch.arange(8)[None]
        with torch.no_grad():
            run(ids)
            logits = [run(ids, past_key_values=kept).logits]
            for step in range(8, 12):
                position = torch.tensor([[step]])
                logits.append(run(position, position_ids=position, past_key_values=kept).logits)
        layers: Any = kept.layers
        return [*logits, *(tensor.clone() for layer in layers for tensor in (layer.keys, layer.values))]

    expected = conversation()
    compiled = events()
    assert compiled["kept"] == compiled["miss"] == 3
    assert "not_kept" not in compiled
    again = conversation()
    assert events() == {"hit": 3}
    assert len(again) == len(expected) == 9
    assert all(map(torch.equal, again, expected))


def test_writes_to_inputs_are_counted() -> None:
    """torch's version counters tell autograd, and this compiler's own store, that a tensor changed."""

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor, total: Tensor) -> Tensor:
            total.add_(x)
            y: Tensor = self.linear(x)
            return y

    model, x = Counter(), torch.randn(3, 16)
    versions = []
    for expected in ({"miss": 1, "kept": 1}, {"hit": 1}):
        total = torch.zeros(3, 16)
        before = total._version
        first_call(model, x, total)
        assert events() == expected
        assert torch.equal(total, x)
        versions.append(total._version - before)
    assert versions[0] == versions[1] > 0


def test_weights_are_not_part_of_it() -> None:
    model, x = ReluMLP(), torch.randn(4, 16)
    first_call(model, x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.5)
    expected = first_call(other, x)
    assert events() == {"miss": 1, "kept": 1, "hit": 1}
    assert not torch.equal(expected, first_call(model, x))


def test_another_process_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")  # an empty one would have the kernels compiled again
    script = textwrap.dedent("""
        import sys, torch
        from torch._dynamo.utils import counters
        torch.manual_seed(0)
        model = torch.nn.Sequential()
        model.add_module(sys.argv[1], torch.nn.Linear(16, 32))  # a name that no earlier run had
        x = torch.ones(3, 16)
        with torch.no_grad():
            y = torch.compile(model, backend="w8a8", options={"inner": "eager"})(x)
        print(dict(counters["qcompile"]), y.double().sum().item())
    """)
    name = f"linear_{uuid.uuid4().hex}"
    first, second = (run_python(script, name) for _ in range(2))
    assert "'graph_cache_miss': 1, 'graph_cache_kept': 1" in first
    assert "'graph_cache_hit': 1" in second
    assert first.split("}")[1] == second.split("}")[1]


def test_a_tied_linear_is_ignored_by_the_name_it_is_called_by() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
            self.last.weight = self.first.weight
            self.second = "first"

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.get_submodule(self.second)(self.first(x).relu())
            return y

    model, x = Tied(), torch.randn(4, 16)
    both = first_call(model, x, ignore=("last",))
    model.second = "last"
    assert not torch.equal(first_call(model, x, ignore=("last",)), both)
    assert events() == {"miss": 2, "kept": 2}


def test_where_inputs_begin_in_their_memory_is_kept() -> None:
    """Code for GPUs depends on it."""
    kept: list[Any] = []
    load = graph_cache.load
    x = torch.randn(2, 8, 16)[1, 1:5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_cache, "load", lambda *given: kept.append(load(*given)) or kept[-1])
        first_call(ReluMLP(), x)
        first_call(ReluMLP(), x)
    run = kept[1].partition.run.graph
    records = {n: n.meta.get("input") for n in run.find_nodes(op="placeholder")}
    (found,) = (n.meta["val"] for n, record in records.items() if record and record.kind == "activation")
    assert (found.shape, found.stride(), found.storage_offset()) == (x.shape, x.stride(), x.storage_offset())


def test_autocast_is_off_around_a_graph_from_the_cache() -> None:
    model, x = GatedMLP(), torch.randn(2, 5, 16)
    outputs = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(first_call(model, x))
    assert events() == {"miss": 1, "kept": 1, "hit": 1}
    assert outputs[0].dtype == outputs[1].dtype
    assert torch.equal(*outputs)
    first_call(model, x)
    assert events() == {"miss": 1, "kept": 1}


def test_a_graph_survives_the_file(cache: Path) -> None:
    """Code, what inputs stand for, and what is prepared from which parameters."""
    kept: list[Any] = []
    save = graph_cache.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_cache, "save", lambda key, stages: (kept.append((key, stages)), save(key, stages)))
        first_call(GatedMLP(), torch.randn(2, 5, 16), calibrate=1)
    ((key, stages),) = kept
    loaded = graph_cache.load(key, torch._subclasses.FakeTensorMode())
    assert loaded is not None
    assert dataclasses.replace(loaded, partition=None, observed=None) == dataclasses.replace(
        stages, partition=None, observed=None, quantized=None, refusals=(), guards=0
    )
    for old, new in (
        (stages.partition.run, loaded.partition.run),
        (stages.partition.prepare, loaded.partition.prepare),
        (stages.observed, loaded.observed),
    ):
        assert new.code == old.code
        assert [node.meta.get("input") for node in new.graph.nodes] == [n.meta.get("input") for n in old.graph.nodes]
    assert [(p.node.name, p.digest, p.leaves) for p in loaded.partition.prepared] == [
        (p.node.name, p.digest, p.leaves) for p in stages.partition.prepared
    ]
    assert loaded.partition.run_inputs == stages.partition.run_inputs
