"""The error that a person can put right, and how its sentence is made. Imports nothing of the package."""


class UserError(Exception):
    """Something that the person at the keyboard can put right. The message says what was wrong and what to do."""

    exit_code = 1


def first_line(error: Exception) -> str:
    """The first line of an exception's message, its type where it has none: for a sentence of our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException, most: int = 300) -> str:
    """An exception's message with its lines run together, cut after `most` characters; its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + " ..."
