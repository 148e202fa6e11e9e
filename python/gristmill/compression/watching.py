"""A bar on the terminal for work of many equal parts."""

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def watched(items: Sequence[T], what: str, shown: bool | None) -> Iterator[T]:
    """Yield items and show on stderr how many are done.

    Args:
        items: the parts of the work.
        what: the work.
        shown: True, False, or None for: where stderr is a terminal.
    """
    wanted = (sys.stderr is not None and sys.stderr.isatty()) if shown is None else shown
    if not wanted or len(items) < 2:
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=len(items))
        for item in items:
            yield item
            bar.advance(task)
