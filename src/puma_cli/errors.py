"""What a user did wrong, in one line."""


class UserError(ValueError):
    """A mistake of the user's; the message is one line that says what to do about it."""


def one_line(error: Exception) -> str:
    """The message of any exception without line breaks; the libraries' own can run over several."""
    return " ".join(str(error).split()) or type(error).__name__
