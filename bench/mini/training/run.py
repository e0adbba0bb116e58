"""One run of one stage: its settings, its device, and which process of several it is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from .schedule import Budget


@dataclass(frozen=True)
class Run:
    """The settings of a stage.

    batch: samples of a step, over all processes together. views: how many of them share a scene and
    a text and differ in noise alone, because encoding pictures costs about as much as a step.
    """

    folder: Path
    device: torch.device
    budget: Budget
    batch: int
    rate: float
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16
    views: int = 1
    workers: int = 0
    compile: bool = False
    pause_after: float | None = None  # minutes of this process
    save_every: float = 60.0  # seconds
    probe_every: float = 120.0  # seconds
    log_every: float = 10.0  # seconds
    probe_samples: int = 128
    ignore_gate: bool = False

    @property
    def process(self) -> int:
        """The number of this process, from 0."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def processes(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def local_batch(self) -> int:
        """This process's samples of a step."""
        return max(1, self.batch // self.processes)

    @property
    def local_draws(self) -> int:
        """How many different ones those are."""
        return max(1, self.local_batch // self.views)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.process == 0

    def wait(self) -> None:
        """Let all processes come as far as this."""
        if dist.is_initialized():
            dist.barrier()

    def generator(self, stage: int, step: int) -> torch.Generator:
        """The noise of one step: from the seed, so that the step can be redone."""
        mixed = np.random.SeedSequence((self.seed, stage, self.process, step))
        number = int(mixed.generate_state(1, np.uint64)[0] >> 1)
        return torch.Generator(self.device).manual_seed(number)

    def spread(self, module: nn.Module) -> nn.Module:
        """Shard the module over the processes, if there are several (FSDP2).

        As one unit: the transformer's modulation is computed for all blocks before any block runs.
        """
        if self.processes > 1:
            fully_shard(module)
        return module


@contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` has started, if it has, and choose this one's device."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world == 1:
        yield chosen
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()
