"""What a model computes in is chosen for the device that it will run on."""

import pytest
import torch

from fluxkontext.runtime.backends.precision import plain


def test_of_two_gpus_the_older_computes_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """An RTX 4090, which is current, and an RTX 2080."""
    capabilities = {torch.device("cuda", 0): (8, 9), torch.device("cuda", 1): (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert [plain(device) for device in capabilities] == ["bf16", "fp16"]
    assert plain(torch.device("cpu")) == "fp32"
