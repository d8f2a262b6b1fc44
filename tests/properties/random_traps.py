"""Ways to read a norm's output that have broken, or could break, a pass that moves scales around.

Each trap is a function of a bag of parameters `p`, a normalized tensor `h` [..., T, C] and the residual `x` of the same
shape; it returns a tensor of that shape (or one that broadcasts to it). Every name in TRAPS is one trap.
"""

from types import ModuleType

from properties import traps_in_data, traps_in_weights
from properties.trap_parameters import Trap


def _traps(module: ModuleType) -> dict[str, Trap]:
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    return {name: value for name, value in own.items() if callable(value) and not name.startswith("_")}


TRAPS: dict[str, Trap] = _traps(traps_in_data) | _traps(traps_in_weights)
