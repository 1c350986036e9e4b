"""Command lines of scripts, whose mistakes are reported like every other error of a user."""

import argparse
import contextlib
import difflib
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

from dit_video.core.errors import UserError
from dit_video.core.grid import Grid

_Parsed = TypeVar("_Parsed")
_KINDS = {
    "INT": "a whole number",
    "FLOAT": "a number",
    "FLOAT [FLOAT]": "one or two numbers",
    "PATH": "a path",
    "STR": "a text",
}
"""Descriptions of the values that tyro's names of types stand for."""
_ARGPARSE_KINDS = {"int": "INT", "float": "FLOAT", "Path": "PATH"}
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_arguments(target: Callable[..., _Parsed], *, args: Sequence[str] | None = None, **options: Any) -> _Parsed:
    """Call `target` with the options of the command line, as `tyro.cli` does.

    Args:
      target: Dataclass to construct, or function to call.
      args: Arguments; those of the process by default.
      **options: Further options of `tyro.cli`.

    Raises:
      UserError: An option does not exist or is missing, or a value is invalid.
    """
    import tyro

    # The module is private; pyproject.toml requires a release that has it.
    from tyro import _errors

    arguments = list(sys.argv[1:] if args is None else args)

    def reject(event: Any) -> NoReturn:
        raise UserError(_describe(event, arguments, lambda: _list_option_names(target, **options)))

    if {"-h", "--help"} & set(arguments):  # tyro prints it
        return tyro.cli(target, args=arguments, **options)
    with _errors.on_parse_error(reject):
        return tyro.cli(target, args=arguments, **options)


class ArgumentParser(argparse.ArgumentParser):
    """A parser of argparse for scripts that run without tyro, with the same errors as `parse_arguments`.

    Raises:
      UserError: An option does not exist or is missing, or a value is invalid.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments; those of the process by default."""
        self._arguments = list(sys.argv[1:] if args is None else args)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise the error that a message of argparse stands for."""
        names = [name for name in self._option_string_actions if name.startswith("--")]
        if match := re.fullmatch(r"unrecognized arguments: (.*)", message):
            raise UserError(_describe_unknown(match[1].split(), names))
        if match := re.fullmatch(r"the following arguments are required: (.*)", message):
            unknown = _find_unknown(self._arguments, names)
            raise UserError(_describe_unknown(unknown, names) if unknown else _describe_missing(match[1].split(", ")))
        if match := re.fullmatch(r"argument (\S+): invalid (\w+) value: '(.*)'", message):
            raise UserError(_describe_value(match[1], match[3], _ARGPARSE_KINDS.get(match[2], match[2])))
        if match := re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message):
            raise UserError(_describe_choice(match[1], match[2], match[3].replace("'", "").split(", ")))
        if match := re.fullmatch(r"argument (\S+): expected (.*)", message):
            raise UserError(f"{match[1]} is invalid: it needs {match[2]}. Use --help to see it.")
        raise UserError(f"the command line is invalid: {message}. Use --help to see the options.")


def check_minimum(minimum: float | int, **options: float | int | None) -> None:
    """Check the values of options against their minimum; None is an option that is not set.

    Raises:
      UserError: A value is below the minimum.
    """
    for name, value in options.items():
        if value is not None and not value >= minimum:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} {value} is invalid: it must be at least {minimum}. Use {option} {minimum}.")


def parse_memory(text: str) -> int:
    """Parse a size of memory such as `24GiB`, and return its bytes.

    Raises:
      UserError: it is not a positive number with a unit.
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
      UserError: for any other text.
    """
    if not re.fullmatch(r"\d+x\d+x\d+", text):
        raise UserError(f"--size {text} is invalid: it must be FRAMESxHEIGHTxWIDTH. Use --size 17x32x48")
    return Grid(*map(int, text.split("x")))


def _describe(event: Any, args: Sequence[str], list_names: Callable[[], list[str]]) -> str:
    """Return the message for one of tyro's events, which differ in their attributes."""
    unknown = getattr(event, "tokens", None) or getattr(event, "unrecognized_tokens", None)
    if unknown:
        return _describe_unknown(unknown, list_names())
    if missing := getattr(event, "missing_arguments", None):
        return _describe_missing([_describe_usage(item.arg) for item in missing])
    argument = getattr(event, "argument", None)
    if argument is None:
        message = getattr(event, "message", "its options exclude each other")
        return f"the command line is invalid: {' '.join(str(message).split())}. Use --help to see the options."
    name, metavar = _get_name(argument), _get_metavar(argument)
    if choices := getattr(event, "choices", None):
        return _describe_choice(name, event.value, choices)
    value = " ".join(_find_values(args, name))
    if not value and name.startswith("--"):
        return f"{name} is invalid: it needs a value, {_get_kind(metavar)}. Use {name} {metavar}."
    if not value:  # a positional argument
        names = list_names()
        unknown = _find_unknown(args, names)
        return _describe_unknown(unknown, names) if unknown else _describe_missing([metavar])
    return _describe_value(name, value, metavar)


