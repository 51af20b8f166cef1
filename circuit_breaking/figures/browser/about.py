"""How the results of a folder were made: settings, files that were read, versions."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from circuit_breaking.figures.browser.parts import Section, Table
from circuit_breaking.runs.files import read_json
from circuit_breaking.runs.records import PROVENANCE, old_provenance

MOST_BYTES = 2**24  # of a file that is searched for its provenance; graphs of EAP-IG are larger and have none


def about(folder: Path) -> Section | None:
    """The settings and provenance in the result files of a folder, once where several files have the same."""
    parts, seen = [], []
    for name, found in _provenances(folder):
        if found not in seen:
            seen.append(found)
            parts += _tables(name, found)
    return Section("Settings and provenance", parts) if parts else None


def model_of(folder: Path) -> str:
    """Name of the model that the results of a folder are about, "" where no file says."""
    for _, found in _provenances(folder):
        settings = found.get("settings")
        if isinstance(settings, Mapping) and isinstance(settings.get("model"), str):
            return settings["model"]
    return ""


def settings_of(folder: Path) -> Mapping[str, Any]:
    """The settings in `settings.json` of a folder, empty where there is none."""
    for name, found in _provenances(folder):
        if name.startswith("settings.json") and isinstance(found.get("settings"), Mapping):
            return found["settings"]
    return {}


def _provenances(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    paths = sorted(folder.glob("*.json"), key=lambda path: (path.name != "settings.json", path.name))
    for path in paths:
        if path.stat().st_size > MOST_BYTES:
            continue
        value = read_json(path)
        if not isinstance(value, Mapping):
            continue
        found = value.get("provenance") or old_provenance(value)
        if isinstance(found, Mapping) and found.keys() & set(PROVENANCE) and isinstance(found.get("settings"), Mapping):
            script = value.get("script")
            yield f"{path.name} ({script})" if isinstance(script, str) and script else path.name, dict(found)


def _tables(name: str, found: Mapping[str, Any]) -> list[Table]:
    settings = [[key, _shown(value)] for key, value in found["settings"].items()]
    packages = found.get("packages") if isinstance(found.get("packages"), Mapping) else {}
    about = [["git commit", found.get("git_commit")], ["hash of the source files", found.get("code")]]
    about += [["Python", found.get("python")], *packages.items()]
    inputs = found.get("inputs") if isinstance(found.get("inputs"), Mapping) else {}
    about += [[f"SHA-256 of {path}", digest] for path, digest in inputs.items()]
    rows = [[str(key), _shown(value)] for key, value in about if value is not None]
    return [
        Table(["setting", "value"], settings, f"Settings in {name}", folded=True, numbers=False),
        Table(["", "value"], rows, f"Provenance in {name}", folded=True, numbers=False),
    ]


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return "none" if value is None else str(value)
