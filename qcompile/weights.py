"""Prepared weights: made once per set of weights, shared by every graph, never stale.

A binding holds the tensors that one graph reads in place of float weights. Each prepared tensor is known by the
expression that makes it and by the very parameters it is made from, so prefill, decode and every shape of a model
share one copy. Before each call the live parameters are compared with the ones bound.
"""

import collections
import dataclasses
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from qcompile import names, ops
from qcompile.calibration import StatisticOf, as_input, version_of
from qcompile.errors import WeightError
from qcompile.lowering.partition import Partition, Prepared
from qcompile.quantize_weight import quantize_weight
from qcompile.rewrite import args_of, input_of

_VERSION = operator.attrgetter("_version")
Identity = tuple[int, int, int, torch.Size, tuple[int, ...], torch.dtype]
Key = tuple[str, tuple[Identity, ...]]


class _Memories:
    """Knows when the memory of one of some tensors was freed: after `.data =`, new memory may lie where it was."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._references = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]  # type: ignore[no-untyped-call]
        self._addresses = [reference.cdata for reference in self._references]

    def any_freed(self) -> bool:
        return any(map(torch.UntypedStorage._expired, self._addresses))  # six times as fast as asking them


@dataclasses.dataclass
class _Kept:
    value: "weakref.ref[Tensor]"
    leaves: "tuple[weakref.ref[Tensor], ...]"
    memories: _Memories


class WeightStore:
    """Every prepared tensor that some compiled graph still uses. `computed` counts how many were ever made."""

    def __init__(self) -> None:
        self._kept: dict[Key, _Kept] = {}
        self.computed = 0
        self.epoch = 0

    def refresh(self) -> None:
        """Forget everything: the next call of every compiled model prepares its weights again."""
        self._kept.clear()
        self.epoch += 1

    def prepare(self, partition: Partition, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The prepared tensors, computing those that no other graph has made from the same leaves."""
        found = [self._find(_key(entry, leaves), entry, leaves) for entry in partition.prepared]
        missing = [i for i, value in enumerate(found) if value is None]
        wanted = [partition.prepared[i] for i in missing]
        merged = {entry.node: view for entry in wanted if (view := _merged_already(entry, leaves)) is not None}
        inputs = [_as_read(*pair) for pair in zip(partition.prepare_inputs, leaves, strict=True)] if missing else leaves
        fresh = evaluate(partition.prepare, inputs, [entry.node for entry in wanted], merged)
        values: list[Any] = list(found)
        for i, value in zip(missing, fresh, strict=True):
            values[i] = value
            adopt(partition.prepared[i], value, leaves)
        for i in missing:  # after adoption, which moves leaves
            value, key = values[i], _key(partition.prepared[i], leaves)
            references = tuple(weakref.ref(leaves[leaf]) for leaf in partition.prepared[i].leaves)
            memories = _Memories([leaves[leaf] for leaf in partition.prepared[i].leaves])
            gone = weakref.ref(value, lambda _, key=key: self._kept.pop(key, None))  # type: ignore[misc]
            self._kept[key] = _Kept(gone, references, memories)
        self.computed += len(missing)
        return values

    def _find(self, key: Key, entry: Prepared, leaves: Sequence[Tensor]) -> Tensor | None:
        kept = self._kept.get(key)
        if kept is None or any(r() is not leaves[i] for r, i in zip(kept.leaves, entry.leaves, strict=True)):
            return None
        if kept.memories.any_freed():
            return None
        return kept.value()


STORE = WeightStore()


def _key(entry: Prepared, leaves: Sequence[Tensor]) -> Key:
    return entry.digest, tuple(_identity(leaves[leaf]) for leaf in entry.leaves)


def _identity(tensor: Tensor) -> Identity:
    """After `.data =`, a tensor may be another view of the memory that it was a view of."""
    return id(tensor), tensor.data_ptr(), version_of(tensor), tensor.shape, tensor.stride(), tensor.dtype


def adopt(entry: Prepared, merged: Tensor, leaves: Sequence[Tensor]) -> None:
    """Make 8-bit parameters views of the tensor they were merged into, so that there is one copy of them.

    Concerns models that are already quantized: a merged weight made of float parameters stands for itself. Parameters
    that share their memory with something else (a state_dict taken before, another process) stay where they are.
    """
    parts = _merged_leaves(entry, leaves)
    if parts and all(map(_is_alone, parts)):
        for part, place in zip(parts, torch.split(merged, [len(part) for part in parts]), strict=True):
            part.data = place


