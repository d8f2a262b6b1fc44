"""Which pass, then which linears, cost the accuracy: search by running a model with part of the work done.

The measure is KL(float ‖ variant) in nats per predicted token on given windows: never negative, and zero only if
nothing changed, where the likelihood of the text may rise by chance. A variant is bad if its KL is above a threshold.

1. Passes, by halving: the graph after the first k passes is run; the pass named takes a good graph and gives a bad one.
2. Linears, by delta debugging (delta_debugging.py): only some are quantized. Each set found is bad on its own
   and good without any one of its linears; sets are taken out until the rest is good.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qcompile.bisection.delta_debugging import every_minimal, first_bad, without
from qcompile.errors import ConfigError
from qcompile.model_limits import check_same_tokens
from qcompile.pass_pipeline import Pipeline
from qcompile.quality.checkpoint import Sums
from qcompile.quality.window_calls import check_callable, logits_of, window_call
from qcompile.strict_json import to_json

THRESHOLD = 0.01  # nats per token; int8 with per-token activations usually stays under a fifth of it
MOST = 200  # variants that are run at most
SHOWN = 3
Told = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Loss:
    """kl: KL(float ‖ variant) in nats per token. nll: change of the mean negative log-likelihood, in nats."""

    kl: float
    nll: float


@dataclasses.dataclass(frozen=True)
class Step:
    """The pass that the loss comes with. index: its place in the pipeline. before, after: loss of the graph it gets and
    of the one it leaves. exact: whether it promises to change nothing, so that this is a fault of the pass."""

    text: str
    index: int
    before: Loss
    after: Loss
    exact: bool


@dataclasses.dataclass(frozen=True)
class Culprits:
    """Linears that together are bad, and not without any one of them. alone: the loss with only them quantized."""

    linears: tuple[str, ...]
    alone: Loss


@dataclasses.dataclass(frozen=True)
class Bisection:
    """What costs the accuracy.

    whole: loss of the whole model. none: with every linear in float. step: the pass (None for a stored model, which has
    none, or if nothing is bad). culprits: linears, by set. rest: loss with all but the culprits quantized. linears: how
    many there are. variants: how many were run. complete: False if that were the most allowed; then sets may be
    larger than need be, and some missing.
    """

    threshold: float
    float_nll: float
    tokens: int
    whole: Loss
    none: Loss | None
    step: Step | None
    culprits: tuple[Culprits, ...]
    rest: Loss | None
    linears: int
    variants: int
    complete: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Every linear blamed."""
        return tuple(name for found in self.culprits for name in found.linears)

    def to_json(self) -> str:
        """Everything, as one JSON object; a loss that is infinite is null."""
        return to_json(dataclasses.asdict(self) | {"verdict": self.verdict})

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        if self.whole.kl <= self.threshold:
            return f"nothing costs the accuracy: the whole is at KL {self.whole.kl:.5f}, threshold {self.threshold:g}"
        if self.culprits:
            more = f" and {len(self.names) - SHOWN} more" if len(self.names) > SHOWN else ""
            listed = f"{', '.join(self.names[:SHOWN])}{more}"
            return f"{listed}: {len(self.names)} of {self.linears} linears cost the accuracy"
        if self.step is not None:
            return f"pass {self.step.text} costs the accuracy, whatever is quantized"
        return "no linear costs the accuracy; other parameters than theirs differ from the float model's"

    def __str__(self) -> str:
        """The verdict and the figures it rests on."""
        rows = [("everything quantized", self.whole)]
        if self.step is not None:
            kind = "exact, so this is its fault" if self.step.exact else "expected to change numbers"
            rows += [
                (f"before pass {self.step.index:02d} {self.step.text}", self.step.before),
                (f"after it ({kind})", self.step.after),
            ]
        rows += [("no linear quantized", self.none)] if self.none is not None else []
        rows += [("\n  ".join(["only quantized:", *found.linears]), found.alone) for found in self.culprits]
        rows += [(f"all but these {len(self.names)}", self.rest)] if self.rest is not None else []
        lines = [f"KL {loss.kl:9.5f}  ΔNLL {loss.nll:+9.5f}  {what}" for what, loss in rows]
        ended = "" if self.complete else "; the most allowed, so sets may be too large, and some missing"
        counted = f"float NLL {self.float_nll:.5f} over {self.tokens} tokens; {self.variants} variants run{ended}"
        return "\n".join([self.verdict, *lines, counted])


