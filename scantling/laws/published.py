"""Published scaling laws, shipped as data: constants with source, counting convention and fitted range."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from scantling.errors import InputError, suggest
from scantling.laws.lawfit import SCHEMA, LawFit


def published_names() -> tuple[str, ...]:
    """The names `load_published` knows."""
    return tuple(_published())


def load_published(name: str) -> LawFit:
    """A published law by name, such as `chinchilla-epoch`; it predicts like a fitted one.

    Where the source gives no joint uncertainty, predictions carry no interval and say so.

    Raises:
        InputError: no law of that name is shipped.
    """
    known = _published()
    if name not in known:
        near = suggest(name, known) or f"; expected one of {', '.join(known)}"
        raise InputError(f"law: no published law {name!r}{near}")
    return LawFit.from_json({"schema": SCHEMA, **known[name]}, f"published law {name}")


def load_law(path_or_name: str | Path) -> LawFit:
    """A law from the JSON file that a fit wrote, or a published one by name.

    Raises:
        InputError: neither a file nor a published name, or not a law.
    """
    path = Path(path_or_name)
    if str(path_or_name) in published_names():
        return load_published(str(path_or_name))
    if path.suffix != ".json" and not path.exists():
        known = _published()
        near = suggest(str(path_or_name), known) or f"; published are {', '.join(known)}"
        raise InputError(f"law: {str(path_or_name)!r} is neither a law's .json file nor a published law{near}")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a law's .json file or a published name"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); give the file that fit wrote") from None
    return LawFit.from_json(plain, str(path))


def _published() -> dict[str, dict[str, Any]]:
    text = (files("scantling.laws") / "published.json").read_text(encoding="utf-8")
    laws: dict[str, dict[str, Any]] = json.loads(text)
    return laws
