"""The GPU that the host plays sees what a real one would not forgive."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings: extra tensorrt-rtx")


@pytest.fixture
def cuda() -> Any:
    from .host_cuda import HostCuda

    return HostCuda()


@pytest.mark.parametrize("size", [9, 8])
@pytest.mark.parametrize("freed", [False, True])
@pytest.mark.parametrize("kind", ["HostToDevice", "DeviceToHost", "DeviceToDevice"])
def test_a_copy_stays_inside_memory_that_is_there(
    cuda: Any, kind: str, freed: bool, size: int
) -> None:
    _, there = cuda.cudaMalloc(16)
    _, block = cuda.cudaMalloc(8)
    host = np.zeros(16, np.uint8)
    source, _, target = kind.partition("To")
    to = block if target == "Device" else host.ctypes.data
    of = host.ctypes.data if source == "Host" else there if target == "Device" else block
    copy = (to, of, size, getattr(cuda.cudaMemcpyKind, f"cudaMemcpy{kind}"))
    if freed:
        cuda.cudaFree(block)
    if not freed and size == 8:
        assert cuda.cudaMemcpy(*copy) == cuda.cudaMemcpyAsync(*copy, 1)
        return
    for call in (cuda.cudaMemcpy, lambda *it: cuda.cudaMemcpyAsync(*it, 1)):
        with pytest.raises(AssertionError, match="found none that is there"):
            call(*copy)


def test_a_recorded_copy_is_looked_at_when_it_runs(cuda: Any) -> None:
    blocks = [cuda.cudaMalloc(8)[1] for _ in range(2)]
    cuda.cudaStreamBeginCapture(1)
    cuda.cudaMemcpyAsync(*blocks, 8, cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice, 1)
    _, graph = cuda.cudaStreamEndCapture(1)
    cuda.cudaGraphLaunch(graph, 1)
    cuda.cudaFree(blocks[1])
    with pytest.raises(AssertionError, match="found none that is there"):
        cuda.cudaGraphLaunch(graph, 1)


def test_no_address_is_given_out_twice(cuda: Any) -> None:
    addresses = []
    for _ in range(8):
        addresses.append(cuda.cudaMalloc(64)[1])
        cuda.cudaFree(addresses[-1])
    assert len(set(addresses)) == len(addresses)
