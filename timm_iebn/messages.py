"""What errors say."""


def shorten(message: object) -> str:
    """One paragraph of a message, of 500 characters at most: damaged files bring values of any length."""
    text = " ".join(str(message).split())
    return text if len(text) <= 500 else f"{text[:490]} [...]"


def describe(error: BaseException) -> str:
    """Its type and message, in one paragraph."""
    return f"{type(error).__name__}: {shorten(error) or 'no details'}"
