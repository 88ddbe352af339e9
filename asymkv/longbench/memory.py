"""Peak memory of this process and of the accelerators from a point in time on, and the end of what they have queued."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

Result = dict[str, Any]


def synchronize(*devices: torch.device) -> None:
    """Waits until accelerators have done all that was queued on them."""
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


class HostMemory:
    """Peak resident bytes of this process from here on.

    Linux lets a process reset its own high-water mark; elsewhere the peak since its start is all there is, and loading
    the model may hide what came after.
    """

    def __init__(self) -> None:
        self.resettable = True
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self.resettable = False
        self.before = self.peak()

    def peak(self) -> int:
        """The high-water mark in bytes."""
        if self.resettable:
            status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def result(self) -> Result:
        """``peak_rss_bytes``, and how much of it came on top of what was there."""
        peak = self.peak()
        return {"peak_rss_bytes": peak, "peak_rss_increase_bytes": peak - self.before}


class DeviceMemory:
    """Peak bytes allocated on accelerators from here on; nothing on a CPU.

    Args:
        devices: those in use; the bytes of several are added.
    """

    def __init__(self, *devices: torch.device) -> None:
        accelerators = [device for device in devices if device.type != "cpu"]
        # Apple's have no such counter.
        self.devices = [d for d in accelerators if hasattr(torch.get_device_module(d), "max_memory_allocated")]
        for device in self.devices:
            torch.get_device_module(device).reset_peak_memory_stats(device)
        self.before = self._total("memory_allocated")

    def _total(self, what: str) -> int:
        return sum(getattr(torch.get_device_module(device), what)(device) for device in self.devices)

    def result(self) -> Result:
        """``device_peak_bytes``, and how much of it came on top of what was there."""
        if not self.devices:
            return {}
        peak = self._total("max_memory_allocated")
        return {"device_peak_bytes": peak, "device_peak_increase_bytes": peak - self.before}
