"""YAML and JSON in and out: every value keeps its line, so an error can point at it.

YAML is read with a safe loader that also reads `3e-4` and `1e6` as numbers (YAML 1.1 reads them as text) and rejects
duplicate keys. JSON is YAML's subset here, so a Hugging Face `config.json` is read by the same code.
"""

import copy
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scantling.errors import InputError

Key = str | int
KeyPath = tuple[Key, ...]

_EXPONENT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$")
MAX_FILE_BYTES = 16 * 2**20
MAX_DEPTH = 50


class _Loader(yaml.SafeLoader):
    """SafeLoader in which exponent forms without a dot are numbers."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789."))


@dataclass(frozen=True)
class Document:
    """A loaded file: its plain value and the place (`file:line` or `--set key`) of each key path."""

    value: dict[str, Any]
    source: str
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Where `path` was written; the nearest enclosing key when it was not written itself."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.source

    def fault(self, path: KeyPath, message: str) -> str:
        """One compiler-style line: `file:line: dotted.key: message`."""
        name = dotted(path)
        return f"{self.place(path)}: {name}: {message}" if name else f"{self.place(path)}: {message}"

    def section(self, key: str) -> "Document":
        """The mapping under `key` as a document of its own that still knows its lines."""
        value = self.value.get(key)
        if not isinstance(value, dict):
            raise InputError(self.fault((key,), f"expected a mapping, got {show(value)}"))
        places = {path[1:]: place for path, place in self.places.items() if path[:1] == (key,)}
        return Document(value, self.source, places)


def dotted(path: KeyPath) -> str:
    """`('layers', 3, 'ffn') -> 'layers[3].ffn'`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def show(value: object) -> str:
    """A value as a person would recognise it in an error: short, quoted when text."""
    text = json.dumps(value, default=str) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Document:
    """Read a YAML or JSON file whose top level is a mapping, then apply `key.sub=value` overrides.

    Raises:
        InputError: the file is missing, too large, not UTF-8, not YAML, has duplicate keys, or is not a mapping.
    """
    file = Path(path)
    if file.is_dir():
        raise InputError(f"{file}: expected a YAML or JSON file, got a folder")
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise InputError(
                f"{file}: expected a configuration of at most {MAX_FILE_BYTES:,} bytes, got {file.stat().st_size:,}"
            )
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: expected UTF-8 text, byte {error.start} is {error.object[error.start]:#04x}"
        ) from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    return loads(text, str(file), overrides)


def loads(text: str, source: str = "<text>", overrides: Sequence[str] = ()) -> Document:
    """As `load`, from a string."""
    node = _compose(text, source)
    if node is None:
        raise InputError(f"{source}: the file is empty; expected a mapping such as `hidden_size: 128`")
    places: dict[KeyPath, str] = {}
    faults: list[str] = []
    value = _construct(node, (), source, places, faults)
    if faults:
        raise InputError(*faults)
    if not isinstance(value, dict):
        raise InputError(f"{source}:1: expected a mapping at the top level, got {show(value)}")
    document = Document(value, source, places)
    for override in overrides:
        document = _override(document, override)
    return document


def from_mapping(value: dict[str, Any], source: str = "<mapping>", overrides: Sequence[str] = ()) -> Document:
    """A document from a plain mapping made in Python (no line numbers)."""
    document = Document(copy.deepcopy(value), source)
    for override in overrides:
        document = _override(document, override)
    return document


def _compose(text: str, source: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{source}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{source}: not valid YAML: nested too deeply") from None
    finally:
        loader.dispose()


def _construct(node: yaml.Node, path: KeyPath, source: str, places: dict[KeyPath, str], faults: list[str]) -> Any:
    """The plain value of a node, noting the line of every key path. """ ""
    places.setdefault(path, f"{source}:{node.start_mark.line + 1}")
    if len(path) > MAX_DEPTH:
        raise InputError(f"{source}:{node.start_mark.line + 1}: nested more than {MAX_DEPTH} deep")
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, source, places, faults)
    if isinstance(node, yaml.SequenceNode):
        if len(places) > 2_000_000:
            raise InputError(
                f"{source}: expected a configuration, got more than 2,000,000 values (a multiplied alias?)"
            )
        return [_construct(child, (*path, index), source, places, faults) for index, child in enumerate(node.value)]
    return _scalar(node, path, source, faults)


