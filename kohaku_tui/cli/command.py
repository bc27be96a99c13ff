"""What every command of ``kohaku`` refuses, whatever it does.

Knows: that an option whose value is empty, as of a script's unset variable, is not what was meant.
Does not know: any option.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from protocol.errors import BadRequest


class Command(TyperCommand):
    """A command of which no option takes an empty value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, and refuse what is empty before it is read as a number, a path or as not said.

        Raises:
            BadRequest: An option is empty; the message names it.
        """
        if not ctx.resilient_parsing:
            said, _, _ = self.make_parser(ctx).parse_args(args=list(args))
            for param in self.get_params(ctx):
                value = said.get(str(param.name))
                if param.param_type_name == "option" and _has_empty(value):
                    raise BadRequest(
                        f"{param.opts[0]} is empty", hint="give it a value, or leave it out"
                    )
        return super().parse_args(ctx, args)


def _has_empty(value: object) -> bool:
    """Say whether the words given to an option, one or as often as it was repeated, have none."""
    words = value if isinstance(value, list) else [value]
    return any(isinstance(word, str) and not word.strip() for word in words)
