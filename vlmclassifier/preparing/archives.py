"""Archives from the network or the disk: downloaded with resume, checked, and unpacked without leaving their folder."""

import gzip
import hashlib
import lzma
import os
import shutil
import stat
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vlmclassifier.records import UserError

ATTEMPTS = 5  # of a download, each going on where the last one broke off
GROWTH = 20  # photographs hardly shrink: an archive that grows by more than this is a bomb
SPARE = 100 << 20  # bytes that any archive may grow by
BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)


class Refused(Exception):
    """A member of an archive that a data set has no use for."""


class Absent(UserError):
    """An official file that is neither there nor to be had by us."""


@dataclass(frozen=True)
class Remote:
    """One official file. `url` is None where it can no longer be downloaded, `md5` None where nobody states it."""

    name: str
    url: str | None
    md5: str | None


def find_or_fetch(remote: Remote, folder: Path, download: bool, any_checksum: bool, where: str) -> Path:
    """The official file in `folder`, downloaded where it is absent and may be; its checksum is right.

    `where`: how else to get it, for the message. Raises Absent for a file that is not there, UserError for another
    checksum.
    """
    file = folder / remote.name
    if not file.is_file():
        if remote.url is None or not download:
            raise Absent(f"{file} is absent and is not downloaded: {where}.")
        fetch(remote.url, file)
    if not any_checksum and remote.md5 and (found := checksum(file)) != remote.md5:
        raise UserError(
            f"{file} has the MD5 checksum {found}, the official one is {remote.md5}: remove it to download it again, "
            "or add --any-checksum if you trust this copy."
        )
    return file


def checksum(file: Path) -> str:
    """The MD5 checksum of a file, as the data sets' authors state it."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def fetch(url: str, file: Path) -> None:
    """Download with a progress bar; a broken download goes on where it broke off, also in a later call.

    Raises UserError when the server refuses, or breaks off ATTEMPTS times without having sent anything new.
    """
    import requests

    part, without_news, reason = file.with_name(f"{file.name}.part"), 0, ""
    part.parent.mkdir(parents=True, exist_ok=True)
    while without_news < ATTEMPTS:
        have = part.stat().st_size if part.exists() else 0
        try:
            whole = _receive(url, part, have)
            if whole is None or part.stat().st_size == whole:
                os.replace(part, file)
                return
            reason = f"{part.stat().st_size} of {whole} bytes came"
        except requests.HTTPError as error:
            raise UserError(f"{url} cannot be downloaded ({error}): see data/README.md for other sources.") from None
        except requests.RequestException as error:
            reason = type(error).__name__
        without_news = 0 if part.exists() and part.stat().st_size > have else without_news + 1
        time.sleep(min(without_news, 3))
    raise UserError(
        f"{url} brought nothing new in {ATTEMPTS} attempts ({reason}): the same command goes on where it broke off."
    )


def _receive(url: str, part: Path, have: int) -> int | None:
    """Append what the server has beyond `have` bytes; return the whole length where it says so."""
    import requests
    from tqdm import tqdm

    headers = {"Range": f"bytes={have}-"} if have else {}
    headers["Accept-Encoding"] = "identity"  # lengths are those of the file
    with requests.get(url, headers=headers, stream=True, timeout=60) as response:
        if response.status_code == 416:  # nothing beyond: it is whole, or another file by now
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if total != str(have):
                part.write_bytes(b"")
                return -1
            return have
        response.raise_for_status()
        if response.status_code != 206:
            have = 0  # a server without ranges sends all of it
        length = response.headers.get("Content-Length")
        whole = have + int(length) if length else None
        with (
            open(part, "ab" if have else "wb") as stream,
            tqdm(desc=f"Downloading {part.stem}", initial=have, total=whole, unit="B", unit_scale=True) as bar,
        ):
            response.raw.enforce_content_length = False  # what came of a block before the end is kept; fetch counts
            for block in response.iter_content(1 << 16):
                stream.write(block)
                bar.update(len(block))
    return whole


def unpack(archive: Path, folder: Path, name: str = "") -> None:
    """Unpack a tar or zip file into `folder`, all of it or nothing.

    `name`: the new folder there that takes all of it, where the archive has none at its top.

    Raises UserError for a broken archive, for one that holds links or paths that leave the folder, for one that grows
    beyond reason, and where something of its content is there already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _emptied(folder / f".{archive.name}.unpacking") as temporary:
        try:
            (_unpack_zip if zipfile.is_zipfile(archive) else _unpack_tar)(archive, temporary)
        except (tarfile.FilterError, Refused) as error:
            raise UserError(f"{archive} is refused ({error}): do not trust it, get it from another source.") from None
        except BROKEN as error:
            raise UserError(
                f"{archive} cannot be unpacked ({error}): it is cut short or no archive; remove it and get it again."
            ) from None
        entries = {temporary: name} if name else {entry: entry.name for entry in sorted(temporary.iterdir())}
        for target in entries.values():
            if (folder / target).exists():
                raise UserError(f"{folder / target} is there, but not whole: remove it and run again.")
        for entry, target in entries.items():
            entry.rename(folder / target)


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _limit(archive: Path) -> Callable[[int], None]:
    """Counts the unpacked bytes. Raises UserError beyond GROWTH times the archive's own size."""
    most, total = GROWTH * archive.stat().st_size + SPARE, 0

    def count(size: int) -> None:
        nonlocal total
        total += size
        if total > most:
            raise UserError(f"{archive} grows beyond {most >> 20} MiB when it is unpacked: do not trust it.")

    return count


def _unpack_tar(archive: Path, folder: Path) -> None:
    from tqdm import tqdm

    count = _limit(archive)
    with (
        tarfile.open(archive) as tar,
        tqdm(desc=f"Unpacking {archive.name}", unit="file", disable=None, file=sys.stderr) as bar,
    ):

        def checked(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
            if member.islnk() or member.issym():  # the data filter would let those pass that stay inside
                raise Refused(f"{member.name!r} is a link")
            count(member.size)
            bar.update()
            return tarfile.data_filter(member, path)

        tar.extractall(folder, filter=checked)


def _unpack_zip(archive: Path, folder: Path) -> None:
    from tqdm import tqdm

    count = _limit(archive)
    with zipfile.ZipFile(archive) as opened:
        for member in tqdm(opened.infolist(), desc=f"Unpacking {archive.name}", unit="file", disable=None):
            path = PurePosixPath(member.filename)
            if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
                raise Refused(f"{member.filename!r} would be written outside of the folder")
            if stat.S_ISLNK(member.external_attr >> 16):
                raise Refused(f"{member.filename!r} is a link")
            count(member.file_size)
            opened.extract(member, folder)
