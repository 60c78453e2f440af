"""How much memory is free: what follows from the input is compared with it before any work."""

import os
from pathlib import Path


def free_memory() -> int | None:
    """Bytes of main memory that new data may take; None if the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def in_gib(size: float) -> str:
    """Bytes in GiB, as `1.5 GiB`."""
    return f"{size / 2**30:,.1f} GiB"
