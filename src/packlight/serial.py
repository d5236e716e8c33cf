"""Records as JSON files: written whole or not at all, and read as the types of a dataclass's fields say.

The standard library writes dataclasses as JSON and does not read them back. What it takes to do so is here once, for
the records of `records.py` and `step.py`: a file that another version wrote, or that was edited, is refused in plain
words.
"""

import dataclasses
import functools
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, TypeVar, get_args, get_origin, get_type_hints

_Record = TypeVar("_Record")

SCHEMA = 1
"""Version of the JSON layout; a reader refuses a newer one."""


class JsonRecord:
    """Reading and writing for the records that stand in files of their own (`kind` names which)."""

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON types, with `schema` and `kind` in front."""
        return {"schema": SCHEMA, "kind": self.kind, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Build the record from what `to_dict` returned.

        Returns:
            The record.

        Raises:
            ValueError: another kind of record, another schema, or missing, unknown or wrong fields.
        """
        if not isinstance(data, Mapping) or data.get("kind") != cls.kind:
            got = data.get("kind") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"got a record of kind {got!r}; wanted {cls.kind!r}")
        if data.get("schema") != SCHEMA:
            raise ValueError(
                f"the record has schema {data.get('schema')!r} and this packlight reads {SCHEMA}; "
                "write it again, or use the packlight that wrote it"
            )
        return _build(cls, {key: value for key, value in data.items() if key not in ("schema", "kind")})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as JSON; the file appears whole or not at all."""
        write_whole(Path(path), json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a record that `save` wrote.

        Returns:
            The record.

        Raises:
            ValueError: the file is not JSON, or not such a record.
        """
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


def write_whole(target: Path, text: str) -> None:
    """Write a text file under another name, and give it its own once it is complete."""
    unfinished = target.parent / f".{target.name}.{secrets.token_hex(8)}"
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object from a file.

    Returns:
        The object.

    Raises:
        ValueError: the file does not hold a JSON object.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)} is not JSON ({error}); wanted a file that packlight wrote") from error
    if not isinstance(data, dict):
        raise ValueError(f"{os.fspath(path)} holds a {type(data).__name__}; wanted a file that packlight wrote")
    return data


def _build(cls: type[_Record], data: object, where: str = "") -> _Record:
    """Construct a dataclass from plain JSON types, as the types of its fields say; `where` it stands in the file."""
    where = where or cls.__name__
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is {data!r:.60}; wanted the fields of a {cls.__name__}; was it edited?")
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    required = {
        name
        for name, entry in fields.items()
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    }
    unknown, missing = sorted(set(data) - set(fields)), sorted(required - set(data))
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}; was it edited?")
    types = _field_types(cls)  # type: ignore[arg-type]
    return cls(**{name: _build_field(types[name], value, f"{where}.{name}") for name, value in data.items()})


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _build_field(kind: Any, value: Any, where: str) -> Any:
    """Build a field of a type from plain JSON types."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any or (origin is UnionType and value is None):
        return value
    if origin is UnionType:
        return _build_field(parts[0], value, where)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_build_field(parts[0], item, f"{where}[{at}]") for at, item in enumerate(value))
    if origin is Mapping and isinstance(value, Mapping):
        return {key: _build_field(parts[1], item, f"{where}.{key}") for key, item in value.items()}
    accepted = (int, float) if kind is float else kind
    if origin is not None or not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{where} is {value!r:.60}; wanted {getattr(kind, '__name__', kind)}; was it edited?")
    return value


def this_rank() -> int | None:
    """Return which of several processes of torchrun this is; None for a process alone."""
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    return int(os.environ.get("RANK", "0")) if several else None


def of_rank(path: Path) -> Path:
    """Return the file that a rank writes: the named one for the first, beside it NAME.rank1.json for the next."""
    rank = this_rank()
    return path if not rank else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
