"""Progress of long work: a bar on a terminal, and a line of text per minute in a log file."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 60  # between two lines in a log file; shorter work leaves none
LOG_LINE = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left{postfix}"


def progress_bar(iterable: Iterable | None = None, *, shown: bool = True, **options: Any) -> tqdm:
    """A `tqdm` bar on stderr, if that is a terminal; lines without control characters if it is a file or a pipe.

    Args:
        iterable: what to iterate over; None for a bar that is moved on by `update`.
        shown: False shows nothing.
        options: of `tqdm`, such as `total`, `desc` and `unit` (in the singular).
    """
    if not shown:
        return tqdm(iterable, disable=True, **options)
    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    return _LogLines(iterable, mininterval=LOG_SECONDS, delay=LOG_SECONDS, miniters=1, bar_format=LOG_LINE, **options)


class _LogLines(tqdm):
    """A bar that writes a new line each time, in place of drawing over the last one."""

    @staticmethod
    def status_printer(file: Any) -> Any:
        def write(text: str) -> None:
            if text:
                file.write(f"{text}\n")
                file.flush()

        return write

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        super().set_postfix_str(s, refresh=False)  # it is shown with the next line

    def moveto(self, n: int) -> None:
        """Stay on the present line, where `tqdm` would move the cursor to the line of a nested bar."""

    def close(self) -> None:
        """Write nothing more: the script prints what the work came to."""
        if not self.disable:
            self.disable = True
            self._decr_instances(self)
