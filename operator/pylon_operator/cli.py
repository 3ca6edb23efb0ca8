"""`pylon`: finds a command, imports it only then, and says which extra to install when it cannot.

Commands of this package are modules of `commands`; another package adds its own through the entry-point group
`pylon.commands`. Nothing heavy is imported here, so that `pylon validate` answers at once.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version

DISTRIBUTION = "pylon-training"

try:
    import click
except ModuleNotFoundError:
    sys.exit(f"pylon: the command line needs an extra: pip install '{DISTRIBUTION}[operator]'")

COMMANDS = {
    "crds": "Write or check the CRD generated from the models.",
    "operator": "Run the operator.",
    "render": "Print the Kubernetes objects of a job.",
    "run": "Run a job on this machine.",
    "validate": "Check manifests, one line for each mistake.",
}
"""This package's commands, each with its line in the help, which must not need the command's imports."""


class LazyGroup(click.Group):
    """A group that imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """Names of all commands, ours and those added."""
        return sorted({*COMMANDS, *plugins()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  click's signature
        """The command itself. Raises ClickException when something that it needs is not installed."""
        try:
            if cmd_name in COMMANDS:
                module = importlib.import_module(f"pylon_operator.commands.{cmd_name}")
                command: click.Command = module.command
                return command
            plugin = plugins().get(cmd_name)
            return plugin.load() if plugin else None
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing in ("pylon_api", "pylon_operator", "pylon_trainer"):
                raise
            extra = "operator" if cmd_name in COMMANDS else "trainer"
            raise click.ClickException(
                f"`pylon {cmd_name}` needs {missing}, which is not installed: pip install '{DISTRIBUTION}[{extra}]'"
            ) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  click's signature
        """The list in the help, without importing any of them."""
        added = {name: f"Added by {plugin.module.partition('.')[0]}." for name, plugin in plugins().items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted((added | COMMANDS).items()))


def plugins() -> dict[str, EntryPoint]:
    """Commands that other packages add, by name."""
    return {plugin.name: plugin for plugin in entry_points(group="pylon.commands")}


def print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Prints the version of the installed distribution and ends."""
    if not wanted or ctx.resilient_parsing:
        return
    try:
        click.echo(f"pylon {version(DISTRIBUTION)}")
    except PackageNotFoundError:
        click.echo("pylon, run from its sources")
    ctx.exit()


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=print_version, help="Show the version."
)
def main() -> None:
    """Training jobs on Kubernetes, and on this machine."""


if __name__ == "__main__":
    main()
