"""What a model computes in is chosen for the device that it will run on."""

import pytest
import torch

from fluxkontext.runtime.backends.precision import Precision, plain, upcast
from fluxkontext.runtime.recipes import RECIPES


def test_of_two_gpus_the_older_computes_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """An RTX 4090, which is current, and an RTX 2080."""
    capabilities = {torch.device("cuda", 0): (8, 9), torch.device("cuda", 1): (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert [plain(device) for device in capabilities] == ["bf16", "fp16"]
    assert plain(torch.device("cpu")) == "fp32"


def test_a_gpu_multiplies_in_16_bits_what_it_has_no_tensor_cores_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An A100, an RTX 4090 and an RTX 5090; a T4 has no kernels at all."""
    found = {}
    for index, capability in enumerate(((8, 0), (8, 9), (12, 0), (7, 5))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
        found[capability] = upcast(torch.device("cuda", 100 + index))  # chips are remembered
    assert found == {(8, 0): ("fp8", "nvfp4"), (8, 9): ("nvfp4",), (12, 0): (), (7, 5): ()}
    assert upcast(torch.device("cpu")) == ()


class Properties:
    multi_processor_count = 1


def test_the_ops_of_quantised_layers_are_those_of_the_recipe() -> None:
    assert Precision("bf16", torch.bfloat16).layers == ()
    for recipe in RECIPES:
        (op,) = Precision("fp8", torch.bfloat16, recipe).layers
        assert op.startswith("linear_")
