"""What the plan predicts of a work is for the GPU that it ran on."""

from types import SimpleNamespace

import pytest
import torch

from fluxkontext.bench.predicted import predicted
from fluxkontext.bench.scenarios import Work
from fluxkontext.runtime.tensor_shapes import ModelShapes


@pytest.mark.parametrize(("capability", "copies"), [((8, 0), True), ((9, 0), False)])
def test_a_gpu_that_copies_to_multiply_needs_more(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], copies: bool
) -> None:
    """FP8 on an A100, which has no tensor cores for it, and on an H100."""
    properties = SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    work = Work("edit", (1024, 1024), ((1024, 1024),), 28)
    peaks = {}
    for device in ("cpu", f"cuda:{110 + capability[0]}"):  # chips are remembered
        about = {"backend": "native", "device": device, "precision": "fp8"}
        pipe = SimpleNamespace(
            about=about, budget=None, tokenizer_2=SimpleNamespace(model_max_length=512)
        )
        peaks[device[:3]] = predicted(ModelShapes(), pipe, work)["denoise"]  # type: ignore[arg-type]
    assert (peaks["cud"] > peaks["cpu"]) == copies
