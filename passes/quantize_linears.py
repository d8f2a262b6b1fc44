"""quantize_linears: linears compute with 8-bit weights and 8-bit activations.

    y: bf16[.., N] = linear(x, w, b)
    → q, xs = qcompile.quantize(x, [], "row", int8);  wq, ws = qcompile.quantize(w, [], "row", int8)
      y = qcompile.scaled_mm(q, wq, xs, ws, b, None, None, bf16)

Experts likewise, with a scale for each expert's each output channel:

    y: bf16[S, N] = qcompile.grouped_linear(x, w, offsets)
    → …  y = qcompile.scaled_grouped_mm(q, wq, xs, ws, offsets, bf16)        # wq: int8[E, N, K], ws: f32[E, N]

A smoothing multiplication in front of x or w (`qcompile.rescale`) moves into the quantize step, where it costs no
pass over the data and no rounding to the model's dtype. Weights are quantized per output channel; their nodes are
static, so that happens once per set of weights. activations: "token" one scale a row, "tensor" one scale, "static"
one scale from calibration. Weight scales that are to be stored are rounded to the weight's own dtype first.

Leaves alone linears that find_linears decided to keep in float.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from torch.fx import GraphModule, Node

from qcompile import ops
from qcompile.grouped_ops import scaled_grouped_mm
from qcompile.pass_pipeline import Bound, PassResult
from qcompile.passes.find_linears import bias_of, info_of, is_grouped, linears
from qcompile.rewrite import Rewriter, args_of, input_of

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class QuantizeLinears:
    """Rewrite linears to quantize + scaled_mm, experts to quantize + scaled_grouped_mm.

    dtype: int8, fp8 or fp8_e5m2. activations: token, tensor or static. clip: what a static range leaves out.
    round_scales: round weight scales to the dtype of the weight, as checkpoints store them.
    """

    dtype: Literal["int8", "fp8", "fp8_e5m2"] = "int8"
    activations: Literal["token", "tensor", "static"] = "token"
    clip: Literal["none", "percentile", "mse"] = "none"
    round_scales: bool = False
    name: ClassVar[str] = "quantize_linears"
    stage: ClassVar[str] = "quantized"
    bound: ClassVar[Bound] = "quantization"

    def run(self, gm: GraphModule) -> PassResult:
        rewriter = Rewriter(gm, self.name)
        parameters: dict[int | None, Node] = {input_of(p).index: p for p in gm.graph.find_nodes(op="placeholder")}
        speakers: dict[int, Node] = {}
        for linear in linears(gm):
            if (info := info_of(linear)).quantize:
                # Siblings read one tensor: the first one's statistic serves all, so their scales are identical.
                speaker = speakers.setdefault(info.group, parameters[info.parameter])
                self._rewrite(rewriter, linear, speaker)
        return PassResult(rewriter.changes)

    def _rewrite(self, rewriter: Rewriter, linear: Node, speaker: Node) -> None:
        dtype = ops.TORCH_DTYPES[self.dtype]

        def emit(target: Any, args: tuple[Any, ...], name: str) -> Node:
            return rewriter.emit(target, args, before=linear, of=linear, name=name)

        def pair(node: Node) -> tuple[Node, Node]:
            q = rewriter.item(node, 0, before=linear, name="q")
            return q, rewriter.item(node, 1, before=linear, name="scale")

        weight, weight_factors = peel(args_of(linear)[1])
        stored = (args_of(linear)[1].meta["val"].dtype,) if self.round_scales else ()
        weight_args = (weight, weight_factors, "row", dtype, *stored)
        weight_q, weight_scale = pair(emit(ops.quantize, weight_args, "weight_quantize"))
        x, x_factors = peel(args_of(linear)[0])
        if self.activations == "static":
            columns = [factor for factor in weight_factors if factor.meta["val"].ndim == 1]
            inverses = [emit(aten.reciprocal.default, (column,), "inverse") for column in columns]
            channels = x.meta["val"].shape[-1]
            absmax = rewriter.statistic(speaker, channels)
            if self.clip == "none":
                x_scale = emit(ops.static_scale, (absmax, inverses, dtype), "x_scale")
            else:
                rows = rewriter.statistic(speaker, channels, "rows")
                x_scale = emit(ops.clipped_static_scale, (absmax, rows, inverses, self.clip, dtype), "x_scale")
            x_q = emit(ops.quantize_static, (x, x_scale, x_factors, dtype), "x_q")
        else:
            mode = "row" if self.activations == "token" else "tensor"
            x_q, x_scale = pair(emit(ops.quantize, (x, x_factors, mode, dtype), "x_quantize"))
        operands, out_dtype = (x_q, weight_q, x_scale, weight_scale), linear.meta["val"].dtype
        if is_grouped(linear):
            product = emit(scaled_grouped_mm, (*operands, args_of(linear)[2], out_dtype), "scaled_grouped_mm")
        else:
            product = emit(ops.scaled_mm, (*operands, bias_of(linear), None, None, out_dtype), "scaled_mm")
        rewriter.replace(linear, product)


def peel(node: Node) -> tuple[Node, list[Node]]:
    """A tensor and the smoothing factors in front of it."""
    if node.target is ops.rescale:
        x, factors = args_of(node)
        return x, list(factors)
    return node, []
