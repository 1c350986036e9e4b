"""Command lines of scripts; mistakes in them are reported like every other user error."""

import argparse
import contextlib
import functools
import io
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from dit_video.core.errors import UserError
from dit_video.core.grid import Grid

_Parsed = TypeVar("_Parsed")
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_arguments(target: Callable[..., _Parsed], *, args: Sequence[str] | None = None, **options: Any) -> _Parsed:
    """Call `target` with the options of the command line, as `tyro.cli` does.

    Args:
      target: Dataclass to construct, or function to call.
      args: Arguments; those of the process by default.
      **options: Further options of `tyro.cli`.

    Raises:
      UserError: If an option does not exist or is missing, or a value is invalid; in tyro's words, without its frame.
    """
    import tyro

    @functools.wraps(target)
    def bind(*values: Any, **named: Any) -> Callable[[], _Parsed]:
        return functools.partial(target, *values, **named)  # called when the output goes to stderr again

    is_class = isinstance(target, type)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed: Any = tyro.cli(target if is_class else bind, args=args, **options)
    except SystemExit as error:
        if error.code != UserError.code:  # --help
            raise
        hint = _explain_dash(sys.argv[1:] if args is None else args)
        raise UserError(hint + _join_lines(printed.getvalue())) from None
    return parsed if is_class else parsed()


def _explain_dash(args: Sequence[str]) -> str:
    """Return a sentence on how a text that begins with a dash is given, if one follows an option; else nothing."""
    for option, value in itertools.pairwise(args):
        if re.fullmatch(r"--[a-z-]+", option) and re.match(r"-+\S*\s", value):
            return f"A text that begins with a dash is given as {option}={shlex.quote(value)}. "
    return ""


class ArgumentParser(argparse.ArgumentParser):
    """A parser of argparse for scripts that run without tyro.

    Raises:
      UserError: If an option does not exist or is missing, or a value is invalid; in argparse's words.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise the error instead of printing it with the usage."""
        raise UserError(f"the command line is invalid: {message}. Use --help to see the options.")


def check_minimum(minimum: float | int, **options: float | int | None) -> None:
    """Check the values of options against their minimum; None means that an option is not set.

    Raises:
      UserError: If a value is below the minimum.
    """
    for name, value in options.items():
        if value is not None and not value >= minimum:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} {value} is invalid: it must be at least {minimum}. Use {option} {minimum}.")


def parse_memory(text: str) -> int:
    """Parse a size of memory such as `24GiB`, and return its bytes.

    Raises:
      UserError: If the text is not a positive number with a unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    unit = None if match is None else next((unit for unit in _UNITS if unit.lower() == match[2].lower()), None)
    if match is None or unit is None or not float(match[1]):
        rule = f"it must be a positive number with one of the units {', '.join(_UNITS)}"
        raise UserError(f"memory size {text!r} is invalid: {rule}. Use a size such as 24GiB")
    return int(float(match[1]) * _UNITS[unit])


def parse_size(text: str) -> Grid:
    """Parse a size such as `17x32x48` as frames, height and width.

    Raises:
      UserError: If the text has another form.
    """
    if not re.fullmatch(r"\d+x\d+x\d+", text):
        raise UserError(f"--size {text} is invalid: it must be FRAMESxHEIGHTxWIDTH. Use --size 17x32x48")
    return Grid(*map(int, text.split("x")))


def _join_lines(framed: str) -> str:
    """Return the first paragraph of each section of a framed text on one line; rules separate the sections."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in framed.splitlines()]
    sections: list[list[str]] = [[]]
    for line in lines[1:]:  # without the title
        content = line.strip("│| ")
        if content and not content.strip("─-╰╯+"):
            sections.append([])
        else:
            sections[-1].append(content)
    paragraphs = (" ".join(itertools.takewhile(bool, section)) for section in sections)
    return ". ".join(text.removesuffix(".") for text in paragraphs if text)
