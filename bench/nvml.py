"""What a GPU says of itself through NVML: clocks, temperature, throttling, power, memory.

It only reads; it never changes a setting. Without nvidia-ml-py or a driver there is no reader.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from .document import Json, warning

REASONS = {
    0x1: "idle",
    0x2: "applications clocks setting",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clock setting",
}
"""Bits of ``nvmlClocksEventReasons``, as in nvml.h."""
THROTTLING = frozenset(REASONS[bit] for bit in (0x4, 0x8, 0x20, 0x40, 0x80))
"""Those that make a busy GPU slower than it could be."""
CLOCK_DRIFT = 0.03
"""Between two readings under load: a few steps of 15 MHz are its regulator's usual play."""


class Reader(Protocol):
    """One GPU's sensors."""

    def facts(self) -> Json:
        """``name``, ``uuid_hash``, ``power_limit_w`` and ``driver``."""

    def state(self) -> Json:
        """As the schema's ``gpu_state``."""

    def memory(self) -> tuple[int | None, int | None]:
        """Bytes in use: by this process (None where containers hide it), and by all."""

    def joules(self) -> float | None:
        """Since the driver was loaded."""


class Nvml:
    """Implements :class:`Reader` with nvidia-ml-py."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library = library
        self._handle = handle

    def facts(self) -> Json:
        lib = self._library
        uuid = self._ask(lib.nvmlDeviceGetUUID, _text)
        return {
            "name": self._ask(lib.nvmlDeviceGetName, _text),
            "uuid_hash": uuid and hashlib.sha256(uuid.encode()).hexdigest()[:16],
            "power_limit_w": self._ask(lib.nvmlDeviceGetEnforcedPowerLimit, _milli),
            "driver": _text(lib.nvmlSystemGetDriverVersion()),
        }

    def state(self) -> Json:
        lib = self._library
        bits = self._ask(lib.nvmlDeviceGetCurrentClocksEventReasons)
        return {
            "sm_clock_mhz": self._ask(lambda h: lib.nvmlDeviceGetClockInfo(h, lib.NVML_CLOCK_SM)),
            "memory_clock_mhz": self._ask(
                lambda h: lib.nvmlDeviceGetClockInfo(h, lib.NVML_CLOCK_MEM)
            ),
            "temperature_c": self._ask(
                lambda h: lib.nvmlDeviceGetTemperature(h, lib.NVML_TEMPERATURE_GPU)
            ),
            "power_w": self._ask(lib.nvmlDeviceGetPowerUsage, _milli),
            "throttle_reasons": None if bits is None else reasons_of(bits),
        }

    def memory(self) -> tuple[int | None, int | None]:
        lib = self._library
        used = self._ask(lib.nvmlDeviceGetMemoryInfo, lambda info: int(info.used))
        running = self._ask(lib.nvmlDeviceGetComputeRunningProcesses) or []
        own = [p.usedGpuMemory for p in running if p.pid == os.getpid()]
        return own[0] if own else None, used

    def joules(self) -> float | None:
        found: float | None = self._ask(self._library.nvmlDeviceGetTotalEnergyConsumption, _milli)
        return found

    def _ask(self, question: Callable[[Any], Any], convert: Callable[[Any], Any] = int) -> Any:
        """The answer, or None where this GPU does not know."""
        try:
            found = question(self._handle)
        except self._library.NVMLError:
            return None
        return found if isinstance(found, list) else convert(found)


def open_reader(uuid: str | None) -> Nvml | None:
    """The sensors of the GPU of that UUID; None without a GPU, a driver or nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        known = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        mine = [h for h in known if uuid and uuid in _text(pynvml.nvmlDeviceGetUUID(h))]
    except pynvml.NVMLError:
        return None
    return Nvml(pynvml, mine[0]) if mine else None


def reasons_of(bits: int) -> list[str]:
    """The names of the bits that are set."""
    return [name for bit, name in REASONS.items() if bits & bit]


def state_warnings(states: Sequence[Mapping[str, Any] | None], about: str | None) -> list[Json]:
    """Doubts that readings under load raise, in the order of reading."""
    seen = [state for state in states if state is not None]
    found = []
    held = {r for state in seen for r in state["throttle_reasons"] or () if r in THROTTLING}
    if held:
        text = f"the GPU held its clocks back: {', '.join(sorted(held))}"
        found.append(warning("throttled", text, about))
    clocks = [state["sm_clock_mhz"] for state in seen if state["sm_clock_mhz"]]
    if clocks and max(clocks) - min(clocks) > CLOCK_DRIFT * max(clocks):
        text = f"the SM clock went from {clocks[0]} to {clocks[-1]} MHz"
        if min(clocks) < min(clocks[0], clocks[-1]):
            text += f", with {min(clocks)} MHz between"
        found.append(warning("clock_changed", text, about))
    return found


def _milli(value: Any) -> float:
    return int(value) / 1000


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