def _is_alone(tensor: Tensor) -> bool:
    """Whether nothing else would miss a tensor's memory."""
    storage = tensor.untyped_storage()
    with_processes = tensor.device.type == "cpu" and storage.is_shared()
    alone = storage.nbytes() == tensor.nbytes and _holders(tensor) == _holders(_LONE)
    return alone and not with_processes and not tensor.is_inference()


_LONE = torch.empty(0)


def _holders(tensor: Tensor) -> int:
    """How many tensors share one's memory, counted alike for all."""
    found: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return found


def _merged_leaves(entry: Prepared, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The 8-bit parameters that an entry concatenates and does nothing else with; empty for any other entry."""
    is_merged = entry.node.target is ops.concatenate and all(n.op == "placeholder" for n in entry.node.all_input_nodes)
    parts = [leaves[leaf] for leaf in entry.leaves]
    once = is_merged and len(parts) == len(args_of(entry.node)[0])
    return parts if once and all(part.dtype in ops.QUANTIZED_MAX for part in parts) else []


def _merged_already(entry: Prepared, leaves: Sequence[Tensor]) -> Tensor | None:
    """The concatenation of an entry's parameters without a copy, if they lie one after the other in one memory."""
    parts = _merged_leaves(entry, leaves)
    if len(parts) < 2 or len({part.untyped_storage().data_ptr() for part in parts}) != 1:
        return None
    ends = [part.data_ptr() + part.nbytes for part in parts]
    follows = all(part.data_ptr() == end for part, end in zip(parts[1:], ends[:-1], strict=True))
    if not follows or not all(part.is_contiguous() for part in parts):
        return None
    first = parts[0].detach()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def evaluate(
    gm: GraphModule, inputs: Sequence[Any], wanted: Sequence[Node], known: Mapping[Node, Any] | None = None
) -> list[Any]:
    """Values of some nodes of a graph, computing only what they need and freeing each value after its last reader.

    inputs: one value per placeholder. known: nodes whose values are there already.
    """
    values: dict[Node, Any] = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    values |= known or {}
    given = set(values)
    order = _needed(wanted, given)
    quantized = {node for node in order if node.target is ops.quantize and args_of(node)[2] == "row"}
    last_reader = {operand: node for node in order for operand in node.all_input_nodes}
    with torch.no_grad():
        for node in order:
            if node.op == "get_attr":
                values[node] = operator.attrgetter(str(node.target))(gm)
            elif node.op == "call_function":
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
                function: Any = quantize_weight if node in quantized else node.target
                values[node] = function(*args, **kwargs)
            for operand in node.all_input_nodes:
                if last_reader[operand] is node and operand not in wanted and operand not in given:
                    del values[operand]
    return [values[node] for node in wanted]


def _needed(wanted: Sequence[Node], given: set[Node]) -> list[Node]:
    """The nodes to compute for `wanted`, operands before their readers."""
    order: list[Node] = []
    seen = set(given)
    stack: list[tuple[Node, bool]] = [(node, False) for node in reversed(wanted)]
    while stack:
        node, is_ready = stack.pop()
        if is_ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((operand, False) for operand in reversed(node.all_input_nodes))
    return order


class Binding:
    """The prepared tensors of one graph for one set of live parameters. identities: the ids of those."""

    def __init__(
        self,
        partition: Partition,
        parameters: Sequence[Tensor],
        statistic: StatisticOf,
        arguments: Sequence[Any],
    ) -> None:
        """parameters: the live tensors at the partition's parameter leaves, in order. statistic: what is known of
        a weight's input. Raises WeightError if a prepared tensor is not finite."""
        self._epoch = STORE.epoch
        self._dead: list[Any] = []
        self.identities = list(map(id, parameters))
        leaves = _leaves(partition, statistic, arguments)
        self.values: list[Any] = STORE.prepare(partition, leaves)
        made = _made_of(partition, leaves)
        # Kept, or nobody tells of a death; and told before the next call, which may never come.
        self._references = [weakref.ref(p, _forgetting(self._dead, self.values, made[id(p)])) for p in parameters]
        self._addresses, self._versions = _addresses(parameters), _versions(parameters)
        self._memories = _Memories(parameters)
        _check_finite(partition, self.values, leaves)
        _BINDINGS.add(self)

    def alive(self) -> bool:
        """Whether the parameters bound still exist."""
        return not self._dead

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the parameters bound, unchanged as far as torch can tell.

        Asked before every call, of hundreds of parameters, while a GPU waits: no Python runs for each of them.
        """
        return (
            self.identities == list(map(id, parameters))
            and not self._dead
            and self._epoch == STORE.epoch
            and self._addresses == _addresses(parameters)
            and self._versions == _versions(parameters)
            and not self._memories.any_freed()
        )


def _made_of(partition: Partition, leaves: Sequence[Tensor]) -> Mapping[int, list[int]]:
    """By the id of a tensor, which prepared tensors are made of it."""
    made = collections.defaultdict(list)
    for position, entry in enumerate(partition.prepared):
        for leaf in entry.leaves:
            made[id(leaves[leaf])].append(position)
    return made


def _forgetting(dead: list[Any], values: list[Any], positions: Sequence[int]) -> Callable[[Any], None]:
    """What happens when a parameter dies: nobody will ask again for what was made of it."""

    def forget(reference: Any) -> None:
        dead.append(reference)
        for position in positions:
            values[position] = None

    return forget


_BINDINGS: weakref.WeakSet[Binding] = weakref.WeakSet()


def _count_writes(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After a step: fused optimizers write without counting. Counted here for the parameters that graphs have bound."""
    if torch.compiler.is_compiling():  # what is bound would become a constant of the compiled step
        return
    bound = {identity for binding in _BINDINGS for identity in binding.identities}
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    torch.autograd.graph.increment_version([parameter for parameter in parameters if id(parameter) in bound])


register_optimizer_step_post_hook(_count_writes)


def _addresses(parameters: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, parameters))


