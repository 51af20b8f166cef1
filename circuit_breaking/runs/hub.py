"""Whether the Hugging Face hub can be reached, asked once and in bounded time."""

from functools import lru_cache
from threading import Event, Thread

HUB_WAIT = 5.0  # seconds; without a network, the hub's own client would retry for a minute


@lru_cache
def hub_answers() -> bool:
    """Whether the hub answers within `HUB_WAIT` seconds; False in offline mode (`HF_HUB_OFFLINE`)."""
    from huggingface_hub import constants  # slow to import

    return not constants.HF_HUB_OFFLINE and answers(constants.ENDPOINT, HUB_WAIT)


def answers(url: str, wait: float) -> bool:
    """Whether a server answers the hub's client within `wait` seconds. An error status is an answer too."""
    from huggingface_hub import get_session

    answered = Event()

    def ask() -> None:
        try:
            get_session().head(url, timeout=wait)
        except Exception:
            return  # every kind of failure means the same here
        answered.set()

    thread = Thread(target=ask, daemon=True)  # in a thread, because looking up a host's name has no time limit
    thread.start()
    thread.join(wait)
    return answered.is_set()
