"""eliminate_dead: erase nodes that nobody reads.

Leaves alone inputs (the signature stays), writes to caches, and everything an output depends on.
"""

import dataclasses
from typing import ClassVar

from torch.fx import GraphModule

from qcompile.pass_pipeline import Bound, PassResult
from qcompile.rewrite import eliminate_unused


@dataclasses.dataclass(frozen=True)
class EliminateDead:
    """Erase nodes without readers."""

    name: ClassVar[str] = "eliminate_dead"
    stage: ClassVar[str] = "any"
    bound: ClassVar[Bound] = "exact"

    def run(self, gm: GraphModule) -> PassResult:
        return PassResult(eliminate_unused(gm))
