"""Energy that the devices of this machine report: RAPL for CPUs, NVML for NVIDIA GPUs.

RAPL counts per CPU package, so it includes what other processes of the machine use. Its files are
readable only by root on most systems since Linux 5.10, and absent in most virtual machines. NVML
counts per GPU, on Volta and newer, and not per MIG instance. What cannot be read is left out.
"""

import re
import sys
import threading
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
"""Linux's powercap folder (https://docs.kernel.org/power/powercap/powercap.html)."""
SAMPLE_S = 60.0
"""RAPL counters wrap: one with a range of 262 kJ does so every 22 minutes at 200 W."""


class Energy:
    """Joules since it was created; reads the counters often enough to notice that they wrapped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._packages = _packages()
        self._last = {package: _counter(package) for package in self._packages}
        self._cpu_joules = 0.0
        self._gpus_began = _gpu_joules()
        self._ended = threading.Event()
        if self._packages:
            threading.Thread(target=self._sample, daemon=True).start()

    def joules(self) -> float | None:
        """Joules so far of the CPU packages and of this process' GPUs; None if none reports any."""
        cpu, gpu = self.cpu_joules(), self.gpu_joules()
        return None if cpu is None and gpu is None else (cpu or 0.0) + (gpu or 0.0)

    def cpu_joules(self) -> float | None:
        """Joules so far of the CPU packages; None if their counters cannot be read."""
        if not self._packages:
            return None
        with self._lock:
            for package, size in self._packages.items():
                now, before = _counter(package), self._last[package]
                if now is None or before is None:
                    continue
                self._cpu_joules += ((now - before) if now >= before else now + size - before) / 1e6
                self._last[package] = now
            return self._cpu_joules

    def gpu_joules(self) -> float | None:
        """Joules so far of the GPUs on which this process has a CUDA context; None if unknown.

        A GPU that was not in use at the start counts from the first reading.
        """
        now = _gpu_joules()
        if not now:
            return None
        began = self._gpus_began = {**now, **self._gpus_began}
        return sum(value - began[gpu] for gpu, value in now.items())

    def close(self) -> None:
        """Stop reading the counters."""
        self._ended.set()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.cpu_joules()


def _packages() -> dict[Path, int]:
    """The readable counters of CPU packages, and the value in microjoules at which each wraps.

    The domain ``psys`` includes the packages, and a package includes its cores and memory.
    """
    found = {}
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):
        if not re.fullmatch(r"intel-rapl:\d+", zone.name) or _counter(zone) is None:
            continue
        try:
            name = (zone / "name").read_text().strip()
            size = int((zone / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            continue
        if name.startswith("package"):
            found[zone] = size
    return found


def _counter(zone: Path) -> int | None:
    try:
        return int((zone / "energy_uj").read_text())
    except (OSError, ValueError):  # readable by root only
        return None


def gpus_in_use() -> list[int]:
    """The CUDA devices that this process sees, once it has a CUDA context; empty before."""
    torch: Any = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)  # torch may be half imported
    if cuda is None or not cuda.is_available() or not cuda.is_initialized():
        return []
    return list(range(cuda.device_count()))


def _gpu_joules() -> dict[str, float]:
    """Joules since the driver was loaded, by GPU; empty where NVML or its Python package is not
    there or does not count energy."""
    devices = gpus_in_use()
    if not devices:
        return {}
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 - not installed, or no driver: then there is no figure
        return {}
    torch: Any = sys.modules["torch"]
    found = {}
    for device in devices:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            found[uuid] = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        except pynvml.NVMLError:  # an older GPU, or a MIG instance
            continue
    return found
