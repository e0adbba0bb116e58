"""Time GPU work: cold L2, one CUDA graph a sample, no host in between; and the GPU's ceilings."""

from collections.abc import Callable

import torch

COLD = 256 * 2**20
"""Bytes written before each sample; several times the largest L2 (60 MB on an H100)."""


def milliseconds(
    work: Callable[[], object], device: str, samples: int = 30, warmup: int = 5
) -> list[float]:
    """How long ``work`` takes on the GPU ``device``, once a sample, each from a cold L2.

    The first calls, which compile, and a few replays are not counted.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        cold = torch.empty(COLD, dtype=torch.uint8, device=device)
        events = []
        for _ in range(warmup + samples):
            cold.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events[warmup:]]


def ceilings(device: str, size: int = 8192) -> dict[str, list[float]]:
    """Samples of what the GPU can do at best, in operations or bytes per second.

    bf16, fp8: a square product of random numbers (zeros would draw less power). copy: bytes read
    and written.
    """
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16).unbind(0)
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target, flops = torch.empty_like(source), 2 * size**3

    def rates(work: Callable[[], object], done: int) -> list[float]:
        return [done / ms * 1e3 for ms in milliseconds(work, device)]

    found = {
        "bf16": rates(lambda: a @ b.T, flops),
        "copy": rates(lambda: target.copy_(source), 2 * 2**30),
    }
    if torch.cuda.get_device_capability(device) >= (8, 9):
        a8, b8 = (t.to(torch.float8_e4m3fn) for t in (a, b))
        one = torch.ones((), device=device)

        def scaled() -> object:
            return torch._scaled_mm(
                a8, b8.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        found["fp8"] = rates(scaled, flops)
    return found
