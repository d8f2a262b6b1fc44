"""Small modules that between them hold every pattern the passes know, and a way to capture them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from qcompile import ops
from qcompile.capture import capture_call
from qcompile.captured import Captured
from qcompile.pass_pipeline import Pass, PassResult
from qcompile.rewrite import Rewriter, copy_graph
from qcompile.validate import graph_inputs


def captured(model: nn.Module, *inputs: Tensor, dynamic: bool = False, **keywords: Any) -> Captured:
    """The one graph of a call of model, as the passes receive it."""
    import inspect

    names = list(inspect.signature(model.forward).parameters)
    (only,) = capture_call(model.eval(), {**dict(zip(names, inputs, strict=False)), **keywords}, dynamic=dynamic)
    return only


def apply(captured: Captured, *passes: Pass) -> tuple[GraphModule, list[PassResult]]:
    """A copy of the captured graph after the passes, and what each of them reported."""
    gm = copy_graph(captured.graph)
    results = [step.run(gm) for step in passes]
    gm.recompile()
    return gm, results


def outputs(gm: GraphModule, captured: Captured, absmax: float | dict[str, Tensor] = 1.0) -> list[Any]:
    """Run a graph on the captured arguments; statistics are ones times `absmax`, or given by weight name."""

    def statistic(weight: Tensor, name: str, field: str) -> Tensor:
        if isinstance(absmax, dict):
            return absmax[name]
        node = next(n for n in gm.graph.find_nodes(op="placeholder") if _is_statistic(n, name))
        return torch.full(tuple(node.meta["val"].shape), absmax)

    with torch.no_grad():
        return list(Interpreter(gm).run(*graph_inputs(gm, captured.args, statistic)))


def _is_statistic(node: torch.fx.Node, name: str) -> bool:
    record = node.meta["input"]
    return record.kind == "statistic" and record.name == name


def in_two_steps(gm: GraphModule) -> GraphModule:
    """A copy in which every scaled_mm is accumulate and from_sums, as several processes have it."""
    copied = copy_graph(gm)
    rewriter = Rewriter(copied, "test")
    for product in copied.graph.find_nodes(op="call_function", target=ops.scaled_mm):
        x, weight, *rest = product.args
        sums = rewriter.emit(ops.accumulate, (x, weight), before=product, of=product, name="sums")
        y = rewriter.emit(ops.from_sums, (sums, *rest), before=product, of=product, name="y")
        rewriter.replace(product, y)
    copied.recompile()
    return copied


def targets(gm: GraphModule) -> list[str]:
    """The names of what the graph calls, in order."""
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def count(gm: GraphModule, target: Any) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=target))


class RMSNorm(nn.Module):
    """x / rms(x) · gain, written out as Hugging Face models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class GatedMLP(nn.Module):
    """norm → gate, up → silu(gate)·up → down, with a residual."""

    def __init__(self, width: int = 16, hidden: int = 24, bias: bool = False) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(h)) * self.up_proj(h))


class Attention(nn.Module):
    """norm → q, k, v → grouped-query attention → o, with a residual."""

    def __init__(self, width: int = 16, heads: int = 4, kv_heads: int = 2, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 1.5)
            self.norm.bias.uniform_(-0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        h = self.norm(x)

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(batch, tokens, heads, self.head_dim).transpose(1, 2)

        q, k, v = split(self.q_proj(h), self.heads), split(self.k_proj(h), self.kv_heads), self.v_proj(h)
        groups = self.heads // self.kv_heads
        k = k.repeat_interleave(groups, 1)
        v = split(v, self.kv_heads).repeat_interleave(groups, 1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o_proj(y.transpose(1, 2).reshape(batch, tokens, width))


class PostNorm(nn.Module):
    """BERT's order: the residual reads the norm's output, so nothing can be folded into the norm."""

    def __init__(self, width: int = 16, hidden: int = 24) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.out = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.out(h + self.fc2(nn.functional.gelu(self.fc1(h))))


class ReluMLP(nn.Module):
    """LayerNorm → fc1 → relu → fc2: fc2's scale folds into fc1's rows and bias."""

    def __init__(self, width: int = 16, hidden: int = 24) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(self.norm(x))))


WIDER = {
    **dict.fromkeys((torch.bfloat16, torch.float16, torch.float32), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64), torch.complex128),
}


def widened(value: Any) -> Any:
    """A tensor of numbers in double precision; anything else as it is."""
    return value.to(WIDER[value.dtype]) if isinstance(value, Tensor) and value.dtype in WIDER else value


def grouped_mm(x: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None = None, dtype: Any = None) -> Tensor:
    """aten._grouped_mm, which has no float64 form: rows of x [M, K] up to each offset meet one of weights [G, K, N]."""
    assert x.ndim == 2
    assert weights.ndim == 3
    assert bias is None
    starts = [0, *offsets.tolist()]
    rows = [x[a:b] @ weight for a, b, weight in zip(starts, starts[1:], weights, strict=False)]
    return torch.cat([*rows, x.new_zeros(x.shape[0] - starts[-1], weights.shape[2])])


class InFloat64(Interpreter):
    """Runs a graph with every number narrower than float64 widened: inputs, constants, and whatever dtype an op is
    asked for. So a model's own casts to float32, in any spelling, do not hide small errors."""

    def run(self, *args: Any, **keywords: Any) -> Any:
        with torch.no_grad():
            return super().run(*map(widened, args), **keywords)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return widened(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def wide(value: Any) -> Any:
            return WIDER.get(value, value) if isinstance(value, torch.dtype) else value

        args, kwargs = torch.fx.node.map_aggregate(args, wide), torch.fx.node.map_aggregate(kwargs, wide)
        if target is torch.ops.aten._softmax.default:
            args = (*args[:2], False)  # float32 out of float16 is no cast any more
        if target is torch.ops.aten._grouped_mm.default:
            target = grouped_mm
        return super().call_function(target, args, kwargs)


class Broken(nn.Module):
    """Layers with a graph break after each."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ReluMLP() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
            torch._dynamo.graph_break()
        return x


class BrokenUp(nn.Module):
    """Two blocks in graphs of their own, with uncompiled code between.

    between: of the model, a factor [16] that this code computes. after: of the model and what the second block returns,
    in its graph.
    """

    def __init__(
        self,
        between: Callable[[Any], Tensor] | None = None,
        after: Callable[[Any, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.first, self.second = ReluMLP(), ReluMLP()
        self._between, self._after = between, after

    def forward(self, x: Tensor) -> Tensor:
        x = self.uncompiled(x + self.first(x))
        x = x + self.second(x)
        return x if self._after is None else self._after(self, x)

    @torch.compiler.disable
    def uncompiled(self, x: Tensor) -> Tensor:
        return x if self._between is None else x * self._between(self)
