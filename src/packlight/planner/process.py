"""What the operating system says that a process has in memory, beside what tensors take."""

from pathlib import Path


def resident_bytes(field: str, process: int | str = "self") -> int:
    """Read VmRSS or VmHWM (the peak) of this process, or of one with a number."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def reset_resident_peak() -> None:
    """Let VmHWM start anew where the kernel allows it; else it keeps the process's earlier peak."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return
