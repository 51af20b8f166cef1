"""Start a script once on every GPU of this node, as `accelerate launch` does, and end as it ends.

    python slurm/launch.py toxicity/train_mask.py --model gpt2-xl

SIGUSR1 and SIGTERM are passed on to the script's processes, so that they save their state, and the exit code is theirs
(75: stopped, state saved), where accelerate would end with 1 whatever happened. PROCESSES in the environment starts
another number of them.
"""

import os
import signal
import sys

from circuit_breaking.runs.signals import SIGNALS, Stopped, end_on_signals


def main(words: list[str]) -> int:
    if not words:
        print("usage: python slurm/launch.py SCRIPT [SETTINGS]", file=sys.stderr)
        return 2
    end_on_signals()
    import torch  # after that: it takes seconds

    processes = int(os.environ.get("PROCESSES", torch.cuda.device_count()))
    if processes < 2:
        os.execv(sys.executable, [sys.executable, *words])
    try:
        import psutil
        from accelerate.commands.launch import launch_command, launch_command_parser
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install '.[cluster]'.", file=sys.stderr)
        return 1

    def pass_on(number: int, frame: object) -> None:
        workers = [child for child in psutil.Process().children() if "LOCAL_RANK" in child.environ()]
        for worker in workers:
            worker.send_signal(number)
        if not workers:  # none has started yet
            raise SystemExit(128 + number)

    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT"  # all that torch's launcher may take for itself
    for number in SIGNALS:
        signal.signal(number, pass_on)
    options = {"num_processes": processes, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    options["main_process_port"] = 0  # any that is free: jobs may share the node
    options = [f"--{name}={value}" for name, value in options.items()]
    try:
        launch_command(launch_command_parser().parse_args(["--multi_gpu", *options, *words]))
    except ChildFailedError as error:
        return exit_code({failure.exitcode for failure in error.failures.values()})
    return 0


def exit_code(codes: set[int]) -> int:
    """The exit code of the job by those of its processes, which are negative for processes that a signal ended.

    Where one process ends, torch ends the others by a signal, so a code that a process chose itself counts first.
    """
    if Stopped.exit_code in codes:
        return Stopped.exit_code
    own = [code for code in codes if code > 0]
    return max(own) if own else 128 - min(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
