"""How many processes a launcher started, read from the environment alone: it can be asked before torch loads."""

import os

from circuit_breaking.errors import UserError


def launched() -> tuple[int, int]:
    """The number of this process, from 0, and how many `accelerate launch` or torchrun started; (0, 1) without them.

    Raises:
        UserError: a variable of the launcher is not a number.
    """
    if not os.environ.get("LOCAL_RANK"):  # an empty variable is one that is not set
        return 0, 1
    return _number("RANK", 0), _number("WORLD_SIZE", 1)


def rank() -> int:
    """The number of this process, and 0 where `launched` refuses the environment: for messages of any kind."""
    try:
        return launched()[0]
    except UserError:
        return 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(
            f"{name} is {text!r} in the environment, where a launcher sets a number. Unset it and LOCAL_RANK, or start "
            "the script with `accelerate launch`."
        )
    return int(text)
