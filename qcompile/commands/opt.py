"""`qcompile opt --passes "canonicalize,smooth{alpha=0.5}" graph.pt2`: run passes on a saved graph."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from qcompile.atomic_file import check_file
from qcompile.commands.arguments import add_shared
from qcompile.errors import CaptureError, ConfigError
from qcompile.paths import expanded

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser."""
    parser = commands.add_parser("opt", help="run any passes on a saved graph, or on a model's, and print the result")
    parser.add_argument("graph", metavar="GRAPH", help="graph.pt2, of qcompile or torch.export; or a model folder")
    parser.add_argument(
        "--passes", default="", metavar="PIPELINE",
        help='such as "canonicalize,smooth{alpha=0.5}"; `qcompile passes` lists them (default: none)',
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="write the graph here instead of printing it")
    parser.add_argument("--verify", action="store_true", help="check every pass, its numbers too if values are there")
    parser.add_argument("--weights", action="store_true", help="of a model folder: read its weights, keep them in FILE")
    add_shared(parser, "--trust-remote-code")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Read, rewrite, check; print or write."""
    from qcompile import debug
    from qcompile.captured import Captured
    from qcompile.config import Config
    from qcompile.dump import graph_text
    from qcompile.pass_pipeline import Observer, Pipeline
    from qcompile.passes import PASSES
    from qcompile.saved_graph.file import save_graph
    from qcompile.validate import Validate

    pipeline = Pipeline.from_text(arguments.passes, PASSES)
    if arguments.out is not None:
        check_file(arguments.out)
    saved = _read(arguments)
    config = debug.with_environment(Config(verify=arguments.verify))
    validate = Validate() if config.verify else None
    watching: list[Observer] = [*debug.observers(config, pipeline), *([validate] if validate else [])]
    gm, refusals = pipeline.run(saved.captured.graph, watching)
    for refusal in refusals:
        print(f"refused: {refusal.rule}: {refusal.node}: {refusal.reason}", file=sys.stderr)
    statistics = _statistics(gm, saved)
    if validate is not None:
        _validate(validate, gm, saved, statistics)
    if arguments.out is None:
        print(graph_text(gm), end="")
    else:
        save_graph(Captured(gm, saved.captured.args), arguments.out, statistics)


def _read(arguments: argparse.Namespace) -> Any:
    from qcompile.saved_graph.file import SavedGraph, load_graph

    path = expanded(arguments.graph)
    if path.is_file() or path.suffix == ".pt2":
        if arguments.weights:
            raise ConfigError("--weights is about a model folder; a saved graph has its weights or has none")
        return load_graph(path)
    return SavedGraph(_captured(arguments), {})


def _captured(arguments: argparse.Namespace) -> Any:
    """The graph of a model folder's example call, without a KV cache."""
    import torch

    from qcompile.capture import capture_call
    from qcompile.checkpoint.loading import load_float
    from qcompile.explanation import example_call
    from qcompile.structure import load_structure

    load = load_float if arguments.weights else load_structure
    model = load(arguments.graph, trust_remote_code=arguments.trust_remote_code)
    call = example_call(model)
    if arguments.weights and "input_ids" in call:  # different tokens: equal rows would hide mistakes
        ids = call["input_ids"]
        call["input_ids"] = torch.arange(ids.numel()).reshape(ids.shape) % model.get_input_embeddings().num_embeddings
    graphs = capture_call(model, call)
    if len(graphs) != 1:
        raise CaptureError(
            f"opt takes a model in one graph; {type(model).__name__} gave {len(graphs)}; QCOMPILE_DEBUG=dump shows them"
        )
    return graphs[0]


def _statistics(gm: "GraphModule", saved: Any) -> "dict[str, Tensor]":
    """Values for the statistics that passes added: those saved, else what the example call itself shows."""
    from qcompile.calibration import as_input
    from qcompile.errors import QCompileError
    from qcompile.rewrite import input_of

    wanted = [node for node in gm.graph.find_nodes(op="placeholder") if input_of(node).kind == "statistic"]
    known = {node.name: saved.statistics[node.name] for node in wanted if node.name in saved.statistics}
    if len(known) == len(wanted) or saved.missing:
        return known
    try:
        recorder = _recorded(saved)
        for node in wanted:
            record = input_of(node)
            weight = saved.captured.args[record.of]
            known.setdefault(node.name, as_input(recorder.statistic(weight, record.name, record.field), weight))
    except QCompileError:  # linears that are quantized already are not observed
        return known
    return known


def _recorded(saved: Any) -> Any:
    """What the linears of the graph read in the example call."""
    import torch

    from qcompile import passes
    from qcompile.calibration import Recorder
    from qcompile.config import Config
    from qcompile.observing import observe
    from qcompile.validate import graph_inputs

    recorder = Recorder()
    observed, _ = passes.observing(Config(calibrate=1, ignore=())).run(saved.captured.graph)
    with torch.no_grad():
        observe(observed, graph_inputs(observed, saved.captured.args, recorder.statistic), recorder)
    return recorder


def _validate(validate: Any, gm: "GraphModule", saved: Any, statistics: "dict[str, Tensor]") -> None:
    """Hold every pass to its bound on the example call; say so if that cannot be done."""
    from qcompile.rewrite import input_of

    records = {node.name: input_of(node) for node in gm.graph.find_nodes(op="placeholder")}
    known = {(records[name].name, records[name].field): value for name, value in statistics.items()}
    if saved.missing:
        print(
            f"qcompile: numbers were not compared: the graph has no value for {saved.missing[0]} "
            f"({len(saved.missing)} in all); save it with --weights",
            file=sys.stderr,
        )
        return
    for checked in validate.check(saved.captured.args, lambda weight, name, field: known[name, field]):
        print(f"checked: {checked.step}: error {checked.error:.1e}, limit {checked.limit:.0e}", file=sys.stderr)
