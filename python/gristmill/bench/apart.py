"""Command lines of processes that hold one engine and nothing else.

`STAND_IN` replaces the package, whose own import loads our C library: any interpreter, with or without Gristmill, can then run a
rival by the files of `gristmill.bench` alone.
"""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
STAND_IN = "package = types.ModuleType('gristmill'); package.__path__ = [sys.argv[1]]; sys.modules['gristmill'] = package; "


def command(python: str, ours: bool, run: str, *arguments: str, before: str = "") -> tuple[str, ...]:
    """Return the command that runs the statement `run`, with `arguments` from sys.argv[2] on, after the statements `before`."""
    stand_in = "" if ours else STAND_IN
    return (python, "-W", "ignore", "-c", f"import runpy, sys, time, types; {before}{stand_in}{run}", str(PACKAGE), *arguments)
