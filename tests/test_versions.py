"""A version is asked of the installation, and nothing is an answer."""

import torch

from qcompile.versions import installed


def test_a_package_that_is_there_and_one_that_is_not() -> None:
    assert installed("torch") in (torch.__version__, torch.__version__.partition("+")[0])
    assert installed("no-such-package-of-any-kind") is None
