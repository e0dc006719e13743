"""The command line. A command parses, calls one function, and prints: results on stdout, talk on stderr."""

from __future__ import annotations

import sys

import typer

from persona_axis.errors import PersonaAxisError

INTERRUPTED = 130

app = typer.Typer(
    name="persona-axis",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Find the Assistant Axis of a chat model, see persona drift along it, steer it, hold it.",
)


def main() -> None:
    """Entry point: a user's mistake is one message and an exit code; a bug keeps its traceback."""
    from persona_axis.cli import (  # noqa: F401  (registers the commands)
        calibrate,
        catalog,
        chat,
        convert,
        hub,
        judge,
        read,
        run,
        serve,
        steer,
    )

    try:
        code = app(standalone_mode=False)  # Typer makes 130 of Ctrl-C and returns it
    except PersonaAxisError as e:
        typer.echo(f"persona-axis: {e}", err=True)
        sys.exit(e.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except typer.TyperException as e:  # a wrong option, in Typer's own words where it has some
        show = getattr(e, "show", None)
        if show is not None:
            show()
        else:
            typer.echo(f"persona-axis: {e}", err=True)
        sys.exit(2)
    if code == INTERRUPTED:
        typer.echo("\npersona-axis: interrupted; finished work is kept, the same command goes on from here.", err=True)
    if code:
        sys.exit(code)
