"""`lrc env`."""

from lrc.cli.console import console
from lrc.cli.results import prints_results


@prints_results
def env() -> None:
    """Show versions and machine, for a bug report.

    Examples:

    * `lrc env`
    * `lrc env --json`
    """
    from lrc.system.environment import describe_environment
    from lrc.system.tables import Table

    found = describe_environment()
    table = Table(["", "version or value"])
    for name, version in found["packages"].items():
        table.add_row(name, version or "not installed")
    for name, value in found.items():
        if name != "packages":
            shown = ", ".join(value) if isinstance(value, list) else value
            table.add_row(name.replace("_", " "), str(shown or "none"))
    console.result(found, table)
