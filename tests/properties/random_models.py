"""Random small models as values: a specification is drawn, prints as code, and builds an nn.Module.

spec = Model(width=6, batch=2, tokens=3, dtype=torch.float32, blocks=(Block(...),), seed=1)
model, inputs = build(spec), example(spec)
"""

import dataclasses
import functools
import math
import operator
from typing import Literal

import torch
from properties.random_traps import TRAPS
from properties.trap_parameters import Bag
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "relu_squared": lambda x: F.relu(x) ** 2,
    "tanh": torch.tanh,
}
MASKED = -1e4  # fits float16


@dataclasses.dataclass(frozen=True)
class Norm:
    """kind: rms (mul·rsqrt), rms_divide (x / sqrt), rms_native, layer_native, layer_var (mean and var),
    layer_square (mean of squares), center (mean only), softmax (bounded, no norm at all).
    gain: left (g·x), right (x·g), one_plus (x·(1+g)), cast (g.to(float32)·x) or none. Native kinds take left or none.
    wide: computes in float32 where the model's dtype is narrower.
    """

    kind: Literal["rms", "rms_divide", "rms_native", "layer_native", "layer_var", "layer_square", "center", "softmax"]
    gain: Literal["left", "right", "one_plus", "cast", "none"] = "left"
    bias: bool = False
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class MLP:
    """gate: none, two (linears), or one packed linear taken apart by split, chunk, slice or view."""

    hidden: int
    activation: str
    gate: Literal["none", "two", "split", "chunk", "slice", "view"] = "none"
    bias: bool = False
    linear: str = "linear"


@dataclasses.dataclass(frozen=True)
class Attention:
    """packed: three linears (no), or one taken apart by slice, split, or view and select (kv-head major).
    repeat: how KV heads serve their group of query heads. scores: sdpa or bmm-softmax-bmm."""

    heads: int
    kv_heads: int
    head_dim: int
    scores: Literal["sdpa", "bmm", "masked_bmm"] = "sdpa"
    packed: Literal["no", "slice", "split", "view"] = "no"
    repeat: Literal["expand", "interleave", "gqa", "tile"] = "expand"
    causal: bool = False
    bias: bool = False
    linear: str = "linear"


@dataclasses.dataclass(frozen=True)
class Block:
    """mixers run side by side on one norm's output. order: pre (norm first), post (norm after the residual sum),
    sandwich (norm on the branch's output)."""

    norm: Norm
    mixers: tuple[MLP | Attention, ...] = ()
    traps: tuple[str, ...] = ()
    order: Literal["pre", "post", "sandwich"] = "pre"
    residual: bool = True


@dataclasses.dataclass(frozen=True)
class Model:
    """batch None: the input has no batch dimension. shared_norm: all blocks use the first one's norm module.
    head: a last linear, if any; tied takes the embedding's weight. embedded: the input is token ids.
    returns: what is returned besides: the first norm's output, or two linears of it. dynamic: sizes are symbolic in
    the graph."""

    width: int
    batch: int | None
    tokens: int
    blocks: tuple[Block, ...]
    dtype: torch.dtype = torch.float64
    head: Literal["none", "norm", "norm_linear", "tied"] = "none"
    embedded: bool = False
    shared_norm: bool = False
    returns: Literal["nothing", "norm", "projections"] = "nothing"
    dynamic: bool = False
    seed: int = 0


class NormModule(nn.Module):
    def __init__(self, spec: Norm, width: int) -> None:
        super().__init__()
        self.spec = spec
        has_gain = spec.gain != "none"
        self.weight = nn.Parameter(torch.empty(width)) if has_gain else None
        self.bias = nn.Parameter(torch.empty(width)) if spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.kind == "layer_native":
            return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias)
        if self.spec.kind == "rms_native":
            y = F.rms_norm(x, (x.shape[-1],), self.weight, eps=1e-6)
            return y if self.bias is None else y + self.bias
        dtype = torch.promote_types(x.dtype, torch.float32) if self.spec.wide else x.dtype
        y = self._gained(_normalized(self.spec.kind, x.to(dtype)), x.dtype)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype)

    def _gained(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        if self.weight is None:
            return y
        if self.spec.gain == "right":
            return y.to(dtype) * self.weight
        if self.spec.gain == "one_plus":
            return y * (1.0 + self.weight.to(y.dtype))
        if self.spec.gain == "cast":
            return (self.weight.to(torch.promote_types(y.dtype, torch.float32)) * y).to(dtype)
        return self.weight * y.to(dtype)


def _normalized(kind: str, x: Tensor) -> Tensor:
    if kind == "rms":
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    if kind == "rms_divide":
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    if kind == "softmax":
        return x.softmax(-1)
    centered = x - x.mean(-1, keepdim=True)
    if kind == "center":
        return centered
    if kind == "layer_var":
        return centered / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
    assert kind == "layer_square"
    return centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + 1e-5)


