"""The command line without its verbs: the app, the options that verbs share, what they print, and how it ends."""

import json
import os
import sys
from typing import Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, Parameter

from scantling import __version__
from scantling.errors import InputError, ScantlingError

app = App(
    name="scantling",
    help="Size every part of a decoder-only language model: cost, train, study, fit, predict, plan, grow, report.",
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # `main` says it, with an exit code of the contract
)

Set = Annotated[
    tuple[str, ...],
    Parameter(name="--set", negative=(), help="Override a key of the file: dotted.key=value. Repeatable."),
]
Json = Annotated[bool, Parameter(name="--json", negative=(), help="One JSON object on stdout instead of tables.")]


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    json.dump(value, sys.stdout, indent=1, default=_plain, allow_nan=False, ensure_ascii=False)
    print()


def _plain(value: Any) -> Any:
    """NumPy scalars and paths as JSON knows them."""
    return value.item() if hasattr(value, "item") else str(value)


def pairs(option: str, given: tuple[str, ...]) -> dict[str, str]:
    """`name=value` options."""
    found = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise InputError(f"{option} {pair}: expected name=value")
        found[name.strip()] = value.strip()
    return found


def numbers(option: str, given: tuple[str, ...]) -> dict[str, float]:
    """`name=number` options."""
    found = {}
    for pair in given:
        name, _, value = pair.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise InputError(f"{option} {pair}: expected name=number, such as {option} E=1.69") from None
    return found


def bounds(option: str, given: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """`name=low:high` options; an empty end is zero or infinite."""
    found = {}
    for name, value in pairs(option, given).items():
        low, colon, high = value.partition(":")
        try:
            found[name] = (float(low or 0.0), float(high or "inf"))
        except ValueError:
            colon = ""
        if not colon:
            raise InputError(f"{option} {name}={value}: expected name=low:high, such as {option} alpha=0.2:0.5")
    return found


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        app(words, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        _fail(str(error), 2)
    except ScantlingError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 1)
    except BrokenPipeError:
        os._exit(0)
    except Exception as error:
        if debug:
            raise
        _fail(f"internal error: {type(error).__name__}: {error}; run again with --debug for the traceback", 1)
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
