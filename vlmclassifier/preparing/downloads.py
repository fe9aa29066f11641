"""Official files, found on the disk or downloaded: downloads are resumed, checksums are checked."""

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

MAX_ATTEMPTS = 5  # consecutive attempts of a download that bring no new bytes
RETRY_STATUSES = {408, 429, 500, 502, 503, 504}  # temporary failures of a server
# Errors of a folder that cannot be written to or has no file locks.
UNWRITABLE_ERRORS = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
MAX_WAIT = 60  # seconds between two attempts, even if Retry-After asks for more


class MissingFileError(UserError):
    """An official file that is not on the disk and cannot or must not be downloaded."""


class RetryLater(Exception):
    """A temporary failure of the server; `args` are the reason and the seconds to wait."""


@dataclass(frozen=True)
class RemoteFile:
    """One official file. `url` is None when it can no longer be downloaded, `md5` is None when none is published."""

    name: str
    url: str | None
    md5: str | None


def find_or_fetch(remote: RemoteFile, folders: Sequence[Path], download: bool, any_checksum: bool, remedy: str) -> Path:
    """Return the official file in one of `folders`, or download it into the first; its checksum is checked.

    `remedy`: what the user can do when the file is missing, for the error message.

    Raises MissingFileError when the file does not exist and cannot be downloaded, UserError for a wrong checksum.
    """
    file = next((folder / remote.name for folder in folders if (folder / remote.name).is_file()), None)
    if file is None:
        file = folders[0] / remote.name
        if remote.url is None or not download:
            raise MissingFileError(f"{file} does not exist and was not downloaded: {remedy}.")
        fetch(remote.url, file)
    if not any_checksum and remote.md5 and (found := checksum(file)) != remote.md5:
        raise UserError(
            f"{file} has the MD5 checksum {found}, the official one is {remote.md5}: remove it to download it again, "
            "or add --any-checksum if you trust this copy."
        )
    return file


def checksum(file: Path) -> str:
    """The MD5 checksum of a file; MD5 is what the authors of the data sets publish."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create the folder if needed and lock it against other processes that prepare data in it.

    Raises UserError when another process holds the lock, or when the folder cannot be written to.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".preparing.lock", blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"Another process is writing to {folder}: wait until it is done, then run again.") from None
    except FileExistsError:
        raise UserError(f"{folder} is a file: give the folder that contains it.") from None
    except OSError as error:
        if error.errno not in UNWRITABLE_ERRORS:
            raise
        raise UserError(f"{folder} cannot be written to or locked ({error.strerror}): add --unpack-into DIR.") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def fetch(url: str, file: Path) -> None:
    """Download a file with a progress bar; an interrupted download is resumed, also by a later call.

    Raises UserError when the server refuses, or when MAX_ATTEMPTS consecutive attempts bring no new bytes.
    """
    with locked_folder(file.parent):
        if file.is_file():  # another process has downloaded it
            return
        _fetch(url, file, file.with_name(f"{file.name}.part"))


def _fetch(url: str, file: Path, part: Path) -> None:
    import requests

    attempts_without_progress = 0
    reason = ""
    while attempts_without_progress < MAX_ATTEMPTS:
        have = part.stat().st_size if part.exists() else 0
        wait = 0.0
        try:
            total = _receive(url, part, have)
            if total is None or part.stat().st_size == total:
                os.replace(part, file)
                return
            reason = f"{part.stat().st_size} of {total} bytes received"
        except RetryLater as error:
            reason, wait = error.args
        except requests.HTTPError as error:
            raise UserError(f"{url} cannot be downloaded ({error}): see data/README.md for other sources.") from None
        except requests.RequestException as error:
            reason = type(error).__name__
        if part.exists() and part.stat().st_size > have:
            attempts_without_progress = 0
        else:
            attempts_without_progress += 1
        time.sleep(max(wait, min(attempts_without_progress, 3)))
    raise UserError(
        f"{url} sent no new bytes in {MAX_ATTEMPTS} attempts ({reason}): run the same command again to resume the "
        "download."
    )


def _receive(url: str, part: Path, have: int) -> int | None:
    """Append the bytes after the first `have` to `part`; return the file's total bytes, None when it is unknown."""
    import requests
    from tqdm import tqdm

    headers = {"Range": f"bytes={have}-"} if have else {}
    headers["Accept-Encoding"] = "identity"  # so that Content-Length is the length of the file
    with requests.get(url, headers=headers, stream=True, timeout=60) as response:
        if response.status_code == 416:  # no bytes after `have`: the file is complete, or has been replaced
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if total != str(have):
                part.write_bytes(b"")
                return -1
            return have
        _raise_for_status(response)
        if response.status_code != 206:
            have = 0  # a server without range requests sends the whole file
        length = response.headers.get("Content-Length", "")
        total_bytes = have + int(length) if length.isdecimal() else None
        with (
            open(part, "ab" if have else "wb") as stream,
            tqdm(desc=f"Downloading {part.stem}", initial=have, total=total_bytes, unit="B", unit_scale=True) as bar,
        ):
            # With the check, urllib3 would drop the last bytes before a broken connection; `_fetch` compares the sizes.
            response.raw.enforce_content_length = False
            for block in response.iter_content(1 << 16):
                stream.write(block)
                bar.update(len(block))
    return total_bytes


def _raise_for_status(response: "requests.Response") -> None:
    if response.status_code in RETRY_STATUSES:
        retry_after = response.headers.get("Retry-After", "")
        wait = float(retry_after) if retry_after.isdecimal() else 0.0  # seconds; the date form is ignored
        raise RetryLater(f"status {response.status_code}", min(wait, MAX_WAIT))
    response.raise_for_status()
