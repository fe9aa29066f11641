"""Advisory locks on a run folder, released by the operating system when their holder dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmclassifier.records import UserError

try:
    import fcntl
except ImportError:  # on Windows
    raise SystemExit(
        "error: vlmclassifier runs on Linux (macOS is untested), because its run folders need POSIX file locks: on "
        "Windows use the Windows Subsystem for Linux."
    ) from None

FOLDER_BYTE = 1 << 40  # guards run.json, the choice of part files and the merge
ALIVE_BYTE = FOLDER_BYTE + 1  # shared by the processes that have the run open


class FolderLocks:
    """Locks on single bytes of FOLDER/.lock (`fcntl.lockf`). Byte n is the lease that starts at example n."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = open(folder / ".lock", "a+b")  # noqa: SIM115 - held until `close`, which drops every lock

    def acquire(self, byte: int, wait: bool = False, shared: bool = False) -> bool:
        """Lock one byte; False when another process holds it. Raises UserError on a file system without locks."""
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.lockf(self._file, kind | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise UserError(
                f"{self.folder} is on a file system without locks ({error}): choose another --out."
            ) from None
        return True

    def release(self, byte: int) -> None:
        """Unlock one byte."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)

    @contextmanager
    def whole_folder(self) -> Iterator[None]:
        """Hold the lock that guards run.json, part files and the merge; waits for other processes."""
        self.acquire(FOLDER_BYTE, wait=True)
        try:
            yield
        finally:
            self.release(FOLDER_BYTE)

    def close(self) -> None:
        """Drop every lock."""
        self._file.close()


def open_locked(path: Path) -> Any:
    """The file, opened (created where absent) and locked while it is open; None when another process holds it."""
    file = open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
