"""A plan carried out: weights that live on the host pass through staging buffers as they are used.

A unit is a module whose tensors (all parameters and buffers below it, whatever their type) are
packed into one piece of host memory. When the unit is called, its tensors are views of a staging
buffer into which that piece was copied; the next unit's copy runs meanwhile. Results are those of
resident weights, bit for bit. The code is the same on any device; only :class:`_Copier` knows CUDA.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .budget import Budget
from .weight_model import aligned, unit_of

_LOOKUP = "lookup"
_WHOLE = "vae"
"""The group whose units do not follow one another: one buffer, filled when it is used."""


class Placed:
    """The networks of a model, placed as a budget's plan says."""

    def __init__(self, budget: Budget | None, device: torch.device) -> None:
        """budget: None keeps everything on the device, as it was loaded."""
        self.budget = budget
        self.device = device
        self._streams: list[_Stream] = []
        self._host = (
            budget.plan.placement.on_host(budget.planner.blocks) if budget is not None else {}
        )
        if budget is not None and device.type == "cuda":
            _limit_allocator(budget.limit - budget.planner.overhead.fixed, device)

    @property
    def tile(self) -> int:
        """Side in pixels of the VAE's tiles in the request that runs, 0 for its own rule."""
        return 0 if self.budget is None else self.budget.plan.placement.tile

    @property
    def graphs(self) -> bool:
        """Whether there is room for CUDA graphs in the request that runs."""
        return self.budget is None or self.budget.plan.placement.graphs

    def loads_on(self, component: str) -> torch.device:
        """Where to load a component: on the host if part of it stays there."""
        groups = self._groups(component)
        return torch.device("cpu") if groups else self.device

    def place(self, component: str, module: nn.Module) -> None:
        """Bring a loaded component's weights to where the plan wants them."""
        if not (groups := self._groups(component)):
            return
        units: dict[str, dict[str, list[_Slot]]] = {}
        for slot in _slots(module):
            group, unit = unit_of(component, slot.name) or ("", "")
            chosen = groups.get(group, frozenset())
            if chosen is None or f"{component}.{unit}" in chosen:
                units.setdefault(group, {}).setdefault(unit, []).append(slot)
            else:
                slot.put(slot.get().to(self.device))
        for path in units.pop(_LOOKUP, {}):
            _look_up_on_host(module.get_submodule(path), self.device)
        for group, members in units.items():
            owned = [_Unit(module.get_submodule(path), slots) for path, slots in members.items()]
            # the halves of the VAE have an edit's other stages between them
            sets = [[unit] for unit in owned] if group == _WHOLE else [owned]
            self._streams += [_Stream(self, of, self.device) for of in sets]

    @contextmanager
    def stage(self) -> Iterator[None]:
        """One stage of an edit: no other stage's staging buffers live in it, nor its own after."""
        self.release()
        try:
            yield
        finally:
            self.release()

    def release(self, keep: "_Stream | None" = None) -> None:
        """Let go of all staging buffers, but for those of ``keep``."""
        for stream in self._streams:
            if stream is not keep:
                stream.close()

    def close(self) -> None:
        """Let go of the modules."""
        for stream in self._streams:
            stream.close()
            stream.detach()
        self._streams.clear()
        if self.budget is not None and self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def _groups(self, component: str) -> Mapping[str, frozenset[str] | None]:
        mine = {
            "transformer": ("modulation", "blocks"),
            "text_encoder": ("text", _LOOKUP),
            "text_encoder_2": ("text", _LOOKUP),
            "vae": (_WHOLE,),
        }[component]
        return {group: chosen for group, chosen in self._host.items() if group in mine}


@dataclass(frozen=True)
class _Slot:
    """A place in a module that holds a tensor, and the tensor's full name."""

    name: str
    owner: dict[str, Any]
    key: str

    def get(self) -> Tensor:
        tensor: Tensor = self.owner[self.key]
        return tensor

    def put(self, tensor: Tensor) -> None:
        is_parameter = isinstance(self.owner[self.key], nn.Parameter)
        self.owner[self.key] = _parameter(tensor) if is_parameter else tensor


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _slots(module: nn.Module) -> Iterator[_Slot]:
    """Every parameter and buffer below ``module``."""
    for path, child in module.named_modules():
        for owner in (child._parameters, child._buffers):
            for key, tensor in owner.items():
                if tensor is not None:
                    yield _Slot(f"{path}.{key}" if path else key, owner, key)


