"""Hypothesis strategies for the specifications of random models."""

import torch
from hypothesis import strategies as st
from properties.random_models import ACTIVATIONS, MLP, Attention, Block, Linear, Model, Norm
from properties.random_traps import TRAPS

SIZES = st.sampled_from([2, 1, 3, 4, 5, 7, 8, 12])
SPELLINGS = st.sampled_from(["linear", "linear", "linear", *Linear.SPELLINGS[1:]])


def norms() -> st.SearchStrategy[Norm]:
    gains = st.sampled_from(["left", "right", "one_plus", "cast", "none"])
    written = st.builds(
        Norm,
        kind=st.sampled_from(["rms", "rms_divide", "layer_var", "layer_square", "center", "softmax"]),
        gain=gains,
        bias=st.booleans(),
        wide=st.booleans(),
    )
    native = st.builds(
        Norm,
        kind=st.sampled_from(["layer_native", "rms_native"]),
        gain=st.sampled_from(["left", "left", "none"]),
        bias=st.booleans(),
    )
    return st.one_of(written, native)


def mlps() -> st.SearchStrategy[MLP]:
    return st.builds(
        MLP,
        hidden=SIZES,
        activation=st.sampled_from(sorted(ACTIVATIONS)),
        gate=st.sampled_from(["none", "two", "split", "chunk", "slice", "view"]),
        bias=st.booleans(),
        linear=SPELLINGS,
    )


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return Attention(
        heads=kv_heads * draw(st.sampled_from([1, 2, 3])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 1, 3, 4])),
        scores=draw(st.sampled_from(["sdpa", "bmm", "masked_bmm"])),
        packed=draw(st.sampled_from(["no", "slice", "split", "view"])),
        repeat=draw(st.sampled_from(["expand", "interleave", "gqa", "tile"])),
        causal=draw(st.booleans()),
        bias=draw(st.booleans()),
        linear=draw(SPELLINGS),
    )


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    traps = tuple(draw(st.lists(st.sampled_from(sorted(TRAPS)), max_size=2)))
    mixers = tuple(draw(st.lists(st.one_of(mlps(), attentions()), min_size=0 if traps else 1, max_size=2)))
    return Block(
        norm=draw(norms()),
        mixers=mixers,
        traps=traps,
        order=draw(st.sampled_from(["pre", "pre", "post", "sandwich"])),
        residual=draw(st.booleans()),
    )


@st.composite
def models(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64,), most_blocks: int = 3) -> Model:
    """Any model of this file's vocabulary."""
    return Model(
        width=draw(SIZES),
        batch=draw(st.sampled_from([2, 1, 3, None])),
        tokens=draw(st.sampled_from([3, 1, 2, 5, 7])),
        blocks=tuple(draw(st.lists(blocks(), min_size=1, max_size=most_blocks))),
        dtype=draw(st.sampled_from(dtypes)),
        head=draw(st.sampled_from(["none", "norm", "norm_linear", "tied"])),
        embedded=draw(st.booleans()),
        shared_norm=draw(st.booleans()),
        returns=draw(st.sampled_from(["nothing", "nothing", "nothing", "norm", "projections"])),
        dynamic=draw(st.integers(0, 3)) == 3,
        seed=draw(st.integers(0, 2**16)),
    )
