"""`gristmill kernels`."""

from gristmill.cli.console import output


def kernels() -> None:
    """Show which instruction set serves each kernel on this machine, and why."""
    from rich.table import Table

    import gristmill as gm

    table = Table("slot", "variant", "why")
    for slot, kernel in gm.kernels().items():
        table.add_row(slot, kernel.variant, kernel.why)
    output().print(table)
