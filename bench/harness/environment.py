"""The environment of a figure: machine, driver, versions, the state of the source, and how the card was meanwhile."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("triton", "numpy", "einops", "diffusers", "av", "pillow")
#: Reasons for lowered clocks, by NVML's bits.
_THROTTLING = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
}


def capture(device: torch.device) -> dict[str, Any]:
    """Returns a JSON-ready record of the environment."""
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device_type": device.type,
        "device": device_name(device),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {"torch": torch.__version__, **{name: _version(name) for name in _PACKAGES}},
        "git": git_state(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["gpu"] = {
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **_ask(
                device,
                lambda nvml, card: {
                    "driver": nvml.nvmlSystemGetDriverVersion(),
                    "power_limit_watts": nvml.nvmlDeviceGetEnforcedPowerLimit(card) / 1000,
                    "max_clock_mhz": nvml.nvmlDeviceGetMaxClockInfo(card, nvml.NVML_CLOCK_SM),
                },
            ),
        }
    return record


def device_name(device: torch.device) -> str:
    """Returns the device's name, which stands beside every figure."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def machine_state(device: torch.device) -> dict[str, Any] | None:
    """Reads clocks, temperature, power and throttling of the card, or why NVML cannot tell; None without a card."""

    def read(nvml: Any, card: Any) -> dict[str, Any]:
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(card)
        return {
            "clock_mhz": nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_MEM),
            "temperature_celsius": nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU),
            "power_watts": nvml.nvmlDeviceGetPowerUsage(card) / 1000,
            "throttling": [name for bit, name in _THROTTLING.items() if reasons & bit],
        }

    return _ask(device, read) or None


def energy_joules(device: torch.device) -> float | None:
    """Returns the energy that the card has consumed since its driver was loaded, or None where that is not known."""
    found = _ask(device, lambda nvml, card: {"millijoules": nvml.nvmlDeviceGetTotalEnergyConsumption(card)})
    return found["millijoules"] / 1000 if "millijoules" in found else None


def process_memory(device: torch.device) -> int | None:
    """Returns the bytes that this process holds on the GPU by NVML's count, context included.

    None without a GPU, and where NVML cannot tell (in containers it often sees other process numbers).
    """
    found = _ask(device, lambda nvml, card: {"processes": nvml.nvmlDeviceGetComputeRunningProcesses(card)})
    return next((one.usedGpuMemory for one in found.get("processes", ()) if one.pid == os.getpid()), None)


def git_state() -> dict[str, Any] | None:
    """Returns the commit and whether the tree differs from it; None outside a git checkout.

    Where a tree was copied without its history, ``SWIFTI2V_COMMIT`` says what it is.
    """
    named = os.environ.get("SWIFTI2V_COMMIT")
    if named:
        return {"commit": named, "dirty": False}
    root, found = Path(__file__).resolve().parent.parent.parent, []
    try:
        for command in (["rev-parse", "HEAD"], ["status", "--porcelain"]):
            done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True)
            found.append(done.stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": found[0], "dirty": bool(found[1])}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _ask(device: torch.device, read: Callable[[Any, Any], dict[str, Any]]) -> dict[str, Any]:
    """Returns what NVML says of the card, or ``nvml_error``, why it cannot tell; nothing without a card."""
    if device.type != "cuda":
        return {}
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            # The UUID names the device: torch's index counts visible devices only.
            card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            return read(pynvml, card)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return {"nvml_error": str(error)}
