"""The command line. One file per subcommand, each a thin call; what computes is imported when a command runs."""

from gristmill.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line and exit: 0 for success, 1 for an error, 2 for bad options, 3 for a failed gate, 130 after Ctrl-C."""
    app()
