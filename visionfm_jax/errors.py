"""Errors that a person can act on, and the exit codes that schedulers understand.

Every error of this module is one line for the user: what is wrong, with which value, and what to do.
The entry points (`main`, `bench`, …) print that line and exit with the class's code; anything else is a bug
and keeps its traceback.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something outside the program is wrong: a value, a path, a file. Exit code 2: do not requeue."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration that breaks a rule; raised before any work starts."""


class DataError(UserError):
    """A dataset that cannot be read, or holds other things than the configuration says."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read, or does not belong to this model."""

    exit_code = 74  # EX_IOERR


class OutputError(UserError):
    """A file of the run folder cannot be written, as the disk is full or gone. Exit code 74: ask a person."""

    exit_code = 74


class TrainingError(UserError):
    """Training itself went wrong: a loss or gradient is not finite. Exit code 4: a person should look."""

    exit_code = 4


class LostError(UserError):
    """A process is stuck, gone or never came. Exit code 71: the machine is at fault, start the same command again."""

    exit_code = 71  # EX_OSERR


class StorageError(UserError):
    """Storage failed for longer than the retries last. Exit code 71: start the same command again."""

    exit_code = 71


LEFT_OUT = 3  # all else is written, and what was left out is named.
PREEMPTED = 75  # EX_TEMPFAIL: the state is saved; a scheduler should start the same command again.
INTERRUPTED = 130  # as shells report Ctrl-C


def entry_point(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a program's `main` so that errors for people are one line on stderr and an exit code."""

    @functools.wraps(main)
    def run(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            complain(f"error: {error}")
            return error.exit_code
        except KeyboardInterrupt:
            complain("interrupted")
            return INTERRUPTED

    return run


def complain(text: str) -> None:
    """Write a line for people on stderr, behind the name that the program was called by."""
    program = "visionfm" if os.path.basename((sys.argv or [""])[0]) == "visionfm" else "visionfm_jax"
    lines = map(shortened, printable(text, kept="\n").split("\n"))
    print(f"{program}: " + "\n".join(lines), file=sys.stderr, flush=True)


def shortened(line: str, most: int = 4000) -> str:
    """The beginning of a line of more than `most` characters, which names of others may fill, and its end."""
    return line if len(line) <= most else f"{line[: most - 1000]} … ({len(line):,} characters) … {line[-1000:]}"


def printable(text: str, kept: str = "") -> str:
    """A text without what a terminal would obey, but for the characters `kept`: names of others come up in errors."""
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


def count(number: int, noun: str) -> str:
    """ "1 step", "1,000 steps"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def one_line(error: BaseException, most: int | None = 200) -> str:
    """The beginning of what an error says, which may have hundreds of lines; None: all of it."""
    return " ".join(str(error).split())[:most] or type(error).__name__
