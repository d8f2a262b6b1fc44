"""insert_observers: make the graph report what calibration wants to know of every quantized linear's input.

    y = linear(x, w)    →    a: f32[K], r: bf16[R, K] = qcompile.observe(x);  y = linear(x, w)
    return (y,)              return (y, a, r)

a is the per-channel absmax, r are sampled rows. One observer per distinct input, so q, k and v cost one. The outputs
that were there keep their places; the graph's `meta["observed"]` lists, for each added pair of outputs, the indices of
the weight parameters it belongs to.
Leaves alone linears that are not quantized.
"""

import dataclasses
from typing import ClassVar

from torch.fx import GraphModule, Node

from qcompile import ops
from qcompile.pass_pipeline import Bound, PassResult
from qcompile.passes.find_linears import info_of, linears
from qcompile.rewrite import Rewriter, args_of, output_of


@dataclasses.dataclass(frozen=True)
class InsertObservers:
    """Return per-channel absmax and sampled rows of every quantized linear's input as extra outputs."""

    name: ClassVar[str] = "insert_observers"
    stage: ClassVar[str] = "observed"
    bound: ClassVar[Bound] = "exact"

    def run(self, gm: GraphModule) -> PassResult:
        if "observed" in gm.meta:
            return PassResult(0)
        rewriter = Rewriter(gm, self.name)
        readers: dict[Node, list[int]] = {}
        for linear in linears(gm):
            info = info_of(linear)
            if info.quantize and info.parameter is not None:
                readers.setdefault(args_of(linear)[0], []).append(info.parameter)
        observers = []
        for x in readers:
            first = next(linear for linear in linears(gm) if linear.args[0] is x)
            observed = rewriter.emit(ops.observe, (x,), before=first, of=first, name="observe")
            observers.append(rewriter.item(observed, 0, before=first, name="absmax"))
            observers.append(rewriter.item(observed, 1, before=first, name="rows"))
        output = output_of(gm.graph)
        output.args = ((*args_of(output)[0], *observers),)
        gm.meta["observed"] = tuple(tuple(parameters) for parameters in readers.values())
        return PassResult(rewriter.changes)
