"""How a script starts: its settings are read from the command line, and an error is one clear sentence.

A script has three parts, in this order, so that `--help` and wrong settings end it before torch is loaded:

    @dataclass
    class Settings(ModelSettings, RunSettings): ...

    if __name__ == "__main__":
        settings = read_settings(Settings)

    import torch  # and everything else that takes seconds to load

    def main(settings: Settings) -> None: ...

    if __name__ == "__main__":
        run_script(main, settings)

A settings class inherits blocks of settings that scripts share. `--help` shows the settings named in its `MOST_USED`
first, then its other settings, then each block under the block's `TITLE`. The comment behind a setting is its help.
"""

import ast
import inspect
import os
import re
import shutil
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, field, fields, make_dataclass
from functools import cache
from io import StringIO
from typing import Annotated, Any, TypeVar, get_type_hints

from circuit_breaking.errors import UserError
from circuit_breaking.runs.config import check_device
from circuit_breaking.runs.launcher import launched, rank
from circuit_breaking.runs.start import start

T = TypeVar("T")
FIRST, OWN = "most used", "other"  # groups of settings in `--help`


def read_settings(settings_class: type[T], parallel: bool = False, args: Sequence[str] | None = None) -> T:
    """Settings from the command line, or from `args`; `--help` and settings that are wrong end the script.

    In a file that runs as a script, this is the first call, and prepares its process too (`start.start`).

    Args:
        settings_class: a dataclass with a default for each setting. If it has a method `check`, that is called.
        parallel: whether the script may be launched as several processes.
        args: what to read in place of the command line.
    """
    with one_sentence():
        if settings_class.__module__ == "__main__":
            start(inspect.getfile(settings_class))
        if launched()[1] > 1 and not parallel:
            raise UserError("this script runs as one process. Start it with python alone, without a launcher.")
        settings = _parse(settings_class, args)
        if isinstance(getattr(settings, "device", None), str):
            check_device(settings.device)
        if hasattr(settings, "check"):
            settings.check()
    return settings


def run_script(main: Callable[[T], object], settings: T) -> None:
    """Call `main`; a `UserError` and Ctrl-C end the script as `one_sentence` says.

    Args:
        main: the work of the script.
        settings: its settings. If they have a `device`, the script says once where it computes (`saying_device`).
    """
    with one_sentence():
        if not hasattr(settings, "device"):
            main(settings)
            return
        from circuit_breaking.runs.devices import saying_device  # loads torch, as the script has done by now

        with saying_device():
            main(settings)


@contextmanager
def one_sentence() -> Iterator[None]:
    """End the process at a `UserError` with its sentence on stderr and its exit code, which is 1 as a rule.

    Any other exception is a defect of ours and keeps its traceback. Ctrl-C ends with exit code 130, as shells expect.
    """
    try:
        yield
    except UserError as error:
        if (number := rank()) == 0:
            print(f"error: {error}", file=sys.stderr)
        elif error.exit_code == UserError.exit_code:  # any other code is that of all processes, and is printed once
            print(f"error in process {number}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _parse(settings_class: type[T], args: Sequence[str] | None) -> T:
    """`tyro.cli`, with a group in `--help` for each block of settings.

    tyro makes a group of each nested dataclass, so the flat settings are read by a dataclass of dataclasses, whose
    fields keep their short names on the command line.
    """
    import tyro  # here, so that a script starts with `start.start`, before any library is imported

    groups: dict[str, list[Any]] = {}
    for one in sorted(fields(settings_class), key=lambda one: _rank(settings_class, one.name)):
        groups.setdefault(_group(settings_class, one.name), []).append(_leaf(settings_class, one))
    nested = []
    for number, (title, leaves) in enumerate(groups.items()):
        block = make_dataclass(f"Block{number}", leaves, kw_only=True)
        block.__doc__ = " "  # else tyro would show the one that a dataclass makes itself
        nested.append((f"block{number}", Annotated[block, tyro.conf.arg(name=title)]))
    options = make_dataclass("Options", nested)
    if {"-h", "--help"} & set(sys.argv[1:] if args is None else args):
        about = sys.modules[settings_class.__module__].__doc__ or ""
        with _reader_may_leave():
            print(wrapped(about.strip(), shutil.get_terminal_size().columns) + "\n")
            tyro.cli(options, args=args)
    found = tyro.cli(options, args=args)
    blocks = [getattr(found, one.name) for one in fields(found)]
    return settings_class(**{one.name: getattr(block, one.name) for block in blocks for one in fields(block)})


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """End the process without a message if the reader of its output stops early, as `head` does."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python writes a message when it exits
        sys.exit(0)


def wrapped(text: str, width: int) -> str:
    """A docstring in lines of at most `width` characters; unchanged if it has such lines already.

    A new line stays one at the beginning of a paragraph, of "Reads", "Writes" or "Time", and of an indented line.
    """
    if max(map(len, text.splitlines()), default=0) <= width:
        return text
    parts = re.split(r"\n(?=\n|(?:Reads|Writes|Time) |    \S)", text)
    lines = []
    for part in parts:
        first, *rest = part.strip("\n").splitlines() or [""]
        line = " ".join([first, *(one.strip() for one in rest)])
        indent = " " * 8 if re.match(r"(Reads|Writes|Time) |    ", first) else ""
        filled = textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False)
        lines.append("\n" * part.startswith("\n") + filled)
    return "\n".join(lines)


def _leaf(settings_class: type, one: Field) -> tuple[str, Any, Any]:
    """(name, type, default) of a setting for `make_dataclass`, with its comment as help."""
    import tyro

    help_text = help_of(settings_class, one.name)
    own_type = get_type_hints(settings_class, include_extras=True)[one.name]
    marked = Annotated[own_type, tyro.conf.arg(help=help_text, prefix_name=False)]
    default = field(default_factory=one.default_factory) if one.default_factory is not MISSING else one.default
    return (one.name, marked) if default is MISSING else (one.name, marked, default)


def help_of(settings_class: type, name: str) -> str | None:
    """The help of a setting: the comment behind it in the class, or in the first of its blocks that has one."""
    return next((found for cls in settings_class.__mro__ if (found := _comments(cls).get(name))), None)


def _rank(settings_class: type, name: str) -> tuple[int, int]:
    """Where a setting stands in `--help`: the most used ones, then its own, then each block's."""
    first = getattr(settings_class, "MOST_USED", ())
    if name in first:
        return -1, first.index(name)
    return settings_class.__mro__.index(_declared_by(settings_class, name)), 0


def _group(settings_class: type, name: str) -> str:
    if name in getattr(settings_class, "MOST_USED", ()):
        return FIRST
    block = _declared_by(settings_class, name)
    return OWN if block is settings_class else getattr(block, "TITLE", OWN)


def _declared_by(settings_class: type, name: str) -> type:
    """The block that a setting belongs to: the most general class that has it."""
    return [cls for cls in settings_class.__mro__ if name in vars(cls).get("__annotations__", {})][-1]


@cache
def _comments(cls: type) -> dict[str, str]:
    """The comments behind the fields of a class, by field; a field may extend over several lines."""
    if cls.__module__ == "builtins":
        return {}
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for one in ast.parse(source).body[0].body:
        if isinstance(one, ast.AnnAssign):
            lines = range(one.lineno, one.end_lineno + 1)
            found[one.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found
