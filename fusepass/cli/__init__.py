"""The command line, `python -m fusepass` or `fusepass`. A command is one function in a file of its own beside this one.

What the commands need is no requirement of the package: pip install fusepass[cli], fusepass[bench].
"""

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import typer


def fail(message: str) -> NoReturn:
    """Leave with one line and exit code 2: nothing was done."""
    print(f"fusepass: {message}", file=sys.stderr)
    sys.exit(2)


def require(*packages: str, extra: str) -> None:
    """Leave with one line that says what to install, unless every package is there."""
    if missing := [name for name in packages if find_spec(name) is None]:
        fail(f"needs {', '.join(missing)}: pip install fusepass[{extra}]")


def build() -> "typer.Typer":
    """The application with all its commands."""
    import typer

    from fusepass.cli import bench, explain
    from fusepass.cli.command import ListCommand
    from fusepass.cli.env import env
    from fusepass.cli.fusions import fusions

    app = typer.Typer(
        name="fusepass",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )

    @app.callback(help="A torch.compile backend that runs Hugging Face models on fused Triton kernels.")
    def root() -> None: ...

    app.command(epilog=explain.EPILOG)(explain.explain)
    app.command()(fusions)
    app.command()(env)
    app.command(cls=ListCommand, epilog=bench.EPILOG)(bench.bench)
    return app


def main() -> None:
    """Run the command that sys.argv names."""
    require("typer", extra="cli")
    build()()
