"""Devices and number types by their names in the settings."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from circuit_breaking.errors import UserError, first_line
from circuit_breaking.runs.distributed import world

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def pick_device(device: str) -> torch.device:
    """The torch device of a name: `"auto"` is CUDA if there is one, else Apple's MPS, else the CPU.

    With several processes, `"auto"` and `"cuda"` give each process another GPU. Within `saying_device`, the first call
    says what was chosen.

    Raises:
        UserError: the device cannot be used here.
    """
    global _to_say
    chosen = _pick(device)
    if _to_say:
        _to_say = False
        say_device(device, chosen)
    return chosen


def _pick(device: str) -> torch.device:
    own = world().device
    if own is not None and device in ("auto", own.type):
        return own
    if device == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise UserError(f"device {device!r} cannot be used here ({first_line(error)}). Set device to auto.") from error
    return chosen


NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")  # is there if the driver of NVIDIA is loaded (Linux)
CUDA_BUILD = "cu126"  # the build of torch that docs/getting-started.md names


_to_say = False  # whether the next call of `pick_device` says what it chooses


@contextmanager
def saying_device() -> Iterator[None]:
    """Within the block, a script says once where it computes, when it first asks for its device."""
    global _to_say
    _to_say = True
    try:
        yield
    finally:
        _to_say = False


def say_device(device: str, chosen: torch.device) -> None:
    """Say on stderr where a script computes and, if it does not use this machine's NVIDIA GPU, how to change that.

    Args:
        device: name of the device in the settings.
        chosen: what `pick_device` gives for it.
    """
    if world().rank > 0:
        return
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else ""
    several = f", in {world().size} processes" if world().size > 1 else ""
    print(f"device: {chosen.type}{name and f' ({name})'}{several}", file=sys.stderr, flush=True)
    if device == "auto" and chosen.type == "cpu" and has_nvidia_gpu():
        print(f"note: {why_no_cuda()}", file=sys.stderr, flush=True)


def has_nvidia_gpu() -> bool:
    """Whether this machine has the driver of an NVIDIA GPU, and CUDA_VISIBLE_DEVICES does not hide the GPUs."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")
    return not hidden and (NVIDIA_DRIVER.is_file() or shutil.which("nvidia-smi") is not None)


def why_no_cuda() -> str:
    """One sentence or two: why torch does not use the NVIDIA GPU of this machine, and what to do."""
    version = torch.__version__.partition("+")[0]
    if torch.version.cuda is None:
        return (
            f"this machine has an NVIDIA GPU, but this build of torch ({torch.__version__}) has no CUDA. To use the "
            f"GPU, install another build: pip install torch=={version}+{CUDA_BUILD} --index-url "
            f"https://download.pytorch.org/whl/{CUDA_BUILD} (docs/getting-started.md, With a GPU)."
        )
    return (
        f"this machine has an NVIDIA driver, but torch ({torch.__version__}, for CUDA {torch.version.cuda}) finds no "
        "GPU that it can use. If nvidia-smi lists a GPU, its driver may be too old for this build: update the driver, "
        "or install a build for an older CUDA (docs/getting-started.md, With a GPU)."
    )


def pick_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch type of a name. Raises `UserError` for an unknown name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def without_autocast(device: torch.device) -> torch.autocast:
    """Within the block, `torch.autocast` is off for a device: products are computed in the type of their tensors."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


@contextmanager
def cpu_threads(n: int) -> Iterator[None]:
    """Compute with `n` CPU threads while the block lasts; 0 leaves the choice to torch.

    On small models a step takes milliseconds. Threads that wait for each other at every step gain little, and made a
    run ten times slower on a machine whose cores another program used too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
