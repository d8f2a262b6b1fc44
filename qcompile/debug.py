"""QCOMPILE_DEBUG=dump,time,verify: observation by names, on top of the options."""

import dataclasses
import os
import sys
from pathlib import Path

from torch.fx import GraphModule

from qcompile.config import Config
from qcompile.dump import DumpTo
from qcompile.errors import ConfigError
from qcompile.pass_pipeline import Observer, Pipeline, Taken, pass_text
from qcompile.verify import Verify

VARIABLE = "QCOMPILE_DEBUG"
SWITCHES = ("dump", "time", "verify")
DEFAULT_FOLDER = "qcompile_debug"


def switches() -> frozenset[str]:
    """The names set in QCOMPILE_DEBUG. Raises ConfigError for an unknown one."""
    names = frozenset(name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip())
    for name in names - set(SWITCHES):
        raise ConfigError(f"{VARIABLE} takes {', '.join(SWITCHES)}; got {name!r}")
    return names


def with_environment(config: Config) -> Config:
    """The config with what QCOMPILE_DEBUG adds to it."""
    names = switches()
    return dataclasses.replace(
        config,
        verify=config.verify or "verify" in names,
        dump=config.dump or (DEFAULT_FOLDER if "dump" in names else None),
    )


def observers(config: Config, pipeline: Pipeline) -> list[Observer]:
    """Who watches a pipeline run under this config."""
    watching: list[Observer] = [Verify(full=config.verify)]
    if "time" in switches():
        watching.append(Time())
    if config.dump is not None:
        watching.append(DumpTo(Path(config.dump), pipeline.to_text()))
    return watching


class Time:
    """Prints one line per pass to stderr: seconds and edits."""

    compares = False

    def start(self, gm: GraphModule) -> None:
        print(f"qcompile: graph of {len(gm.graph.nodes)} nodes", file=sys.stderr)

    def step(self, taken: Taken) -> None:
        text, edits = pass_text(taken.step), taken.result.changes
        print(f"qcompile: {taken.index:02d} {text:60s} {taken.seconds * 1e3:8.1f} ms {edits:6d} edits", file=sys.stderr)
