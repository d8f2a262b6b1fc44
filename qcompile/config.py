"""The one set of options: a frozen value that validates itself."""

import dataclasses
import difflib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from qcompile.calibration import Calibration
from qcompile.errors import ConfigError
from qcompile.ops import TORCH_DTYPES
from qcompile.paths import expanded

Dtype = Literal["int8", "fp8", "fp8_e5m2"]
Activations = Literal["token", "tensor", "static"]
Clip = Literal["none", "percentile", "mse"]
PowerOfTwo = Literal["off", "absorb", "drop"]
Inner = Literal["inductor", "eager"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the w8a8 backend.

    dtype: "int8", "fp8" (e4m3) or "fp8_e5m2", for weights and activations alike.
    activations: "token" (dynamic, per-token), "tensor" (dynamic, per-tensor) or "static" (per-tensor, calibrated).
    clip: what a static range leaves out: nothing, the largest values of one sampled token in a hundred, or whatever
        gives the least squared error on sampled tokens.
    alpha: SmoothQuant's migration strength in 0…1, "auto" (per group of linears, the one with the least output error on
        calibration data, no smoothing among them), or None for no smoothing. It acts on calibrated models only.
    power_of_two: "absorb" and "drop" round smoothing scales to powers of two where they are folded into parameters,
        which then lose no bit; the rest of the scale is absorbed at run time, or dropped.
    calibration: a Calibration, or the path of a saved one.
    calibrate: the model calibrates itself on this many calls before it is quantized; 0 means it does not.
    ignore: glob patterns over module names (of experts, their parameters' too); matching linears stay in float, as
        routers of experts always do.
    verify: check every pass's graph, and compare it with the graph before it on real inputs.
    dump: folder for the graphs before and after every pass.
    tiles: path of a table of measured tiles for GPU kernels, as `qcompile tune` writes it.
    inner: what runs the lowered graph: Inductor, or PyTorch op by op.
    mode: torch.compile's mode; "reduce-overhead" turns CUDA graphs on.
    Raises ConfigError.
    """

    dtype: Dtype = "int8"
    activations: Activations = "token"
    clip: Clip = "none"
    alpha: float | Literal["auto"] | None = 0.5
    power_of_two: PowerOfTwo = "off"
    calibration: Calibration | None = None
    calibrate: int = 0
    ignore: tuple[str, ...] = ("lm_head",)
    verify: bool = False
    dump: str | None = None
    tiles: str | None = None
    inner: Inner = "inductor"
    mode: str | None = None

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, get_args(Dtype))
        _one_of("activations", self.activations, get_args(Activations))
        _one_of("clip", self.clip, get_args(Clip))
        _one_of("power_of_two", self.power_of_two, get_args(PowerOfTwo))
        _one_of("inner", self.inner, get_args(Inner))
        _check_alpha(self.alpha)
        if isinstance(self.calibration, str | os.PathLike):
            object.__setattr__(self, "calibration", _load(expanded(self.calibration)))
        if self.calibration is not None and not isinstance(self.calibration, Calibration):
            raise ConfigError(
                f"calibration must be a qcompile.Calibration or a path; got {type(self.calibration).__name__}; "
                "pass what qcompile.calibrate returned, or the file it was saved to"
            )
        if isinstance(self.calibrate, bool) or not isinstance(self.calibrate, int) or self.calibrate < 0:
            raise ConfigError(f"calibrate must be a number of calls, 0 or more; got {self.calibrate!r}")
        if self.calibrate and self.calibration is not None:
            raise ConfigError("calibration and calibrate exclude each other; got both; keep one of them")
        if self.activations == "static" and not self.calibrated:
            raise ConfigError(
                'activations="static" needs activation ranges; got no calibration; add calibration=… or calibrate=N'
            )
        if self.clip != "none" and self.activations != "static":
            raise ConfigError(
                f'clip={self.clip!r} cuts static ranges; got activations={self.activations!r}; add activations="static"'
            )
        object.__setattr__(self, "ignore", _patterns(self.ignore))
        if not isinstance(self.verify, bool):
            raise ConfigError(f"verify must be True or False; got {self.verify!r}")
        object.__setattr__(self, "dump", _path("dump", self.dump, "a folder"))
        object.__setattr__(self, "tiles", _path("tiles", self.tiles, "a file that qcompile tune wrote"))
        if self.mode not in (
            None,
            "default",
            "reduce-overhead",
            "max-autotune",
            "max-autotune-no-cudagraphs",
        ):
            raise ConfigError(f"mode must be one of torch.compile's modes; got {self.mode!r}; leave it out")

    @property
    def calibrated(self) -> bool:
        """Whether activation statistics will be known when weights are quantized."""
        return self.calibration is not None or self.calibrate > 0

    @property
    def smooths(self) -> bool:
        return self.calibrated and self.alpha is not None

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> "Config":
        """The config that `torch.compile(..., backend="w8a8", options=options)` means. Raises ConfigError."""
        options = dict(options or {})
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                close = difflib.get_close_matches(str(name), names, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(names)}"
                raise ConfigError(f"unknown option {name!r} for backend w8a8; {hint}")
        if mode is not None:
            options.setdefault("mode", mode)
        config = cls(**options)
        if options.get("alpha") is not None and not config.calibrated:
            raise ConfigError(
                f"alpha={config.alpha} needs activation statistics; got no calibration; "
                "add calibration=… or calibrate=N, or leave alpha out"
            )
        return config


def _one_of(option: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{option} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def _path(option: str, value: object, what: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not isinstance(path := os.fspath(value), str):
        raise ConfigError(f"{option} must be the path of {what}; got {value!r}")
    return str(expanded(path))


def _check_alpha(alpha: object) -> None:
    in_range = isinstance(alpha, int | float) and not isinstance(alpha, bool) and 0 <= alpha <= 1
    if not (alpha is None or alpha == "auto" or in_range):
        raise ConfigError(f'alpha must be a number in 0…1, "auto", or None for no smoothing; got {alpha!r}')


def _patterns(ignore: object) -> tuple[str, ...]:
    patterns = (ignore,) if isinstance(ignore, str) else ignore
    if not isinstance(patterns, tuple | list) or not all(isinstance(p, str) for p in patterns):
        raise ConfigError(f"ignore must be glob patterns over module names; got {ignore!r}")
    return tuple(patterns)


def _load(path: Path) -> Calibration:
    # Every graph of a model builds its Config anew; one object per file keeps the graphs sharing weights.
    return _load_version(path, path.stat().st_mtime_ns if path.exists() else 0)


@functools.lru_cache(maxsize=8)
def _load_version(path: Path, modified: int) -> Calibration:
    return Calibration.load(path)
