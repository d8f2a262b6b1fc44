"""Run a graph that insert_observers went over, and record what its linears read."""

from typing import Any

from torch.fx import GraphModule

from qcompile.calibration import Recorder


def observe(observed: GraphModule, args: list[Any], recorder: Recorder) -> Any:
    """The graph's own results on the captured arguments; takes ownership of the list.

    Every tensor that linears read adds absmax [K] and rows [R, K] to the outputs, in the order of meta["observed"].
    """
    weights = [[args[index] for index in indices] for indices in observed.meta["observed"]]
    results = observed(*args)
    args.clear()
    count = len(results) - 2 * len(weights)
    observations = zip(results[count::2], results[count + 1 :: 2], strict=True)
    seen: set[int] = set()
    for siblings, (absmax, rows) in zip(weights, observations, strict=True):
        recorder.record_siblings(siblings, absmax, rows, again=seen)
        seen.update(map(id, siblings))
    return results[:count]
