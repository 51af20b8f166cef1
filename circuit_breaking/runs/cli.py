"""How a script starts: settings from its dataclass, one clear sentence when something is wrong (layer 0)."""

import re
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from circuit_breaking.errors import UserError
from circuit_breaking.runs.distributed import launched

T = TypeVar("T")


def run_script(main: Callable[[T], object], settings_class: type[T], parallel: bool = False) -> None:
    """Read `settings_class` from the command line and call `main` with it.

    A `UserError` ends the script with its sentence on stderr and its exit code, 1 as a rule; any other exception is a
    defect of ours and keeps its traceback. Ctrl-C ends with exit code 130, as shells expect.

    Only a script that is `parallel` may be launched as several processes.
    """
    rank, processes = launched()
    about = sys.modules[main.__module__].__doc__ or ""
    # the help text reflows lines: keep those that say what is read, written and how long it takes apart
    about = re.sub(r"\n(?=(Reads|Writes|Time) )", "\n\n", about)
    settings = tyro.cli(settings_class, description=about)
    try:
        if processes > 1 and not parallel:
            raise UserError("this script runs as one process. Start it with python alone, without a launcher.")
        main(settings)
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        elif error.exit_code == UserError.exit_code:  # with any other all end alike, which is said once
            print(f"error in process {rank}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
