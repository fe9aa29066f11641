"""Official files from the network or the disk: downloaded with resume, their checksums checked."""

import errno
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmclassifier.records import UserError

if TYPE_CHECKING:
    import requests

ATTEMPTS = 5  # of a download, each going on where the last one broke off
PASSING = {408, 429, 500, 502, 503, 504}  # what a server says that will work again
UNUSABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}  # of a folder
LONGEST_WAIT = 60  # seconds, whatever Retry-After says


class Absent(UserError):
    """An official file that is neither there nor to be had by us."""


class Again(Exception):
    """The server wants to be asked again, after so many seconds."""


@dataclass(frozen=True)
class Remote:
    """One official file. `url` is None where it can no longer be downloaded, `md5` None where nobody states it."""

    name: str
    url: str | None
    md5: str | None


def find_or_fetch(remote: Remote, folders: Sequence[Path], download: bool, any_checksum: bool, where: str) -> Path:
    """The official file in one of `folders`, else downloaded into the first where it may be; its checksum is right.

    `where`: how else to get it, for the message. Raises Absent for a file that is not there, UserError for another
    checksum.
    """
    file = next((folder / remote.name for folder in folders if (folder / remote.name).is_file()), None)
    if file is None:
        file = folders[0] / remote.name
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


@contextmanager
def writing_alone(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes from filling it meanwhile.

    Raises UserError where one does, or where nothing can be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".preparing.lock", blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"Another process is filling {folder}: wait until it is done, then run again.") from None
    except FileExistsError:
        raise UserError(f"{folder} is a file: name the folder that holds it.") from None
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        raise UserError(
            f"Nothing can be written to {folder}, or no lock be held there ({error.strerror}): add --unpack-into DIR."
        ) from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def fetch(url: str, file: Path) -> None:
    """Download with a progress bar; a broken download goes on where it broke off, also in a later call.

    Raises UserError when the server refuses, or breaks off ATTEMPTS times without having sent anything new.
    """
    with writing_alone(file.parent):
        if file.is_file():  # another process was faster
            return
        _fetch(url, file, file.with_name(f"{file.name}.part"))


def _fetch(url: str, file: Path, part: Path) -> None:
    import requests

    without_news, reason = 0, ""
    while without_news < ATTEMPTS:
        have, wait = part.stat().st_size if part.exists() else 0, 0.0
        try:
            whole = _receive(url, part, have)
            if whole is None or part.stat().st_size == whole:
                os.replace(part, file)
                return
            reason = f"{part.stat().st_size} of {whole} bytes came"
        except Again as again:
            reason, wait = again.args
        except requests.HTTPError as error:
            raise UserError(f"{url} cannot be downloaded ({error}): see data/README.md for other sources.") from None
        except requests.RequestException as error:
            reason = type(error).__name__
        without_news = 0 if part.exists() and part.stat().st_size > have else without_news + 1
        time.sleep(max(wait, min(without_news, 3)))
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
        _raise_for_status(response)
        if response.status_code != 206:
            have = 0  # a server without ranges sends all of it
        length = response.headers.get("Content-Length", "")
        whole = have + int(length) if length.isdecimal() else None
        with (
            open(part, "ab" if have else "wb") as stream,
            tqdm(desc=f"Downloading {part.stem}", initial=have, total=whole, unit="B", unit_scale=True) as bar,
        ):
            response.raw.enforce_content_length = False  # what came of a block before the end is kept; fetch counts
            for block in response.iter_content(1 << 16):
                stream.write(block)
                bar.update(len(block))
    return whole


def _raise_for_status(response: "requests.Response") -> None:
    if response.status_code in PASSING:
        wait = response.headers.get("Retry-After", "")  # seconds; a date is taken for none
        raise Again(f"status {response.status_code}", min(float(wait) if wait.isdecimal() else 0.0, LONGEST_WAIT))
    response.raise_for_status()
