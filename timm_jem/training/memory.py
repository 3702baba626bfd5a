"""How much memory there is, and how sizes are written."""

import os

import torch

__all__ = ["in_bytes", "memory_of"]


def memory_of(device: torch.device) -> int:
    """Bytes that a device has, used or not; on CPUs those of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_bytes(count: float) -> str:
    """A number of bytes as people write it: "6.0 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            break
        count, unit = count / 1000, "TB"
    return f"{count:.1f} {unit}"
