"""Errors: one base to catch, and the built-in kinds that callers expect."""

import pytest

from qcompile import QCompileError, errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_the_base_and_says_what_it_means(kind: type[Exception]) -> None:
    assert issubclass(kind, QCompileError)
    assert kind.__doc__


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.CalibrationError, ValueError),
        (errors.WeightError, ValueError),
        (errors.GradientError, RuntimeError),
        (errors.VerifyError, errors.PassError),
    ],
)
def test_errors_are_caught_as_what_they_are(kind: type[Exception], builtin: type[Exception]) -> None:
    with pytest.raises(builtin, match="why"):
        raise kind("why")
