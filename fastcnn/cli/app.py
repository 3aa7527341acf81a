"""All commands under one name. Whatever takes long to import is imported by the command that needs it."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

import fastcnn

from .check import check
from .data import data
from .evaluate import evaluate
from .info import info
from .output import fail
from .predict import predict
from .train import train
from .warmup import warmup

app = typer.Typer(
    name="fastcnn",
    help="Train and run convolutional networks on a CPU.",
    epilog="Begin with: fastcnn train",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (train, evaluate, predict, check, warmup, info):
    app.command()(_command)
app.add_typer(data, name="data")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastcnn {fastcnn.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command; its exit code is 0, 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    words = sys.argv[1:] if arguments is None else arguments
    # A file name or a class that the terminal can't show must not end a run.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if "--json" not in words:
        app(args=words, prog_name="fastcnn")
    try:
        code = app(args=words, prog_name="fastcnn", standalone_mode=False)
    except Exception as error:
        raise SystemExit(_usage_error(error)) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def _usage_error(error: Any) -> int:
    """Tell a program what was wrong with its arguments, as JSON; let everything else through."""
    if not hasattr(error, "format_message"):
        raise error
    return fail(error.format_message(), as_json=True, code=error.exit_code).exit_code
