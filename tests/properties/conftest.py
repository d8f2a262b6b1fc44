"""Hypothesis profiles: "default" gives the same examples every time; HYPOTHESIS_PROFILE=long searches for new ones, as
many as QCOMPILE_EXAMPLES says (default 5,000)."""

import os

from hypothesis import HealthCheck, Phase, settings

# Drawing and capturing a model takes longer than hypothesis expects of one example; explaining a failure, minutes.
COMMON = {
    "deadline": None,
    "phases": [phase for phase in Phase if phase is not Phase.explain],
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}

settings.register_profile("default", max_examples=25, derandomize=True, **COMMON)
examples = int(os.environ.get("QCOMPILE_EXAMPLES", "5000"))
settings.register_profile("long", max_examples=examples, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
