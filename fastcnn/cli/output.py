"""Where a command's words go: text for people, one JSON object for programs, errors in one line."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import typer

Command = TypeVar("Command", bound=Callable[..., Any])

FAILED = 1
INTERRUPTED = 130


class CommandError(Exception):
    """Something the user can put right; the message says what and how."""


class Interrupted(Exception):
    """The user pressed Ctrl-C and everything worth keeping has been saved; the message says where.

    `details` go into the JSON object.
    """

    def __init__(self, message: str, details: dict[str, Any]):
        super().__init__(message)
        self.details = details


class Output:
    """Text on stdout or, with ``--json``, on stderr, so that stdout holds the JSON object alone.

    Parameters
    ----------
    as_json : bool
        Whether the command was called with ``--json``.
    """

    def __init__(self, as_json: bool):
        self.as_json = as_json

    @property
    def stream(self) -> IO[str]:
        """Where text goes."""
        return sys.stderr if self.as_json else sys.stdout

    @property
    def live(self) -> bool:
        """Whether somebody watches a terminal that can redraw a line."""
        return self.stream.isatty() and os.environ.get("TERM") != "dumb"

    def say(self, text: object = "") -> None:
        """Print a line of text at once, also into a pipe."""
        print(text, file=self.stream, flush=True)

    def console(self) -> Any:
        """A rich console on the same stream."""
        from rich.console import Console

        return Console(file=self.stream, highlight=False, soft_wrap=True)

    def result(self, content: dict[str, Any]) -> None:
        """Print the command's JSON object; does nothing without ``--json``."""
        if self.as_json:
            print(to_json(content), flush=True)


def to_json(content: Any) -> str:
    """`content` as standard JSON on one line; numbers that JSON lacks (NaN, infinity) become null."""
    return json.dumps(_finite(content), ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def fail(message: str, as_json: bool, code: int = FAILED, **details: Any) -> typer.Exit:
    """Report an error, and return the exception that ends the command with `code`."""
    if as_json:
        print(to_json({"error": message} | details), flush=True)
    else:
        label = "interrupted" if code == INTERRUPTED else "error"
        print(f"{label}: {message}", file=sys.stderr, flush=True)
    return typer.Exit(code)


def guarded(command: Command) -> Command:
    """Turn a command's exceptions into a message and an exit code; ``FASTCNN_DEBUG=1`` lets them through."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        as_json = bool(kwargs.get("json"))
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            raise fail("by Ctrl-C", as_json, INTERRUPTED, interrupted=True) from None
        except Interrupted as stop:
            raise fail(str(stop), as_json, INTERRUPTED, **stop.details) from None
        except Exception as error:
            if _reader_has_left(error) or os.environ.get("FASTCNN_DEBUG", "") not in ("", "0"):
                raise
            raise fail(describe(error), as_json) from None

    return run  # type: ignore[return-value]


def _reader_has_left(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def describe(error: Exception) -> str:
    """What an exception says to a user, without a traceback."""
    if isinstance(error, MemoryError):
        return (
            f"out of memory ({error}); a smaller --batch-size needs less" if str(error) else "out of memory"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    message = " ".join(str(error).split())
    if isinstance(error, (CommandError, ValueError, OSError, RuntimeError, ArithmeticError)) and message:
        return message
    # Not the user's doing: name the kind, and how to see more.
    return f"{type(error).__name__}: {message} (FASTCNN_DEBUG=1 shows where)"


def command_line(*words: str) -> str:
    """A call of this command that works when it is pasted into the shell from which this one came."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        program = [Path(sys.executable).name, "-m", "fastcnn"]
    elif called.name.startswith("fastcnn") and shutil.which("fastcnn") is None and called.exists():
        program = [os.path.relpath(called)]
    else:
        program = ["fastcnn"]
    return shlex.join([*program, *words])
