"""What becomes of every linear of a model: quantized how, smoothed how, or why not."""

import dataclasses
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qcompile import names, ops, passes
from qcompile.calibration import keyword_arguments
from qcompile.capture import capture_call
from qcompile.captured import Captured
from qcompile.config import Config
from qcompile.errors import ConfigError, QCompileError
from qcompile.grouped_ops import scaled_grouped_mm
from qcompile.lowering.select import check_dtype, select_scaled_grouped_mm, select_scaled_mm
from qcompile.lowering.target import Target, detect
from qcompile.model_limits import without_cache
from qcompile.pass_pipeline import Pipeline
from qcompile.passes.find_linears import FindLinears, info_of, is_grouped, linears, parameters_in
from qcompile.passes.smooth import Smooth
from qcompile.recording import for_model
from qcompile.rewrite import args_of, hint, input_of, static_nodes

if TYPE_CHECKING:
    import networkx

aten = torch.ops.aten
EXAMPLE_TOKENS = 16
STORED = (ops.scaled_mm, scaled_grouped_mm)  # before anything is quantized: of weights that the model holds in 8 bits
SCHEMES = {"token": "per token", "tensor": "per tensor", "static": "per tensor, static"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One linear.

    name: its module, or, of experts, their parameter. outputs, inputs: N and K of its weight, of which it has one for
    each of so many experts. macs: multiply-accumulates of the example call, all calls of the linear together. calls:
    how often the model reads it. group: linears with one number read one tensor. kernel: what runs its product, and
    note, why not a better one; kernel is empty if it stays in float, and `reason` says why. folded, absorbed: shares of
    its input channels smoothed by folding and at run time. into: the parameters that take the folded scales. unfolded:
    why not all channels are folded. stored: the scheme of one that the model holds in 8 bits, such as "int8, per
    token"; what was folded for it cannot be seen.
    """

    name: str
    outputs: int
    inputs: int
    macs: int
    calls: int
    group: int
    kernel: str = ""
    reason: str = ""
    folded: float = 0.0
    absorbed: float = 0.0
    into: tuple[str, ...] = ()
    unfolded: str = ""
    note: str = ""
    experts: int = 1
    stored: str = ""

    @property
    def shape(self) -> str:
        """Its weight's, in words."""
        return "×".join(map(str, (*((self.experts,) if self.experts > 1 else ()), self.outputs, self.inputs)))

    @property
    def smoothing(self) -> str:
        """How the linear is smoothed, in words."""
        if self.stored:
            return "as stored"
        parts = []
        if self.folded:
            share = "" if self.folded == 1 else f"{self.folded:.0%} "
            parts.append(f"{share}folded into {', '.join(_short(self.into))}")
        if self.absorbed:
            share = "" if self.absorbed == 1 else f"{self.absorbed:.0%} "
            parts.append(f"{share}at run time (not folded: {self.unfolded})")
        return "; ".join(parts) or "not smoothed" + (f" ({self.unfolded})" if self.unfolded else "")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """rows in the order of the model's call. scheme: weights and activations, such as "int8, per token"; if the model
    holds quantized linears, theirs."""

    rows: tuple[Row, ...]
    graphs: int
    scheme: str

    def totals(self) -> dict[str, float]:
        """Shares of all multiply-accumulates in linears: quantized, folded, absorbed, float."""
        macs = sum(row.macs for row in self.rows) or 1
        quantized = sum(row.macs for row in self.rows if row.kernel)
        return {
            "quantized": quantized / macs,
            "folded": sum(row.macs * row.folded for row in self.rows) / macs,
            "absorbed": sum(row.macs * row.absorbed for row in self.rows) / macs,
            "float": 1 - quantized / macs,
        }

    def to_json(self) -> str:
        """Everything, as one JSON object."""
        rows = [dataclasses.asdict(row) | {"smoothing": row.smoothing} for row in self.rows]
        whole = {"scheme": self.scheme, "graphs": self.graphs, "rows": rows, "totals": self.totals()}
        return json.dumps(whole, indent=2)

    def to_networkx(self) -> "networkx.DiGraph":
        """Who shares a scale with whom: an edge from each parameter that takes 1/s to each linear that takes s."""
        import networkx

        graph = networkx.DiGraph()
        for row in self.rows:
            graph.add_node(row.name, kind="linear", macs=row.macs, smoothing=row.smoothing, kernel=row.kernel)
            for parameter in row.into:
                graph.add_node(parameter, kind="parameter")
                graph.add_edge(parameter, row.name, share=row.folded)
        return graph

    def __str__(self) -> str:
        whole = sum(row.macs for row in self.rows) or 1
        lines = [f"{row.name}  {row.shape}  {row.macs / whole:.1%}  {self._fate(row)}" for row in self.rows]
        totals = ", ".join(f"{name} {share:.1%}" for name, share in self.totals().items())
        end = f"{len(self.rows)} linears in {self.graphs} graphs; of their work: {totals}"
        return "\n".join([*lines, *self._notes(), end])

    def _fate(self, row: Row) -> str:
        if row.stored:
            return f"stored in {row.stored}, {row.kernel}"
        return f"{self.scheme}, {row.kernel}; {row.smoothing}" if row.kernel else f"float: {row.reason}"

    def _notes(self) -> list[str]:
        """Why linears have no better kernel: a line for each reason, which is often one for all of them."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if row.note:
                found.setdefault((row.kernel, row.note), []).append(row)
        return [f"{kernel} in {len(rows)}, first {rows[0].name}: {note}" for (kernel, note), rows in found.items()]


def explain(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor | None = None,
    *,
    target: str | None = None,
    **options: Any,
) -> Explanation:
    """What the w8a8 backend would do to every linear of a model, without doing it.

    inputs: one call's keyword arguments or input_ids; without them, an example is made from the model's config, without
    a KV cache. (In a compiled graph that fills or reads one, what is folded into value projections here is absorbed at
    run time.)
    target: a GPU that need not be here, such as "sm90"; without it, the device that the model is on.
    options: those of the backend; calibration is taken as given. The model may be on the meta device.
    Raises ConfigError, CaptureError, LoweringError.
    """
    config = Config.from_options({**options, "calibration": None, "calibrate": 1})
    model = names.original(model)
    captured = captured_example(model, inputs)
    pipeline = Pipeline(passes.quantizing(config).passes[: explained_passes(config)])
    graphs = [pipeline.run(one.graph)[0] for one in captured]
    return explanation_of(graphs, config, target_of(model, config, target))


def captured_example(model: nn.Module, inputs: Mapping[str, Any] | Tensor | None) -> list[Captured]:
    """The graphs of one call, given or made from the model's config. Raises ConfigError or CaptureError."""
    arguments = example_call(model) if inputs is None else for_model(model, keyword_arguments(model, inputs))
    try:
        return capture_call(model, arguments)
    except QCompileError:
        raise
    except Exception as error:
        if inputs is not None:
            raise
        reason = textwrap.shorten(f"{type(error).__name__}: {error}".partition("\n")[0], 100, placeholder=" …")
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ConfigError(
                f"explain needs a model that runs without data, or its weights; {type(model).__name__} fails on the "
                f"meta device ({reason}); load it (explain --weights)"
            ) from None
        raise _no_example(f"the one it made fails ({reason})") from None


def target_of(model: nn.Module, config: Config, target: str | None) -> Target:
    """The named GPU, or what the model is on. Raises ConfigError or LoweringError."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    here = torch.device("cpu") if device.type == "meta" else device
    machine = detect(here) if target is None else Target.parse(target)
    if machine.kind != "cpu":
        check_dtype(machine, config.torch_dtype)
    return machine


def explained_passes(config: Config) -> int:
    """How many of the quantizing passes come before linears are rewritten: all is decided then."""
    steps = passes.quantizing(config).passes
    return 1 + max(i for i, step in enumerate(steps) if step.name in (FindLinears.name, Smooth.name))


def explanation_of(graphs: Sequence[GraphModule], config: Config, target: Target) -> Explanation:
    """What explain says of a model's graphs after the `explained_passes`."""
    found = [row for gm in graphs for row in _rows(gm, config, target)]
    stored = dict.fromkeys(row.stored for row in found if row.stored)
    scheme = "; ".join(stored) or f"{config.dtype}, {SCHEMES[config.activations]}"
    return Explanation(tuple(_merged(found)), len(graphs), scheme)


def example_call(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for a short call: tokens or pixels of the shape that the config names, without a cache.

    Raises ConfigError if the model says nothing of its inputs.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if config is None or main is None:
        raise _no_example(f"{type(model).__name__} has no config")
    if main == "input_ids":
        arguments: dict[str, Any] = {"input_ids": torch.ones(1, EXAMPLE_TOKENS, dtype=torch.int64, device=device)}
        if getattr(config, "is_encoder_decoder", False):
            arguments["decoder_input_ids"] = arguments["input_ids"]
        return arguments | without_cache(model)
    if main == "pixel_values" and isinstance(size := getattr(config, "image_size", None), int):
        shape = (1, getattr(config, "num_channels", 3), size, size)
        return {main: torch.zeros(shape, dtype=dtype, device=device)}
    raise _no_example(f"{type(model).__name__} takes {main}")


def _no_example(reason: str) -> ConfigError:
    return ConfigError(f"explain needs an example call; {reason}; from Python, pass inputs=…")


def _rows(gm: GraphModule, config: Config, target: Target) -> Iterable[Row]:
    """One row for every call of a linear or of a bank of matrices in a graph."""
    known = set(linears(gm))
    static = static_nodes(gm)
    for node in gm.graph.nodes:
        if node in known:
            yield _row(node, target, config)
        elif node.target in STORED:
            yield _stored(node, target)
        elif (bank := _bank(node, static)) is not None:
            yield bank


def _row(node: Node, target: Target, config: Config) -> Row:
    info = info_of(node)
    plain = dataclasses.replace(_sizes(node, info.name, info.group), reason=info.reason)
    if not info.quantize:
        return plain
    smoothing = node.meta.get("smoothing")
    plain = _running(plain, config.torch_dtype, target, grouped=is_grouped(node))
    if smoothing is None:
        return plain
    return dataclasses.replace(
        plain,
        folded=smoothing.folded / smoothing.channels,
        absorbed=smoothing.absorbed / smoothing.channels,
        into=smoothing.into,
        unfolded=smoothing.reason,
    )


def _stored(node: Node, target: Target) -> Row:
    """The row of a product with a weight that the model holds in 8 bits."""
    _, weight, x_scale = args_of(node)[:3]
    dtype = weight.meta["val"].dtype
    scheme = SCHEMES["token" if x_scale.meta["val"].ndim else "static"]
    name = next(name for name, kind in ops.TORCH_DTYPES.items() if kind == dtype)
    row = dataclasses.replace(_sizes(node, stored_name(node), -1), stored=f"{name}, {scheme}")
    return _running(row, dtype, target, grouped=node.target is scaled_grouped_mm)


def stored_name(product: Node) -> str:
    """What holds the 8-bit weight of a product: a module, or, of experts, their parameter."""
    name = input_of(parameters_in(args_of(product)[1])[0]).name
    return names.module_name(name) if product.target is ops.scaled_mm else name


def _sizes(node: Node, name: str, group: int) -> Row:
    *experts, outputs, inputs = (hint(size) for size in args_of(node)[1].meta["val"].shape)
    macs = hint(node.meta["val"].numel()) * inputs
    return Row(name, outputs, inputs, macs, 1, group, experts=math.prod(experts))


def _running(row: Row, dtype: torch.dtype, target: Target, *, grouped: bool) -> Row:
    """The row with what runs its product in 8 bits."""
    weight = torch.empty(row.outputs, row.inputs, dtype=dtype, device="meta")
    select = select_scaled_grouped_mm if grouped else select_scaled_mm
    kernel, passed_over = select(target, weight[:1], weight)
    return dataclasses.replace(row, kernel=kernel.name, note="; ".join(passed_over))


def _bank(node: Node, static: set[Node]) -> Row | None:
    """A product with a stack of matrices [E, K, N] that are parameters, not by offsets: such experts stay in float."""
    is_product = node.op == "call_function" and "mm" in str(node.target) and len(node.args) > 1
    if not is_product or node in static or node.target in ops.REFERENCES:
        return None
    bank = node.args[1]
    if not isinstance(bank, Node) or bank not in static or bank.meta["val"].ndim != 3 or not parameters_in(bank):
        return None
    name = names.module_name(input_of(parameters_in(bank)[0]).name)
    experts, inputs, outputs = (hint(size) for size in bank.meta["val"].shape)
    macs = hint(node.meta["val"].numel()) * inputs
    return Row(name, outputs, inputs, macs, 1, -1, reason="a stack of matrices, no linear", experts=experts)


def _merged(rows: Iterable[Row]) -> Iterable[Row]:
    """Calls of one linear with one fate, as one row."""
    found: dict[Row, Row] = {}
    for row in rows:
        key = dataclasses.replace(row, macs=0, calls=0, group=0)
        before = found.get(key)
        calls, macs = (before.calls, before.macs) if before else (0, 0)
        found[key] = dataclasses.replace(before or row, macs=macs + row.macs, calls=calls + 1)
    return found.values()


def _short(into: tuple[str, ...], most: int = 3) -> list[str]:
    return [*into[:most], *([f"{len(into) - most} more"] if len(into) > most else [])]
