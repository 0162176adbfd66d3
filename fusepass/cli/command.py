"""What the commands share."""

from typing import Any

from typer.core import TyperCommand


class ListCommand(TyperCommand):
    """A command whose repeatable options take several values at once: `--batch 1 8` is `--batch 1 --batch 8`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        lists = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        spread: list[str] = []
        option = None
        for i, arg in enumerate(args):
            if arg.startswith("-"):
                option = arg if arg in lists else None
            elif option is not None and args[i - 1] != option:
                spread.append(option)
            spread.append(arg)
        return super().parse_args(ctx, spread)
