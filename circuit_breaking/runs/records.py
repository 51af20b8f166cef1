"""Typed records: what a file of results says about how it was made, with a name and a version.

Each file format has one dataclass. In a file, a record is a JSON object that starts with the format's name and version,

    {"record": "mask", "version": 1, "model": "gpt2", ...}

and continues with the dataclass's fields. In a safetensors file this object lies in the header. `from_json` refuses
another format and a version that it does not know. Older versions that a record lists, and files of the release before
records had versions, are still read, with a note on stderr; the next release will refuse them.

Records of single files: `mask_record.py` (masks, means, weight masks, lists of edges) and `results.py` (reports).
"""

import dataclasses
import hashlib
import json
import sys
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import CHECK, plain, read_json, write_json

PROVENANCE = (
    "settings",
    "inputs",
    "packages",
    "python",
    "git_commit",
    "code",
    "texts",
)  # what `provenance.provenance` gives


@dataclasses.dataclass(kw_only=True)
class Record:
    """Base class of all records. A subclass sets `NAME` and lists its fields.

    Attributes:
        NAME: name of the format, the value of `"record"` in a file.
        VERSION: the version that is written.
        OLDER: versions that are read too, through `renew`.
    """

    NAME: ClassVar[str]
    VERSION: ClassVar[int] = 1
    OLDER: ClassVar[tuple[int, ...]] = ()

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"record": self.NAME, "version": self.VERSION, **json.loads(json.dumps(fields, default=plain))}

    @classmethod
    def from_json(cls, value: Any, path: Path | str, hint: str = CHECK) -> Self:
        """The record in a JSON value.

        Args:
            value: what was read.
            path: the file that it was read from, for error messages.
            hint: what to do if it cannot be used, the last sentence of error messages.

        Raises:
            UserError: the value is another record, of an unknown version, or damaged.
        """
        if isinstance(value, dict) and "record" in value:
            return cls._checked(cls.fields_of(value, path, hint), path, hint)
        record = cls._checked(cls.renew(cls.from_old(value, path, hint)), path, hint)
        note_old(str(path))
        return record

    @classmethod
    def fields_of(cls, value: Mapping[str, Any], path: Path | str, hint: str = CHECK) -> dict[str, Any]:
        """The fields in the JSON object of a record, as the present version has them.

        Raises a `UserError` for a record of another name or of an unknown version.
        """
        fields = {name: value[name] for name in value if name not in ("record", "version")}
        version = value.get("version")
        if value["record"] == cls.NAME and type(version) is int and version in cls.OLDER:
            note_old(str(path))
            return cls.renew(fields)
        cls.check_version(value, path, hint)
        return fields

    @classmethod
    def renew(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Fields of an older version, or of a file without one, as the present version has them."""
        return fields

    @classmethod
    def check_version(cls, value: Mapping[str, Any], path: Path | str, hint: str = CHECK) -> None:
        """Raise a `UserError` for a record of another name or of an unknown version."""
        if value["record"] != cls.NAME:
            raise UserError(f"{path} holds a record of {value['record']!r}, and {cls.NAME!r} is needed. {hint}")
        if (version := value.get("version")) != cls.VERSION or type(version) is not int:
            raise UserError(
                f"{path} is version {version!r} of the format {cls.NAME!r}, and this release reads version "
                f"{cls.VERSION}. {hint}"
            )

    @classmethod
    def from_old(cls, value: Any, path: Path | str, hint: str) -> dict[str, Any]:
        """Fields of the record in a file of the release before records had versions.

        By default the fields lie side by side under the names that they have now, with the provenance among them.
        """
        if not isinstance(value, dict):
            raise UserError(f"{path} holds no record of {cls.NAME!r}. {hint}")
        names = {field.name for field in dataclasses.fields(cls)}
        found = {key: value[key] for key in value if key in names}
        return found | ({"provenance": old_provenance(value)} if "provenance" in names else {})

    @classmethod
    def _checked(cls, fields: Mapping[str, Any], path: Path | str, hint: str) -> Self:
        try:
            return build(cls, fields)
        except TypeError as error:
            raise UserError(f"{path} is damaged: {error}. {hint}") from None

    def write(self, path: Path | str) -> None:
        """Write the record to a JSON file atomically."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path | str, hint: str = CHECK) -> Self:
        """The record in a JSON file. Raises `UserError` for a file that is missing or that `from_json` refuses."""
        return cls.from_json(read_json(path, hint), path, hint)


@dataclasses.dataclass(kw_only=True)
class RunSettings(Record):
    """`settings.json` of a run folder: which script ran, with which settings, on which files.

    Attributes:
        script: path of the script in the repository.
        provenance: settings, hashes of the files read and of the code, package versions, git commit.
    """

    NAME: ClassVar[str] = "run settings"
    script: str
    provenance: dict[str, Any]

    @classmethod
    def from_old(cls, value: Any, path: Path | str, hint: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise UserError(f"{path} holds no settings of a run. {hint}")
        return {"script": "", "provenance": old_provenance(value if "settings" in value else {"settings": value})}


def read_value(path: Path | str, hint: str, *kinds: type[Record]) -> Any:
    """The fields in a file that holds a record of one of `kinds`, whose name and version are checked.

    For readers that check the fields themselves and name the one that is wrong (`checked_json.CheckedJson`).
    """
    value = read_json(path, hint)
    if isinstance(value, dict) and "record" in value:
        kind = next((kind for kind in kinds if value["record"] == kind.NAME), kinds[0])
        return kind.fields_of(value, path, hint)
    if isinstance(value, dict):
        note_old(str(path))
        return kinds[0].renew(value)
    return value


def old_provenance(value: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance in a record of the release before records had versions, whose entries lay among others."""
    return {key: value[key] for key in PROVENANCE if key in value}


@cache
def note_old(path: str) -> None:
    """Say once on stderr that a file has the format of the release before."""
    print(
        f"note: {path} has the format of an older release, which the next release will refuse. Make it again by then.",
        file=sys.stderr,
    )


def fingerprint(key: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON-able mapping, such as `run_folder.resume_key` gives."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=plain).encode()).hexdigest()


def build(kind: type, fields: Any) -> Any:
    """A dataclass from a mapping of its fields, nested ones too. Raises `TypeError` where they do not fit."""
    if not isinstance(fields, Mapping):
        raise TypeError(f"{kind.__name__} is no JSON object")
    hints = get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := [name for name in fields if name not in known]:
        raise TypeError(f"it holds {unknown[0]!r}, which the format does not have")
    values = {}
    for name, field in known.items():
        if name not in fields:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise TypeError(f"it lacks {name!r}")
            continue
        value, hint = fields[name], hints[name]
        values[name] = build(hint, value) if dataclasses.is_dataclass(hint) else value
        if not dataclasses.is_dataclass(hint) and not fits(value, hint):
            raise TypeError(f"its {name!r} is not {getattr(hint, '__name__', str(hint))}")
    return kind(**values)


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in parts
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(fits(one, parts[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(one, parts[1]) for one in value.values())
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)
