"""The most memory that a block used, by every counter that there is."""

import re
import sys
from pathlib import Path
from typing import Any

from .document import Json, memory
from .nvml import Reader

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"
"""Makes VmHWM the present resident set: proc_pid_clear_refs(5), Linux 4.0 and newer."""


class Peak:
    """Measures from :meth:`start` to :meth:`stop`; not nested.

    RAM is the kernel's own high-water mark of the resident set, so that nothing is missed between
    two readings. On a GPU it is torch's allocator, and NVML's figures when the block ends.
    """

    def __init__(self, device: str, reader: Reader | None) -> None:
        torch: Any = sys.modules.get("torch")
        self._cuda = torch.cuda if torch and device.startswith("cuda") else None
        self._device = device
        self._reader = reader

    def start(self) -> None:
        if self._cuda:
            self._cuda.reset_peak_memory_stats(self._device)
        try:
            _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
        except OSError:
            self._ram = False
        else:
            self._ram = True

    def stop(self) -> Json:
        """The peaks, as the schema's ``memory``."""
        found: dict[str, int | None] = {"max_ram": resident()[1] if self._ram else None}
        if self._cuda:
            self._cuda.synchronize(self._device)
            found["max_allocated"] = self._cuda.max_memory_allocated(self._device)
            found["max_reserved"] = self._cuda.max_memory_reserved(self._device)
        if self._reader:
            found["max_process_vram"], found["max_global_vram"] = self._reader.memory()
        return memory(**found)


def resident() -> tuple[int | None, int | None]:
    """Bytes of RAM that this process has now, and its peak; None where /proc does not tell."""
    try:
        status = _STATUS.read_text(encoding="utf-8")
    except OSError:
        return None, None
    sizes = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.M))
    now, peak = (sizes.get(name) for name in ("VmRSS", "VmHWM"))
    return now and int(now) * 1024, peak and int(peak) * 1024


def larger(a: Json, b: Json) -> Json:
    """Of two peaks the larger, counter by counter."""
    return {name: max((v for v in (a[name], b[name]) if v is not None), default=None) for name in a}