def _versions(parameters: Sequence[Tensor]) -> list[int]:
    try:
        return list(map(_VERSION, parameters))
    except RuntimeError:  # inference tensors
        return list(map(version_of, parameters))


def _leaves(partition: Partition, statistic: StatisticOf, arguments: Sequence[Any]) -> list[Tensor]:
    leaves = []
    for node in partition.prepare_inputs:
        record = node.meta["input"]
        tensor = arguments[record.index if record.of is None else record.of]
        if record.of is not None:
            tensor = statistic(tensor, names.name_of(tensor) or record.name, record.field)
        leaves.append(tensor)
    return leaves


def _as_read(node: Node, leaf: Tensor) -> Tensor:
    """What the prepare graph reads. Leaves are kept as they are until then: a converted one would be nobody else's."""
    return leaf if input_of(node).of is None else as_input(leaf, node.meta["val"])


def _check_finite(partition: Partition, values: list[Tensor], leaves: list[Tensor]) -> None:
    for value, entry in zip(values, partition.prepared, strict=True):
        checked = value.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        if checked and not bool(torch.isfinite(value).all()):
            _blame(partition, entry, leaves)


def _blame(partition: Partition, entry: Prepared, leaves: list[Tensor]) -> None:
    for leaf in entry.leaves:
        if not bool(torch.isfinite(leaves[leaf]).all()):
            raise WeightError(
                f"weights must be finite; {_name(partition, leaf, leaves)} has NaN or Inf; check the checkpoint it was "
                "loaded from"
            )
    name = _name(partition, entry.leaves[0], leaves)
    raise WeightError(
        f"a scale folded into a parameter must stay finite; {name} overflowed its dtype; use a smaller alpha, or "
        "load the model in bfloat16 or float32"
    )


def _name(partition: Partition, leaf: int, leaves: list[Tensor]) -> str:
    """The live tensor's name: a graph reused for several layers was traced with the names of the first."""
    return names.name_of(leaves[leaf]) or str(partition.prepare_inputs[leaf].meta["input"].name)


def refresh() -> None:
    """Prepare the weights of every compiled model again at its next call.

    Needed only after writes that torch does not count: through `.data`, NumPy, another process, a collective of
    torch.distributed (broadcast, all_reduce) or a compiled step of a fused optimizer, and in-place writes to tensors
    made in inference mode.
    """
    STORE.refresh()