class Subject(Protocol):
    """A model that can be run with part of the work done. steps: texts of the passes, in order, and whether each is
    exact. linears: names of what can be quantized. None in `run` means all of them."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def steps(self) -> Sequence[tuple[str, bool]]: ...

    @property
    def linears(self) -> Sequence[str]: ...

    def run_first(self, steps: int, arguments: dict[str, Any]) -> Any: ...

    def run_only(self, linears: Sequence[str] | None, arguments: dict[str, Any]) -> Any: ...


def bisect(
    model: nn.Module,
    windows: Tensor,
    *,
    against: nn.Module | None = None,
    pipeline: Pipeline | None = None,
    threshold: float = THRESHOLD,
    most: int = MOST,
    told: Told = lambda _: None,
    **options: Any,
) -> Bisection:
    """Find the pass and the linears that cost a model its accuracy.

    model: a float model, quantized in memory as the backend would with `options` (those of Config, a calibration among
    them); or a quantized one and, in `against`, the float model it was made from: then each linear is swapped for its
    float original. windows: tokens [count, size] int64, each called for itself. pipeline: passes to search in place of
    the backend's. threshold: KL in nats per token above which a variant is bad. most: variants to run. told: called
    with what is going on.
    Logits of the float model are kept: count · size · vocabulary · 4 bytes.
    Raises ConfigError, CalibrationError, CaptureError (the model is not one graph).
    """
    if not 0 <= threshold < float("inf"):
        raise ConfigError(f"threshold must be a KL in nats per token, 0 or more; got {threshold}")
    if most < 1:
        raise ConfigError(f"the most variants to run must be at least 1; got {most}")
    check_callable(model, windows)
    if against is not None:
        check_same_tokens(model, against)
    subject = _subject(model, against, pipeline, options)
    return _Search(subject, against if against is not None else subject.model, windows, threshold, most, told).run()


def _subject(
    model: nn.Module, against: nn.Module | None, pipeline: Pipeline | None, options: dict[str, Any]
) -> Subject:
    from qcompile.bisection.partial_pipeline import PartialPipeline
    from qcompile.bisection.swapped_linears import SwappedLinears
    from qcompile.quantized_linear import is_quantized

    if against is not None:
        if pipeline is not None or options:
            raise ConfigError("against is about a model that is quantized already; leave the passes and options out")
        return SwappedLinears(model, against)
    if is_quantized(model):
        raise ConfigError("a quantized model needs the float model it was made from; pass it as against (--against)")
    return PartialPipeline(model, pipeline, options)


class _Search:
    """One search: variants are run once, up to the most allowed."""

    def __init__(
        self, subject: Subject, original: nn.Module, windows: Tensor, threshold: float, most: int, told: Told
    ) -> None:
        self._subject, self._threshold, self._most, self._told = subject, threshold, most, told
        self._calls = [window_call(subject.model, ids) for ids in torch.split(windows, 1)]
        self._known: dict[Any, Loss] = {}
        self._complete = True
        with torch.no_grad():
            answers = [original(**call.arguments) for call in self._calls]
            self._expected = [logits_of(original, answer).float() for answer in answers]
        sums = self._sums(lambda arguments: None)
        self._float_nll, self._tokens = sums.other_nll, sums.tokens
        if not math.isfinite(self._float_nll):
            raise ConfigError("the float model's logits must be finite; they are NaN or infinite on this text")

    def run(self) -> Bisection:
        whole = self._after(len(self._subject.steps)) if self._subject.steps else self._only(None)
        if whole.kl <= self._threshold:
            return self._result(whole)
        step = self._find_step() if self._subject.steps else None
        none = self._only(())
        if none.kl > self._threshold:
            return self._result(whole, none, step)
        # If the lowering is wrong, a small model's linears are all good here: they are not lowered.
        sets = every_minimal(tuple(self._subject.linears), self._is_bad)
        culprits = tuple(Culprits(found, self._only(found)) for found in sets)
        rest = without(self._subject.linears, [name for found in sets for name in found])
        return self._result(whole, none, step, culprits, self._only(rest))

    def _find_step(self) -> Step:
        steps = self._subject.steps
        found = first_bad(len(steps), lambda k: self._after(k).kl > self._threshold)
        text, exact = steps[found - 1]
        return Step(text, found - 1, self._after(found - 1), self._after(found), exact)

    def _is_bad(self, linears: tuple[str, ...]) -> bool:
        """Once nothing more may be run, everything passes for good, and the search ends with what it has."""
        key = frozenset(linears)
        if len(self._known) >= self._most and key not in self._known:
            self._complete = False
            return False
        return self._only(linears).kl > self._threshold

    def _after(self, steps: int) -> Loss:
        what = f"after {steps} of {len(self._subject.steps)} passes"
        return self._loss(steps, what, lambda arguments: self._subject.run_first(steps, arguments))

    def _only(self, linears: Sequence[str] | None) -> Loss:
        key = None if linears is None else frozenset(linears)
        count = len(self._subject.linears) if key is None else len(key)
        what = f"{count} of {len(self._subject.linears)} linears quantized"
        return self._loss(key, what, lambda arguments: self._subject.run_only(linears, arguments))

    def _loss(self, key: Any, what: str, run: Callable[[dict[str, Any]], Any]) -> Loss:
        if key not in self._known:
            self._told(what)
            sums = self._sums(run)
            change = sums.nll - sums.other_nll
            finite = math.isfinite(sums.kl)  # logits that are NaN are as bad as can be
            self._known[key] = Loss(max(sums.kl, 0.0), change) if finite else Loss(math.inf, math.inf)
        return self._known[key]

    def _sums(self, run: Callable[[dict[str, Any]], Any]) -> Sums:
        """Sums over all windows; what returns None is taken to answer as the float model does."""
        sums = Sums()
        with torch.no_grad():
            for call, expected in zip(self._calls, self._expected, strict=True):
                output = run(call.arguments)
                found = expected if output is None else logits_of(self._subject.model, output)
                sums.add(found, call.read, expected)
        return sums

    def _result(
        self,
        whole: Loss,
        none: Loss | None = None,
        step: Step | None = None,
        culprits: tuple[Culprits, ...] = (),
        rest: Loss | None = None,
    ) -> Bisection:
        return Bisection(
            self._threshold, self._float_nll, self._tokens, whole, none, step, culprits, rest,
            len(self._subject.linears), len(self._known), self._complete,
        )  # fmt: skip
