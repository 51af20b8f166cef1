"""What a piece of work costs: seconds and peak memory (layer 0).

Neither is the same twice, so costs are kept in files of their own, apart from results that a seed determines.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

COST_FILE = "cost.json"  # in the folder of a model: what making it cost
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def resident(field: str = "VmHWM") -> int | None:
    """Resident memory of this process, bytes: its peak since the last reset, or with `VmRSS` now. None off Linux."""
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def reset_peak() -> bool:
    """Set the process's peak to what is resident now, after giving freed memory back. False where there is no way."""
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)  # else a later piece of work reuses what an earlier one left, and looks cheap
    try:
        CLEAR_REFS.write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


@contextmanager
def cost(device: torch.device | str = "cpu") -> Iterator[dict[str, float | None]]:
    """Measure the block: a dict that holds, when it ends, `seconds`, `cpu_seconds` (of all threads) and `peak_gb`.

    `peak_gb` is the highest memory above what was in use at the beginning: of the device on CUDA, else of the process,
    and None where the system does not tell (elsewhere than on Linux).
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
    """The cost of work that went on after an interruption, `seconds` after it began; what CPU time that took is lost.

    The peak stays that of the part after it.
    """
    return {**spent, "seconds": round(spent["seconds"] + seconds, 2), "cpu_seconds": None} if seconds > 0 else spent


def together(first: dict[str, float | None], then: dict[str, float | None]) -> dict[str, float | None]:
    """The cost of two pieces of work, one after the other; None for what is not known of both."""

    def joined(name: str, join: Callable = sum) -> float | None:
        pair = (first[name], then[name])
        return None if None in pair else round(join(pair), 3)

    return {"seconds": joined("seconds"), "cpu_seconds": joined("cpu_seconds"), "peak_gb": joined("peak_gb", max)}
