"""The command line: one file a verb. Heavy imports happen inside the verbs, so that `ssmlens --help` answers at once."""

import os
import sys
import warnings
from typing import Any


def main() -> None:
    """Entry point: UserError, interrupts and unwritable files become one line on stderr and an exit code, never a traceback.

    Exit codes: 0 done, 1 a file or device failed, 2 bad input, 130 interrupted (what was finished is kept)."""
    import typer

    from ssmlens.cli.app import app
    from ssmlens.errors import UserError

    warnings.showwarning = _warn
    try:
        code = app(standalone_mode=False)
    except UserError as e:
        _fail(str(e), 2)
    except KeyboardInterrupt:
        _fail("interrupted; what was finished is kept", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away: nobody to tell
        sys.exit(1)
    except OSError as e:
        _fail(f"{e.filename or 'file'}: {e.strerror or e}", 1)
    except Exception as e:
        usage = getattr(e, "exit_code", None)  # typer's own errors: unknown option, missing argument
        if usage is None:
            raise
        if type(e).__name__ == "Abort":
            _fail("interrupted; what was finished is kept", 130)
        typer.echo(f"error: {getattr(e, 'format_message', lambda: str(e))()}; see ssmlens --help", err=True)
        sys.exit(usage)
    if code == 130:  # typer has caught the Ctrl-C itself
        _fail("interrupted; what was finished is kept", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """A warning of ours as one line, without the place in the source; other libraries' are not for users of a command."""
    if issubclass(category, RuntimeWarning):
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
