"""Errors that a user can cause. Their message says what was wrong and what to do; the command line prints it as one line."""


class UserError(Exception):
    """Bad input: a wrong path, key, shape or file. Never a bug of ours."""


def nearest(name: str, known: list[str]) -> str:
    """A hint for a mistyped name: `; did you mean 'x'?`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
