"""Where text goes. File contents are shown as they are: no markup, no emoji, no control codes of theirs."""

import sys
from typing import TextIO

from rich.console import Console

WIDTH = 160  # where no terminal says how wide it is, nothing needs to be cut


def output() -> Console:
    """Return the console of results."""
    return _console(sys.stdout)


def notes() -> Console:
    """Return the console of remarks, which must not mix with results in a pipe."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    width = None if stream.isatty() else WIDTH
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False, soft_wrap=False)
