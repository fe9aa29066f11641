"""Safe unpacking of tar and zip archives: links, paths outside the target folder and excessive growth are refused."""

import errno
import gzip
import lzma
import shutil
import stat
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from vlmclassifier.preparing.downloads import locked_folder
from vlmclassifier.records import UserError

MAX_GROWTH = 20  # times the archive's size: images hardly compress, so an archive that grows more is a bomb
EXTRA_BYTES = 100 << 20  # that every archive may grow by, whatever its size
BLOCK_BYTES = 4096  # the least that a member takes on a disk
MAX_HEADER_BYTES = 1 << 20  # tarfile reads a header that extends another header into memory as a whole
DAMAGED_ERRORS = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
UNSUPPORTED_ERRORS = (NotImplementedError, RuntimeError)  # zipfile's errors for other compressions and passwords


class UnsafeMember(Exception):
    """A member of an archive that no data set needs, such as a link."""


class _LimitedHeader(tarfile.TarInfo):
    """A tar header that is refused when the extension of the next header would fill the memory."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_LimitedHeader":
        header = super().frombuf(buf, encoding, errors)
        is_extension = header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
                                       tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)  # fmt: skip
        if is_extension and header.size > MAX_HEADER_BYTES:
            raise UnsafeMember(f"a header of {header.size} bytes")
        return header


def unpack(archive: Path, folder: Path, subfolder: str = "", expected: str = "") -> None:
    """Unpack a tar or zip file into `folder`, completely or not at all.

    `subfolder`: name of a new folder there for all members, for an archive without a top folder. `expected`: name of
    the folder that unpacking creates; if it exists by now, another process has unpacked the archive.

    Raises UserError for a damaged archive, for one with links or with paths outside the folder, for one that grows
    too much, and when a part of its content exists already.
    """
    with locked_folder(folder), _temporary_folder(folder / f".{archive.name}.unpacking") as temporary:
        if expected and (folder / expected).is_dir():
            return
        _unpack(archive, temporary)
        for leftover in [*temporary.glob("__MACOSX"), *temporary.glob("._*"), *temporary.glob(".DS_Store")]:
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        if subfolder:
            targets = {temporary: folder / subfolder}
        else:
            targets = {entry: folder / entry.name for entry in sorted(temporary.iterdir())}
        for target in targets.values():
            if target.exists():
                raise UserError(f"{target} exists already but is incomplete: remove it and run again.")
        for entry, target in targets.items():
            entry.rename(target)


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack by the type of the archive. Raises UserError that says what is wrong with the archive."""
    remedy = "remove it and get it again"
    try:
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, folder)
        else:
            _unpack_tar(archive, folder)
    except (tarfile.FilterError, UnsafeMember) as error:
        raise UserError(f"{archive} is refused ({error}): it is unsafe; get it from another source.") from None
    except DAMAGED_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{archive} cannot be unpacked ({reason}): it is truncated, damaged or not an archive; {remedy}."
        ) from None
    except UNSUPPORTED_ERRORS as error:
        raise UserError(f"{archive} cannot be unpacked ({error}): unpack it yourself, or {remedy}.") from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(f"{archive} contains a file name that is too long for this disk: {remedy}.") from None


@contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)  # the leftover of a process that was killed
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _size_counter(archive: Path) -> Callable[[int], None]:
    """Return a function that adds up unpacked bytes and raises UserError when the archive grows too much."""
    limit = MAX_GROWTH * archive.stat().st_size + EXTRA_BYTES
    total = 0

    def count(size: int) -> None:
        nonlocal total
        total += max(size, BLOCK_BYTES)
        if total > limit:
            raise UserError(
                f"{archive} exceeds {limit >> 20} MiB when it is unpacked, too much for its size: get it from another "
                "source."
            )

    return count


def _unpack_tar(archive: Path, folder: Path) -> None:
    from tqdm import tqdm

    count = _size_counter(archive)
    with (
        tarfile.open(archive, tarinfo=_LimitedHeader) as tar,
        tqdm(desc=f"Unpacking {archive.name}", unit="file", disable=None, file=sys.stderr) as bar,
    ):

        def check_member(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
            if member.islnk() or member.issym():  # the data filter would accept links that stay inside the folder
                raise UnsafeMember(f"{member.name!r} is a link")
            count(member.size)
            bar.update()
            return tarfile.data_filter(member, path)

        tar.extractall(folder, filter=check_member)
        while block := tar.fileobj.read(1 << 20):  # the checksum of a .gz comes after the last member
            count(len(block))


def _unpack_zip(archive: Path, folder: Path) -> None:
    from tqdm import tqdm

    count = _size_counter(archive)
    with zipfile.ZipFile(archive) as opened:
        for member in tqdm(opened.infolist(), desc=f"Unpacking {archive.name}", unit="file", disable=None):
            path = PurePosixPath(member.filename)
            if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
                raise UnsafeMember(f"{member.filename!r} would be written outside the folder")
            if stat.S_ISLNK(member.external_attr >> 16):
                raise UnsafeMember(f"{member.filename!r} is a link")
            count(member.file_size)
            opened.extract(member, folder)
