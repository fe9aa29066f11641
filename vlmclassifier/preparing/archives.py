"""Archives, unpacked without leaving their folder, without links and without growing beyond reason."""

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

from vlmclassifier.preparing.downloads import writing_alone
from vlmclassifier.records import UserError

GROWTH = 20  # photographs hardly shrink: an archive that grows by more than this is a bomb
SPARE = 100 << 20  # bytes that any archive may grow by
BLOCK = 4096  # bytes that a member takes on a disk at least
LONGEST_HEADER = 1 << 20  # bytes; tarfile reads a header that extends another one as a whole
BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
UNUSABLE = (NotImplementedError, RuntimeError)  # what zipfile says of other compressions, and of a password


class Refused(Exception):
    """A member of an archive that a data set has no use for."""


class _Header(tarfile.TarInfo):
    """A tar header that is refused when what extends it would fill the memory."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        extends = header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
                                  tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)  # fmt: skip
        if extends and header.size > LONGEST_HEADER:
            raise Refused(f"a header of {header.size} bytes")
        return header


def unpack(archive: Path, folder: Path, name: str = "", wanted: str = "") -> None:
    """Unpack a tar or zip file into `folder`, all of it or nothing.

    `name`: the new folder there that takes all of it, where the archive has none at its top. `wanted`: what is wanted
    of it; where that is there by now, another process was faster.

    Raises UserError for a broken archive, for one that holds links or paths that leave the folder, for one that grows
    beyond reason, and where something of its content is there already.
    """
    with writing_alone(folder), _emptied(folder / f".{archive.name}.unpacking") as temporary:
        if wanted and (folder / wanted).is_dir():
            return
        _unpack(archive, temporary)
        for leftover in [*temporary.glob("__MACOSX"), *temporary.glob("._*"), *temporary.glob(".DS_Store")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        entries = {temporary: name} if name else {entry: entry.name for entry in sorted(temporary.iterdir())}
        for target in entries.values():
            if (folder / target).exists():
                raise UserError(f"{folder / target} is there, but not whole: remove it and run again.")
        for entry, target in entries.items():
            entry.rename(folder / target)


def _unpack(archive: Path, folder: Path) -> None:
    """Dispatch by kind, and say in a sentence what is wrong with the archive."""
    another = "remove it and get it again"
    try:
        (_unpack_zip if zipfile.is_zipfile(archive) else _unpack_tar)(archive, folder)
    except (tarfile.FilterError, Refused) as error:
        raise UserError(f"{archive} is refused ({error}): do not trust it, get it from another source.") from None
    except BROKEN as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{archive} cannot be unpacked ({reason}): it is cut short or damaged or no archive; {another}."
        ) from None
    except UNUSABLE as error:
        raise UserError(f"{archive} cannot be unpacked ({error}): unpack it yourself, or {another}.") from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(f"{archive} holds a file name that is too long for this disk: {another}.") from None


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
        total += max(size, BLOCK)
        if total > most:
            raise UserError(f"{archive} grows beyond {most >> 20} MiB when it is unpacked: do not trust it.")

    return count


def _unpack_tar(archive: Path, folder: Path) -> None:
    from tqdm import tqdm

    count = _limit(archive)
    with (
        tarfile.open(archive, tarinfo=_Header) as tar,
        tqdm(desc=f"Unpacking {archive.name}", unit="file", disable=None, file=sys.stderr) as bar,
    ):

        def checked(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
            if member.islnk() or member.issym():  # the data filter would let those pass that stay inside
                raise Refused(f"{member.name!r} is a link")
            count(member.size)
            bar.update()
            return tarfile.data_filter(member, path)

        tar.extractall(folder, filter=checked)
        while block := tar.fileobj.read(1 << 20):  # the checksum of a .gz comes after the last member
            count(len(block))


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