def _mapping(
    node: yaml.MappingNode, path: KeyPath, source: str, places: dict[KeyPath, str], faults: list[str]
) -> dict[Key, Any]:
    result: dict[Key, Any] = {}
    lines: dict[Key, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = _scalar(key_node, path, source, faults) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str | int) or isinstance(key, bool):
            faults.append(f"{source}:{line}: expected a word or a number as key, got {show(key)}")
            continue
        if key in result:
            faults.append(
                f"{source}:{line}: {dotted((*path, key))}: duplicate key; it is already given in line {lines[key]}"
            )
            continue
        lines[key] = line
        places[(*path, key)] = f"{source}:{line}"
        result[key] = _construct(value_node, (*path, key), source, places, faults)
    return result


def _scalar(node: yaml.Node, path: KeyPath, source: str, faults: list[str]) -> Any:
    constructor = _Loader("")
    try:
        value = constructor.construct_object(node)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        problem = getattr(error, "problem", None) or str(error)
        faults.append(f"{source}:{node.start_mark.line + 1}: {dotted(path)}: {problem}")
        return None
    finally:
        constructor.dispose()
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return str(node.value)  # dates, binary: the text as written


def _override(document: Document, text: str) -> Document:
    """Apply one `--set a.b[2].c=value`; the value is read as YAML."""
    name, equals, raw = text.partition("=")
    where = f"--set {name}"
    if not equals or not name.strip():
        raise InputError(f"--set {text}: expected key=value, such as --set train.seed=1")
    node = _compose(raw, where)
    faults: list[str] = []
    new_places: dict[KeyPath, str] = {}
    value = None if node is None else _construct(node, (), where, new_places, faults)
    if faults:
        raise InputError(*faults)
    path = tuple(_override_path(name.strip(), where))
    root = copy.deepcopy(document.value)
    _assign(root, path, value, where)
    places = {known: place for known, place in document.places.items() if known[: len(path)] != path}
    places[path] = where
    return Document(root, document.source, places)


def _override_path(name: str, where: str) -> Iterator[Key]:
    for part in name.replace("[", ".").replace("]", "").split("."):
        if not part:
            raise InputError(f"{where}: expected dotted keys such as train.optimizer.learning_rate")
        yield int(part) if part.isdigit() else part


def _assign(root: Any, path: KeyPath, value: Any, where: str) -> None:
    at = root
    for depth, part in enumerate(path[:-1]):
        if isinstance(at, list) and isinstance(part, int) and part < len(at):
            at = at[part]
        elif isinstance(at, dict):
            at = at.setdefault(part, {})
        else:
            raise InputError(f"{where}: {dotted(path[: depth + 1])} is not a mapping or list that could hold this key")
    last = path[-1]
    if isinstance(at, dict):  # noqa: SIM114  (each branch is typed on its own)
        at[last] = value
    elif isinstance(at, list) and isinstance(last, int) and last < len(at):
        at[last] = value
    else:
        raise InputError(f"{where}: {dotted(path[:-1])} holds {show(at)}, which has no {last!r}")


class _Dumper(yaml.SafeDumper):
    """Block mappings, flow lists, exponents that the loader reads back."""


def _represent_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    flow = all(not isinstance(item, list | dict) or len(json.dumps(item)) < 100 for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flow)


def _represent_dict(dumper: yaml.SafeDumper, value: dict[Key, Any]) -> yaml.Node:
    flow = 0 < len(json.dumps(value)) < 110 and all(not isinstance(item, dict | list) for item in value.values())
    return dumper.represent_mapping("tag:yaml.org,2002:map", value.items(), flow_style=flow)


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789."))  # quotes text such as "1e3"
_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(dict, _represent_dict)


def dumps(value: dict[str, Any]) -> str:
    """YAML text that `loads` reads back to the same value, keys in the given order."""
    stream = io.StringIO()
    # The outermost mapping is always a block: one key a line.
    for key, item in value.items():
        if isinstance(item, dict) and item:
            body = yaml.dump(item, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
            name = yaml.dump([key], Dumper=_Dumper)[1:-2]  # quoted where YAML would read it as something else
            if body.startswith("{"):
                stream.write(f"{name}: {body}")
            else:
                stream.write(f"{name}:\n" + "".join(f"  {line}\n" for line in body.splitlines()))
        else:
            stream.write(yaml.dump({key: item}, Dumper=_BlockDumper, sort_keys=False, width=120, allow_unicode=True))
    return stream.getvalue()


class _BlockDumper(_Dumper):
    """As `_Dumper`, with the top mapping in block style."""


_BlockDumper.add_representer(
    dict, lambda dumper, value: dumper.represent_mapping("tag:yaml.org,2002:map", value.items(), flow_style=False)
)


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: what hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
