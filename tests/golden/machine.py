"""What rounding depends on: two machines of which this is equal compute the same bits on one thread."""

import platform
import re
from pathlib import Path

import torch


def machine() -> str:
    """Processor, the instructions torch uses on it, and torch's version."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    processor = re.findall(r"^(?:vendor_id|cpu family|model|model name|stepping)\s*:.*$", text, re.MULTILINE)[:5]
    lines = [re.sub(r"\s+", " ", line) for line in processor]
    return "; ".join([*lines, torch.backends.cpu.get_cpu_capability(), f"torch {torch.__version__}"])
