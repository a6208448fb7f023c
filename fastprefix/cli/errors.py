"""Everything that goes wrong becomes one line on standard error and an exit code.

1: what was asked for cannot be done. 2: the command line itself is wrong. 130: Ctrl-C. No line
holds an errno. ``FASTPREFIX_TRACEBACK=1`` shows where the library's own errors were raised instead.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from fastprefix.training.messages import reason

# Newer releases of typer contain their own click; older ones use the installed click.
_UsageError: Any = typer.BadParameter.__base__
_LONGEST = 1000  # characters in a line; some libraries list every name they know


class Commands(TyperGroup):
    """The sub-commands, whose errors end in one line."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs a command line. The only exception it raises itself is ``SystemExit``."""
        extra |= {"prog_name": prog_name, "complete_var": complete_var}
        extra |= {"windows_expand_args": windows_expand_args, "standalone_mode": False}
        if not standalone_mode:
            return super().main(args, **extra)
        arguments = list(sys.argv[1:] if args is None else args)
        for stream in (sys.stdout, sys.stderr):  # for characters that the terminal lacks
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            done = super().main(arguments or ["--help"], **extra)
            code = done if isinstance(done, int) else 0
        except _UsageError as error:
            code = complain(_usage(error, arguments), 2)
        except (typer.Abort, KeyboardInterrupt):
            code = complain("interrupted", 130)
        except BrokenPipeError:  # the reader of the pipe has closed it, so nobody sees a message
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 1
        except Exception as error:
            if not isinstance(error, _expected()) or os.environ.get("FASTPREFIX_TRACEBACK"):
                raise
            code = complain(reason(error), 1)
        sys.exit(code)

    def invoke(self, ctx: Any) -> Any:
        """Distinguishes Ctrl-C from a command that exits by itself."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Abort from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """A command by its name; an unknown name is an error that suggests the nearest one."""
        names = self.list_commands(ctx)
        if args[0] not in names:
            near = difflib.get_close_matches(args[0], names)
            raise typer.BadParameter(
                f"command: got {args[0]!r}, takes one of {', '.join(names)}{_meant(near)}", ctx=ctx
            )
        return super().resolve_command(ctx, args)


def complain(message: str, code: int) -> int:
    """Prints one line and returns the exit code."""
    line = " ".join(message.split())
    if len(line) > _LONGEST:
        line = line[:_LONGEST] + " ..."
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    typer.echo(typer.style("error:", fg="red", bold=True) + " " + line, err=True)
    return code


@contextlib.contextmanager
def blaming(argument: str) -> Iterator[None]:
    """Puts the argument's name in front of errors raised while its value is read or written."""
    try:
        yield
    except _expected() as error:
        raise ValueError(f"{argument}: {reason(error)}") from error


def _expected() -> tuple[type[Exception], ...]:
    """The exceptions that fastprefix and its dependencies raise for a wrong input."""
    from safetensors import SafetensorError

    expected: tuple[type[Exception], ...] = (
        *(ValueError, TypeError, OSError, ImportError, NotImplementedError, RuntimeError),
        *(MemoryError, OverflowError, SafetensorError),
    )
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.errors import HfHubHTTPError

        expected += (HfHubHTTPError,)
    return expected


def _usage(error: Any, arguments: Sequence[str]) -> str:
    """A wrong command line in the grammar of the library's errors."""
    param: Any = getattr(error, "param", None)
    option: Any = getattr(error, "option_name", None)
    where = f" ({error.ctx.command_path} --help)" if error.ctx is not None else ""
    possible = getattr(error, "possibilities", None)
    if type(error).__name__ == "MissingParameter" and param is not None:
        return f"{_name(param)}: got nothing, takes {_takes(param) or 'a value'}{where}"
    if type(error).__name__ == "NoSuchOption":
        dash = "; a text that begins with a dash goes behind --" * option[1:2].isdigit()
        return f"{option}: no such option{_meant(sorted(possible or ()))}{dash}{where}"
    if option is not None:  # of a flag, or of an option at the end of the line
        given = "does not take a value" in error.message
        return (
            f"{option}: got {'a value, takes none' if given else 'nothing, takes a value'}{where}"
        )
    if param is None:
        return f"{error.message[0].lower()}{error.message[1:].rstrip('.')}{where}"
    typed, takes = _typed(param, arguments), _takes(param)
    if typed is None or takes is None:
        return f"{_name(param)}: {error.message.rstrip('.')}{where}"
    return f"{_name(param)}: got {typed!r}, takes {takes}{where}"


def _meant(near: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _name(param: Any) -> str:
    return next((name for name in param.opts if name.startswith("--")), param.name)


def _typed(param: Any, arguments: Sequence[str]) -> str | None:
    """The value given to an option, as typed; None if only the parser knows it."""
    found = []
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in param.opts and equals:
            found.append(value)
        elif argument in param.opts and place + 1 < len(arguments):
            found.append(arguments[place + 1])
    return ", ".join(found) if found else None


def _takes(param: Any) -> str | None:
    """What an option accepts, according to its declaration; None if that does not say."""
    kind = getattr(param, "type_descriptor", None) or param.type
    choices = getattr(kind, "choices", None)
    if choices:
        return f"one of {', '.join(str(getattr(choice, 'value', choice)) for choice in choices)}"
    about = str(getattr(kind, "annotation", "")) + getattr(kind, "name", "")
    if "int" not in about and "float" not in about:
        return None
    number = "an integer" if "int" in about else "a finite number"
    low, high = (getattr(param, end, getattr(kind, end, None)) for end in ("min", "max"))
    if low is None:
        return number
    return f"{number}, {low:g} or more" if high is None else f"{number} from {low} to {high}"