@dataclass
class _Unit:
    """A module whose tensors travel together. host: their bytes, each at its offset."""

    module: nn.Module
    slots: Sequence[_Slot]
    host: Tensor = field(init=False)
    at_home: list[Tensor] = field(init=False)

    def pack(self, pinned: bool) -> None:
        """Move the tensors into one piece of host memory."""
        size = sum(aligned(_size(slot.get())) for slot in self.slots)
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.at_home = self.views(self.host)
        for slot, view in zip(self.slots, self.at_home, strict=True):
            view.copy_(slot.get())
        self.show(self.at_home)

    def views(self, memory: Tensor) -> list[Tensor]:
        """The unit's tensors as they lie in ``memory``."""
        found, offset = [], 0
        for slot in self.slots:
            like = slot.get()
            piece = memory[offset : offset + _size(like)].view(like.dtype).view(like.shape)
            found.append(_parameter(piece) if isinstance(like, nn.Parameter) else piece)
            offset += aligned(_size(like))
        return found

    def show(self, tensors: Sequence[Tensor]) -> None:
        """Let the module's tensors be these."""
        for slot, tensor in zip(self.slots, tensors, strict=True):
            slot.owner[slot.key] = tensor


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Stream:
    """Units that are called in turn, and the buffers through which they pass.

    Two buffers take turns where there are several units: one is used while the other is filled.
    """

    def __init__(self, placed: Placed, units: Sequence[_Unit], device: torch.device) -> None:
        self.placed = placed
        self.units = units
        self.copier = _Copier(device)
        self.buffers: list[Tensor] = []
        self.held: list[int | None] = []
        self.hooks: list[RemovableHandle] = []
        for i, unit in enumerate(units):
            unit.pack(pinned=device.type == "cuda")
            self.hooks += [
                unit.module.register_forward_pre_hook(lambda _m, _a, i=i: self._enter(i)),
                unit.module.register_forward_hook(
                    lambda _m, _a, _o, i=i: self._leave(i), always_call=True
                ),
            ]

    def close(self) -> None:
        """Let go of the buffers."""
        if self.buffers:
            self.copier.wait_for_all()
            self.buffers, self.held = [], []

    def detach(self) -> None:
        """No longer follow the modules' calls, which would keep them alive."""
        for hook in self.hooks:
            hook.remove()

    def _enter(self, i: int) -> None:
        if not self.buffers:
            self._open()
        if i not in self.held:  # the first unit, or one out of turn
            self._fetch(i, 0)
        buffer = self.held.index(i)
        self.copier.wait_for(buffer)
        self.units[i].show(self.units[i].views(self.buffers[buffer]))
        following = (i + 1) % len(self.units)
        if following not in self.held:
            self._fetch(following, 1 - buffer)

    def _leave(self, i: int) -> None:
        self.units[i].show(self.units[i].at_home)
        if i in self.held:  # not when its buffers could not be had
            self.copier.used(self.held.index(i))

    def _open(self) -> None:
        self.placed.release(keep=self)
        count = min(2, len(self.units))
        size = max(len(unit.host) for unit in self.units)
        self.buffers = [
            torch.empty(size, dtype=torch.uint8, device=self.copier.device) for _ in range(count)
        ]
        self.held = [None] * count
        self.copier.open(count)

    def _fetch(self, i: int, buffer: int) -> None:
        host = self.units[i].host
        self.copier.copy(self.buffers[buffer][: len(host)], host, buffer)
        self.held[buffer] = i


class _Copier:
    """Copies into numbered buffers: at once on a CPU, on a stream of their own on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.filled: list[Any] = []
        self.free: list[Any] = []

    def open(self, buffers: int) -> None:
        """Before the first use of new buffers: what had their memory before must be done."""
        if self.stream is not None:
            self.filled = [torch.cuda.Event() for _ in range(buffers)]
            self.free = [torch.cuda.Event() for _ in range(buffers)]
            for event in self.free:
                event.record(torch.cuda.current_stream(self.device))

    def copy(self, to: Tensor, source: Tensor, buffer: int) -> None:
        """Fill a buffer as soon as its last user is done."""
        if self.stream is None:
            to.copy_(source)
            return
        self.stream.wait_event(self.free[buffer])
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
        self.filled[buffer].record(self.stream)

    def wait_for(self, buffer: int) -> None:
        """Let what runs next see the buffer filled."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self.filled[buffer])

    def used(self, buffer: int) -> None:
        """What was started so far is the buffer's last user."""
        if self.stream is not None:
            self.free[buffer].record(torch.cuda.current_stream(self.device))

    def wait_for_all(self) -> None:
        """Before buffers go: what comes next must not have their memory while it is filled."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


def _look_up_on_host(table: nn.Module, device: torch.device) -> None:
    """An embedding whose rows are picked on the host; only those come to the device."""
    table.register_forward_pre_hook(lambda _m, args: tuple(ids.cpu() for ids in args))
    table.register_forward_hook(lambda _m, _a, rows: rows.to(device))


def _limit_allocator(limit: int, device: torch.device) -> None:
    """Make a budget a hard limit: torch's allocator refuses what goes beyond."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(max(limit, 0) / total, 1.0), device)
