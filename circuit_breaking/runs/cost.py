"""Measure the cost of work: seconds and peak memory.

Neither is the same twice, so costs are kept in separate files, and results that a seed determines hold none.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from circuit_breaking.errors import UserError

COST_FILE = "cost.json"  # in the folder of a model: the cost of making it
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def resident(field: str = "VmHWM") -> int | None:
    """Resident memory of this process in bytes: its peak since the last reset, or its present value with `VmRSS`.

    None on systems other than Linux.
    """
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def reset_peak(trim: bool = True) -> bool:
    """Set the process's peak of resident memory to the present value.

    Args:
        trim: give freed memory back to the system first. Otherwise work that reuses memory that was freed before it
            looks cheaper than it is.

    Returns:
        False on a system that offers no way.
    """
    if trim:
        with suppress(OSError, AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR_REFS.write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def added_at_peak(work: Callable[[], object]) -> float:
    """Resident memory that work adds at its peak, GB (Linux). Call it in a fresh process, which has freed nothing yet.

    Raises:
        UserError: the system does not report resident memory.
    """
    base = resident("VmRSS") if reset_peak(trim=False) else None
    if base is None:
        raise UserError("peak memory is measured on Linux only.")
    work()
    return (resident() - base) / 1e9


@contextmanager
def cost(device: torch.device | str = "cpu") -> Iterator[dict[str, float | None]]:
    """Measure a block. The dict that it gives holds, after the block, `seconds`, `cpu_seconds` (of all threads) and
    `peak_gb`.

    `peak_gb` is the peak of memory above the amount in use at the start: of the device on CUDA, of the process
    otherwise. It is None on systems other than Linux.
    """
    measured: dict[str, float | None] = {"seconds": None, "cpu_seconds": None, "peak_gb": None}
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
    else:
        base = resident("VmRSS") if reset_peak() else None
    begin, worked = time.perf_counter(), time.process_time()
    try:
        yield measured
    finally:
        if on_cuda:
            torch.cuda.synchronize(device)
        measured["seconds"] = round(time.perf_counter() - begin, 2)
        measured["cpu_seconds"] = round(time.process_time() - worked, 2)
        peak = torch.cuda.max_memory_allocated(device) if on_cuda else resident()
        if base is not None and peak is not None:
            measured["peak_gb"] = round(max(peak - base, 0) / 1e9, 3)


def with_earlier(spent: dict[str, float | None], seconds: float) -> dict[str, float | None]:
    """The cost of work that was interrupted after `seconds` and resumed: `spent` is the cost since it was resumed.

    The CPU time before the interruption is not known, so `cpu_seconds` becomes None. The peak is that since the work
    was resumed.
    """
    return {**spent, "seconds": round(spent["seconds"] + seconds, 2), "cpu_seconds": None} if seconds > 0 else spent


def together(first: dict[str, float | None], then: dict[str, float | None]) -> dict[str, float | None]:
    """The cost of two pieces of work, one after the other; None for a figure that is unknown for either."""

    def joined(name: str, join: Callable = sum) -> float | None:
        pair = (first[name], then[name])
        return None if None in pair else round(join(pair), 3)

    return {"seconds": joined("seconds"), "cpu_seconds": joined("cpu_seconds"), "peak_gb": joined("peak_gb", max)}
