"""--device: what auto means, and a device that is not there."""

import pytest
import torch

from qcompile.commands.device import device_of
from qcompile.errors import ConfigError


def test_a_device_as_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == device_of("cpu") == "cpu"
    with pytest.raises(ConfigError, match="use --device cpu"):
        device_of("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of("auto") == device_of("cuda") == "cuda"