class Linear(nn.Module):
    """One linear, in one of the ways to write it."""

    SPELLINGS = ("linear", "matmul", "conv1d", "einsum", "added_bias", "lora", "scaled_weight")

    def __init__(self, inputs: int, outputs: int, bias: bool, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        shape = (inputs, outputs) if spelling == "conv1d" else (outputs, inputs)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        if spelling == "lora":
            self.down, self.up = nn.Parameter(torch.empty(2, inputs)), nn.Parameter(torch.empty(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "linear":
            return F.linear(x, self.weight, self.bias)
        if self.spelling == "conv1d":
            return self._conv1d(x)
        if self.spelling == "lora":
            return F.linear(x, self.weight + 0.5 * (self.up @ self.down), self.bias)
        if self.spelling == "scaled_weight":
            return F.linear(x, self.weight * 0.5, self.bias)
        product = x @ self.weight.t() if self.spelling == "matmul" else F.linear(x, self.weight)
        if self.spelling == "einsum":
            product = torch.einsum("...k,nk->...n", x, self.weight)
        return product if self.bias is None else product + self.bias

    def _conv1d(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ self.weight if self.bias is None else torch.addmm(self.bias, flat, self.weight)
        return y.view(*x.shape[:-1], -1)


class MLPModule(nn.Module):
    def __init__(self, spec: MLP, width: int) -> None:
        super().__init__()
        self.spec = spec
        packed = spec.gate not in ("none", "two")
        self.up = Linear(width, spec.hidden * (2 if packed else 1), spec.bias, spec.linear)
        self.gate = Linear(width, spec.hidden, spec.bias, spec.linear) if spec.gate == "two" else None
        self.down = Linear(spec.hidden, width, spec.bias, spec.linear)

    def forward(self, h: Tensor) -> Tensor:
        activation, hidden = ACTIVATIONS[self.spec.activation], self.spec.hidden
        y = self.up(h)
        if self.spec.gate == "none":
            return self.down(activation(y))
        if self.gate is not None:
            gate, up = self.gate(h), y
        elif self.spec.gate == "split":
            gate, up = y.split(hidden, -1)
        elif self.spec.gate == "chunk":
            up, gate = y.chunk(2, -1)
        elif self.spec.gate == "slice":
            gate, up = y[..., :hidden], y[..., hidden:]
        else:
            gate, up = y.view(*y.shape[:-1], 2, hidden).unbind(-2)
        return self.down(activation(gate) * up)


class AttentionModule(nn.Module):
    def __init__(self, spec: Attention, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.sizes = [n * spec.head_dim for n in (spec.heads, spec.kv_heads, spec.kv_heads)]
        outputs = self.sizes if spec.packed == "no" else [sum(self.sizes)]
        self.qkv = nn.ModuleList(Linear(width, n, spec.bias, spec.linear) for n in outputs)
        self.out = Linear(self.sizes[0], width, spec.bias, spec.linear)

    def forward(self, h: Tensor) -> Tensor:
        query, key, value = self._heads([linear(h) for linear in self.qkv])
        y = self._attend(query, key, value).transpose(-3, -2)
        return self.out(y.reshape(*h.shape[:-1], self.sizes[0]))

    def _heads(self, parts: list[Tensor]) -> list[Tensor]:
        """[..., T, heads · head_dim], three of them or packed → query, key, value [..., heads, T, head_dim]."""
        spec = self.spec
        if spec.packed == "view":
            (y,) = parts
            group = spec.heads // spec.kv_heads
            y = y.view(*y.shape[:-1], spec.kv_heads, group + 2, spec.head_dim)
            query = y[..., :-2, :].reshape(*y.shape[:-3], spec.heads, spec.head_dim)
            parts = [query, y[..., -2, :], y[..., -1, :]]
        else:
            if spec.packed == "split":
                parts = list(parts[0].split(self.sizes, -1))
            elif spec.packed == "slice":
                a, b = self.sizes[0], self.sizes[0] + self.sizes[1]
                parts = [parts[0][..., :a], parts[0][..., a:b], parts[0][..., b:]]
            parts = [y.view(*y.shape[:-1], -1, spec.head_dim) for y in parts]
        return [y.transpose(-3, -2) for y in parts]

    def _repeated(self, y: Tensor) -> Tensor:
        """KV heads [..., kv_heads, T, D] → [..., heads, T, D], each next to its copies; "tile": all, then all again."""
        group = self.spec.heads // self.spec.kv_heads
        *lead, kv_heads, tokens, head_dim = y.shape
        if self.spec.repeat == "tile":
            return torch.cat([y] * group, -3)
        if self.spec.repeat == "interleave":
            return y.repeat_interleave(group, -3)
        y = y.unsqueeze(-3).expand(*lead, kv_heads, group, tokens, head_dim)
        return y.reshape(*lead, kv_heads * group, tokens, head_dim)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        spec = self.spec
        native = spec.scores == "sdpa" and spec.repeat == "gqa" and query.ndim == 4
        if not native:
            key, value = self._repeated(key), self._repeated(value)
        if spec.scores == "sdpa":
            return F.scaled_dot_product_attention(query, key, value, is_causal=spec.causal, enable_gqa=native)
        scores = query @ key.transpose(-1, -2) / math.sqrt(spec.head_dim)
        if spec.causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, MASKED)
        weights = scores.softmax(-1)
        if spec.scores == "masked_bmm":  # some values are dropped after the softmax
            weights = weights * (weights > 0.05)
        return weights @ value


class BlockModule(nn.Module):
    def __init__(self, spec: Block, width: int, tokens: int, norm: NormModule | None) -> None:
        super().__init__()
        self.spec = spec
        self.norm = norm if norm is not None else NormModule(spec.norm, width)
        self.mixers = nn.ModuleList(_mixer(mixer, width) for mixer in spec.mixers)
        self.bags = nn.ModuleList(Bag(width, tokens) for _ in spec.traps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and the norm's."""
        h = x if self.spec.order != "pre" else self.norm(x)
        branches = [mixer(h) for mixer in self.mixers]
        branches += [TRAPS[name](bag, h, x) for name, bag in zip(self.spec.traps, self.bags, strict=True)]
        y = functools.reduce(operator.add, branches)
        if self.spec.order == "sandwich":
            h = y = self.norm(y.expand(x.shape))
        y = x + y if self.spec.residual else y.expand(x.shape)
        if self.spec.order == "post":
            h = y = self.norm(y)
        return y, h


def _mixer(spec: MLP | Attention, width: int) -> nn.Module:
    return MLPModule(spec, width) if isinstance(spec, MLP) else AttentionModule(spec, width)


class RandomModel(nn.Module):
    def __init__(self, spec: Model) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(VOCABULARY, spec.width) if spec.embedded else None
        blocks: list[BlockModule] = []
        for block in spec.blocks:
            shared = blocks[0].norm if spec.shared_norm and blocks else None
            blocks.append(BlockModule(block, spec.width, spec.tokens, shared))
        self.blocks = nn.ModuleList(blocks)
        self.last_norm = NormModule(Norm("rms"), spec.width) if spec.head != "none" else None
        self.head = Linear(spec.width, 5, False, "linear") if spec.head == "norm_linear" else None
        self.projections = nn.ModuleList(Linear(spec.width, n, True, "linear") for n in (2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.embedding is not None:
            x = self.embedding(x)
        first = None
        for block in self.blocks:
            x, h = block(x)
            first = h if first is None else first
        if self.last_norm is not None:
            x = self.last_norm(x)
        if self.spec.head == "tied" and self.embedding is not None:
            x = F.linear(x, self.embedding.weight)
        if self.head is not None:
            x = self.head(x)
        assert first is not None
        if self.spec.returns == "norm":
            return x, first
        if self.spec.returns == "projections":
            one, other = (projection(first) for projection in self.projections)
            return x, one, other.unsqueeze(-1).transpose(0, -2)
        return (x,)


VOCABULARY = 11


def build(spec: Model, dtype: torch.dtype | None = None) -> RandomModel:
    """The model, every parameter random: gains and biases of either sign, away from 1 and from 0. A dtype other than
    the specification's gives the same values, rounded to the specification's dtype first."""
    with torch.device("meta"):
        model = RandomModel(spec)
    model = model.to_empty(device="cpu").to(torch.float64)
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            size = parameter.shape
            if parameter.ndim == 1:
                value = 0.3 + 1.4 * torch.rand(size, generator=generator, dtype=torch.float64)
                value *= torch.where(torch.rand(size, generator=generator) < 0.7, 1, -1)
            else:
                value = torch.randn(size, generator=generator, dtype=torch.float64) / math.sqrt(size[-1])
            parameter.copy_(value.to(spec.dtype))
    _fill_buffers(model)
    return model.to(dtype or spec.dtype).eval()


def _fill_buffers(model: nn.Module) -> None:
    """Buffers were made without data; make them again."""
    for bag in model.modules():
        if isinstance(bag, Bag):
            for name, value in Bag(bag.a.shape[0], bag.tokens.shape[0]).named_buffers():
                setattr(bag, name, value)


def example(spec: Model, dtype: torch.dtype | None = None) -> Tensor:
    """One input: [batch, tokens, width] of the dtype, or token ids [batch, tokens]."""
    generator = torch.Generator().manual_seed(spec.seed + 1)
    lead = (spec.tokens,) if spec.batch is None else (spec.batch, spec.tokens)
    if spec.embedded:
        return torch.randint(0, VOCABULARY, lead, generator=generator)
    x = torch.randn((*lead, spec.width), generator=generator, dtype=torch.float64)
    return x.to(spec.dtype).to(dtype or spec.dtype)
