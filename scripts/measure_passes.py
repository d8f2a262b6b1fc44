"""How long the passes take on a graph of Llama-70B's shape, by its number of layers. Weights are on the meta device.

    python scripts/measure_passes.py [--layers 40 80] [--repeats 5]

Capture by Dynamo is not counted; every pass up to the quantized graph is. Depths take turns; medians are printed.
"""

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from qcompile import Config, ops, passes
from qcompile.capture import capture_call
from qcompile.rewrite import copy_graph

SHAPE = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
    "vocab_size": 128256,
}  # fmt: skip
TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, nargs="+", default=[40, 80])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    graphs = {}
    for layers in arguments.layers:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SHAPE)).eval()
            ids = torch.ones(1, TOKENS, dtype=torch.int64)
        (captured,) = capture_call(model, {"input_ids": ids, "use_cache": False})
        graphs[layers] = captured.graph
    for alpha in (0.5, "auto"):
        seconds: dict[int, list[float]] = {layers: [] for layers in graphs}
        for _ in range(arguments.repeats):
            for layers, graph in graphs.items():
                seconds[layers].append(run(copy_graph(graph), alpha, layers))
        medians = {layers: statistics.median(times) for layers, times in seconds.items()}
        for layers, median in medians.items():
            spread = f"{min(seconds[layers]):.1f}-{max(seconds[layers]):.1f}"
            print(f"alpha {alpha}, {layers} layers: {median:.1f} s ({spread})", flush=True)
        shortest, longest = min(medians), max(medians)
        ratio = medians[longest] / medians[shortest]
        print(f"alpha {alpha}: {longest} layers take {ratio:.2f}x the time of {shortest}")


def run(graph: torch.fx.GraphModule, alpha: float | str, layers: int) -> float:
    """Seconds that the passes take; every linear but the head must come out quantized."""
    config = Config.from_options({"calibrate": 1, "alpha": alpha})
    start = time.perf_counter()
    gm, _ = passes.quantizing(config).run(graph)
    seconds = time.perf_counter() - start
    products = sum(node.target is ops.scaled_mm for node in gm.graph.nodes)
    if products != 4 * layers:
        raise SystemExit(f"4 products per layer must come out; got {products} for {layers} layers")
    return seconds


if __name__ == "__main__":
    main()