def _find_unknown(args: Sequence[str], names: Sequence[str]) -> list[str]:
    return [token for token in args if token.startswith("--") and token.partition("=")[0] not in names]


def _describe_unknown(tokens: Sequence[str], names: Sequence[str]) -> str:
    options = [token.partition("=")[0] for token in tokens if token.startswith("-")]
    if not options:
        return f"{tokens[0]} is invalid: there is no argument in its place. Use --help to see the arguments."
    fix = " or ".join(_find_similar(options[0], names)) or "--help to see the options"
    return f"{options[0]} is invalid: there is no such option. Use {fix}."


def _find_similar(option: str, names: Sequence[str]) -> list[str]:
    """Return up to three names like an option: those that end with it, or else the nearest."""
    option = option.replace("_", "-")
    ends = {name: name.rpartition(".")[2] for name in names}
    word = option.lstrip("-")
    if parts := [name for name, end in ends.items() if "." in name and end == word]:
        return parts[:3]
    near = difflib.get_close_matches(option, names, n=3, cutoff=0.7)
    if near or not word:
        return near
    words = difflib.get_close_matches(word, [end.lstrip("-") for end in ends.values()], n=1, cutoff=0.7)
    return [name for name, end in ends.items() if end.lstrip("-") in words][:3]


def _describe_missing(usages: Sequence[str]) -> str:
    names = " and ".join(usage.split()[0] for usage in usages)
    return f"{names} {'is' if len(usages) == 1 else 'are'} missing. Use {' '.join(usages)}, or --help to see examples."


def _describe_value(name: str, value: str, metavar: str) -> str:
    return f"{name} {value} is invalid: it must be {_get_kind(metavar)}. Use {f'{name} {metavar}'.strip()}."


def _describe_choice(name: str, value: str, choices: Iterable[str]) -> str:
    choices = list(choices)
    nearest = (difflib.get_close_matches(value, choices, n=1, cutoff=0.5) or choices)[0]
    return f"{name} {value} is invalid: it must be one of {', '.join(choices)}. Use {name} {nearest}."


def _get_name(argument: Any) -> str:
    """Return the name of a tyro argument: that of an option, or of the value of a positional argument."""
    return _get_metavar(argument) if argument.is_positional() else argument.lowered.name_or_flags[-1]


def _get_metavar(argument: Any) -> str:
    """Return how a tyro argument's value is written, such as `INT`."""
    metavar = re.sub(r"\{None\}\|", "", argument.lowered.metavar or "")
    return re.sub(r"^\{(.*)\}$", r"\1", metavar) if "," not in metavar else metavar


def _describe_usage(argument: Any) -> str:
    metavar = _get_metavar(argument)
    return metavar if argument.is_positional() else f"{_get_name(argument)} {metavar}"


def _get_kind(metavar: str) -> str:
    words = metavar.split()
    if len(words) > 1 and len(set(words)) == 1 and words[0] in _KINDS:
        return f"{len(words)} values, each {_KINDS[words[0]]}"
    return _KINDS.get(metavar, metavar)


def _find_values(args: Sequence[str], name: str) -> list[str]:
    """Return the last values that the command line gives an option."""
    values: list[str] = []
    for index, token in enumerate(args):
        option, equals, value = token.partition("=")
        if option.replace("_", "-") == name:
            following = itertools.takewhile(lambda token: not token.startswith("--"), args[index + 1 :])
            values = [value] if equals else list(following)
    return values


def _list_option_names(target: Callable[..., Any], **options: Any) -> list[str]:
    """Return the names of all options, which tyro lists in its help."""
    import tyro

    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text), contextlib.suppress(SystemExit):
        tyro.cli(target, args=["--help"], **options)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │") for line in help_text.getvalue().splitlines()]
    matches = [re.match(r"(?:-\w, )?(--[\w.-]+)(?:, (--[\w.-]+))?", line) for line in lines]
    return [name for match in matches if match for name in match.groups() if name]
