"""`paths.toml`: where the checkpoints and the pictures lie on this machine."""

import os
import tomllib
from pathlib import Path

from vlmclassifier.records import UserError

PROJECT_ROOT = Path(__file__).resolve().parent.parent


def local_path(table: str, key: str) -> Path | None:
    """The entry `key` of `[models]` or `[benchmarks]` in paths.toml, or None where there is none.

    `VLMCLASSIFIER_PATHS` names another file. Relative entries start at the file's own folder.
    Raises UserError when the file cannot be read or an entry is not a string.
    """
    named = os.environ.get("VLMCLASSIFIER_PATHS")
    file = Path(named) if named else PROJECT_ROOT / "paths.toml"
    if not file.exists():
        if named:
            raise UserError(f"{file} (from VLMCLASSIFIER_PATHS) does not exist: create it or unset the variable.")
        return None
    try:
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f'{file} is not valid TOML ({error}): write lines such as key = "folder".') from None
    section = settings.get(table, {})
    wrong = [name for name, value in section.items() if not isinstance(value, str)] if section else []
    if wrong:  # among them a key with a dot outside quotes, which TOML reads as a table
        raise UserError(f'{file}: {table}.{wrong[0]} is not a string: write "KEY" = "folder", the key in quotes too.')
    entry = section.get(key)
    if not entry:
        return None
    return file.parent / Path(entry).expanduser()
