"""What the command lines of all daemons have in common: how options are read, and how a user's mistake is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from narses.errors import ConfigError, DataError, NarsesError

EXIT_FAILURE = 1
EXIT_CONFIG = 2

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML file with the configuration.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value; may be repeated.", show_default=False),
]
CheckOption = Annotated[bool, typer.Option("--check", help="Validate the configuration, say so, and exit.")]


def new_app(help_: str) -> typer.Typer:
    """A typer application in the house style: no completion commands, no tracebacks with local variables."""
    return typer.Typer(
        help=help_, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=False, rich_markup_mode=None
    )


def launch(app: typer.Typer) -> NoReturn:
    """Run `app`; a NarsesError becomes one sentence on stderr and exit code 2 (configuration, data) or 1 (the rest)."""
    try:
        app()
    except (ConfigError, DataError) as error:
        _tell(error)
        sys.exit(EXIT_CONFIG)
    except NarsesError as error:
        _tell(error)
        sys.exit(EXIT_FAILURE)
    sys.exit(0)


def _tell(error: NarsesError) -> None:
    sys.stderr.write(f"error: {error}\n")
