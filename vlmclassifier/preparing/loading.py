"""The tables of a third-party copy: parquet, `datasets.save_to_disk`, webdataset tars, TSV files, or the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmclassifier.preparing.official import is_visible
from vlmclassifier.records import UserError

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test",
          "val": "valid", "valid": "valid", "validation": "valid"}  # fmt: skip
BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".tsv": "csv"}  # by suffix: the builder of `datasets`
CLASS_NAMES = "classnames.txt"  # beside webdataset tars, as CLIP_benchmark writes it: one name per line


def load_tables(name: str) -> tuple[dict[str, "Dataset"], list[str] | None]:
    """The tables of a copy by split, and the class names beside its files; None where there are none.

    `name`: a folder or file of parquet, webdataset (*.tar) or TSV with base64 images, a folder of
    `datasets.save_to_disk`, or a repository of the hub. Raises UserError when it cannot be loaded.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(name)
    saved = [path / file for file in ("dataset_dict.json", "state.json") if (path / file).is_file()]
    files = [] if saved else _table_files(path)
    try:
        if saved:
            loaded = load_from_disk(path)
            return dict(loaded) if isinstance(loaded, DatasetDict) else {"all": loaded}, None
        if not files:
            return dict(load_dataset(name)), None
        suffix = files[0].suffix
        files_by_split: dict[str, list[str]] = {}
        for file in files:
            if suffix == ".parquet":
                _check_parquet(file)
            files_by_split.setdefault(_split_of(file), []).append(str(file))
        options = _tsv_options(files[0]) if suffix == ".tsv" else {}
        # Streamed: a copy in the library's cache would take the same disk space again.
        tables = load_dataset(BUILDERS[suffix], data_files=files_by_split, streaming=True, **options)
        return dict(tables), _names_beside(files)
    except UserError:
        raise
    except Exception as error:  # the library raises many types: no network, no such repository, gated, a damaged file
        raise UserError(
            f"--dataset {name} cannot be loaded ({reason(error)}): fix the name, or give the folder of a local copy."
        ) from None


def _tsv_options(file: Path) -> dict[str, object]:
    """How `datasets` reads a TSV file: every column of its first line as text."""
    from datasets import Features, Value

    with open(file, encoding="utf-8-sig") as stream:
        columns = stream.readline().rstrip("\r\n").split("\t")
    return {"delimiter": "\t", "features": Features({column: Value("string") for column in columns})}


def _table_files(path: Path) -> list[Path]:
    """The files of a local copy, of one form; [] for a name of the hub. Raises UserError for a folder without any."""
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise UserError(f"--dataset {path} is none of {', '.join('*' + suffix for suffix in BUILDERS)}.")
        return [path]
    if not path.is_dir():
        return []
    for suffix in BUILDERS:
        if files := sorted(file for file in path.rglob(f"*{suffix}") if is_visible(file, path)):
            return files
    raise UserError(
        f"--dataset {path} contains no parquet file, no webdataset (*.tar) and no *.tsv, and is no folder of "
        "datasets.save_to_disk: give a folder that does, or a repository of the hub."
    )


def _split_of(file: Path) -> str:
    """The split's name in a file name such as train-00000-of-00002.parquet, or in the folder's name, else "all"."""
    for name in (file.stem.split("-")[0], file.parent.name):
        if name.lower() in SPLITS:
            return name
    return "all"


def _names_beside(files: Sequence[Path]) -> list[str] | None:
    """The class names in CLASS_NAMES in the folder of the first file, or in the one above it."""
    for folder in (files[0].parent, files[0].parent.parent):
        if (folder / CLASS_NAMES).is_file():
            return (folder / CLASS_NAMES).read_text(encoding="utf-8-sig").splitlines()
    return None


def _check_parquet(file: Path) -> None:
    """Raise UserError for a damaged file; the error of `datasets` would not name the file."""
    import pyarrow
    from pyarrow import parquet

    try:
        parquet.read_metadata(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be loaded ({reason(error)}): get it again, or remove it.") from None


def reason(error: Exception) -> str:
    """The type and the first line of an exception, shortened."""
    message = str(error).strip() or "no reason given"
    return f"{type(error).__name__}: {message.splitlines()[0][:200]}"
