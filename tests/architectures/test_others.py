"""A representative part of the coverage run (`make coverage-archs`): encoders, encoder-decoders, vision, audio."""

import pytest
from architectures.expectations import OTHERS
from architectures.test_decoders import check

pytestmark = pytest.mark.filterwarnings("ignore")  # of third parties, about models' code


@pytest.mark.parametrize("name", OTHERS)
def test_smoothing_covers_everything_and_changes_nothing(name: str) -> None:
    check(name, OTHERS[name])
