"""What a user did wrong, in one line."""


class UserError(ValueError):
    """A mistake of the user's; the message is one line that says what to do about it."""


def one_line(error: Exception) -> str:
    """The message of any exception without line breaks; the libraries' own can run over several."""
    return " ".join(str(error).split()) or type(error).__name__


def shown(value: object) -> str:
    """A value as an error names it: its first 100 characters, since a message to a server can hold whole pictures."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}.."
