"""What a run was made with: the checkpoint's content, the packages' versions, the commit."""

import contextlib
import hashlib
import importlib.metadata
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlmclassifier.models import CHECKPOINT_FILES
from vlmclassifier.paths import PROJECT_ROOT

PACKAGES = ("torch", "transformers", "open_clip_torch", "accelerate", "peft", "numpy", "pillow", "openai", "anthropic",
            "google-genai")  # fmt: skip


def fingerprint(checkpoint: Path) -> str:
    """SHA-256 over the names and contents of a checkpoint's files: the same on every machine, whatever the path.

    A file's digest is remembered in the user's cache folder by path, size and time of change, so that a launcher that
    skips finished runs does not read every checkpoint again.
    """
    files = [checkpoint] if checkpoint.is_file() else sorted(f for p in CHECKPOINT_FILES for f in checkpoint.glob(p))
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vlmclassifier" / "digests"

    def digest(file: Path) -> str:
        stat = file.stat()
        identity = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
        known = cache / hashlib.sha256(identity.encode()).hexdigest()
        if known.is_file() and len(text := known.read_text()) == 64:
            return text
        with open(file, "rb") as stream:
            value = hashlib.file_digest(stream, "sha256").hexdigest()
        with contextlib.suppress(OSError):  # a cache that cannot be written is no mistake
            cache.mkdir(parents=True, exist_ok=True)
            known.write_text(value)
        return value

    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter lock
        lines = [f"{file.name} {value}\n" for file, value in zip(files, pool.map(digest, files), strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def ids_hash(ids: Sequence[str]) -> str:
    """SHA-256 of example ids in their order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of the packages that the numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """The commit of the project's checkout, "-dirty" when files differ from it; None outside a checkout."""
    command = ["git", "-C", str(PROJECT_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
