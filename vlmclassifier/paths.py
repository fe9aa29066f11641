"""Where files are on this machine: paths.toml for checkpoints and images, OUTPUTS for run folders."""

import os
import tomllib
from collections.abc import Collection
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from vlmclassifier.records import UserError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = Path(os.environ.get("VLMCLASSIFIER_OUTPUTS", PROJECT_ROOT / "outputs"))  # for example on another disk
TABLES = ("models", "benchmarks", "texts", "trusted_roots", "fingerprints")


def run_folder(out: Path | None, section: str, name: str, setting: str, several: bool = False) -> Path:
    """The folder of a run: `out` (--out), else OUTPUTS/SECTION/NAME-SETTING.

    `several`: the command makes several runs, so -SETTING is appended to `out` too.
    """
    if out is None:
        return OUTPUTS / section / f"{name}-{setting}"
    if not several:
        return out
    named = out if out.name else out.absolute()  # "." has no name
    return named.with_name(f"{named.name}-{setting}")


def local_path(table: str, key: str) -> Path | None:
    """The entry `key` of `[models]`, `[benchmarks]` or `[texts]` in paths.toml, or None where there is none.

    An entry of paths.local.toml wins. `VLMCLASSIFIER_PATHS` names another file in place of both. Relative entries start
    at the file's own folder.
    Raises UserError when the file cannot be read, has another table, or an entry is not a string.
    """
    for file in _files():
        if entry := _settings(file).get(table, {}).get(key):
            return file.parent / Path(entry).expanduser()
    return None


def trusted_roots() -> list[Path]:
    """The folders in [trusted_roots] of paths.toml, which images may lie in beside the data root, such as a data disk.

    Raises UserError like `local_path`.
    """
    entries: dict[str, Path] = {}
    for file in reversed(_files()):
        found = _settings(file).get("trusted_roots", {})
        entries |= {name: file.parent / Path(entry).expanduser() for name, entry in found.items()}
    return list(entries.values())


def listed_fingerprint(key: str) -> str | None:
    """The entry `key` of [fingerprints] in paths.toml: the checkpoint that its user has checked; None where none is."""
    return next((entry for file in _files() if (entry := _settings(file).get("fingerprints", {}).get(key))), None)


def near_miss(table: str, key: str, known: Collection[str]) -> str:
    """A hint about an unknown entry of paths.toml that looks like `key`; "" where there is none."""
    for file in _files():
        others = {name.lower(): name for name in _settings(file).get(table, {}) if name not in known}
        if found := get_close_matches(key.lower(), others, 1, 0.8):
            return f" {file} has {others[found[0]]!r} in [{table}]: did you mean {key!r}?"
    return ""


def _files() -> list[Path]:
    """The files of paths, the one that wins first. paths.local.toml is not tracked, so that no run becomes "-dirty"."""
    named = os.environ.get("VLMCLASSIFIER_PATHS")
    if not named:
        return [PROJECT_ROOT / "paths.local.toml", PROJECT_ROOT / "paths.toml"]
    if not Path(named).exists():
        raise UserError(f"{named} (from VLMCLASSIFIER_PATHS) does not exist: create it or unset the variable.")
    return [Path(named)]


def _settings(file: Path) -> dict[str, dict[str, str]]:
    return _read_settings(file, file.stat().st_mtime_ns) if file.exists() else {}


@lru_cache(maxsize=4)
def _read_settings(file: Path, changed: int) -> dict[str, dict[str, str]]:
    """The tables of a file; `changed`: when it was last changed."""
    try:
        settings = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f'{file} is not valid TOML ({error}): write lines such as key = "folder".') from None
    for table, entries in settings.items():
        if table not in TABLES or not isinstance(entries, dict):
            raise UserError(f"{file} has {table!r}, which nothing reads: entries belong in [models], "
                            "[benchmarks], [trusted_roots] or [fingerprints].")  # fmt: skip
        wrong = [name for name, value in entries.items() if not isinstance(value, str)]
        if wrong:  # among them a key with a dot outside quotes, which TOML reads as a table
            raise UserError(
                f'{file}: {table}.{wrong[0]} is not a string: write "KEY" = "folder", the key in quotes too.'
            )
    return settings
