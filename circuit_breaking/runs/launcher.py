"""How many processes a launcher started, read from the environment alone: it can be asked before torch loads."""

import os


def launched() -> tuple[int, int]:
    """The number of this process, from 0, and how many `accelerate launch` or torchrun started; (0, 1) without them."""
    if "LOCAL_RANK" not in os.environ:
        return 0, 1
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
