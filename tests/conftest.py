"""Shared fixtures: miniatures on disk, images (real ones where they are at hand), scripts as functions."""

import contextlib
import fcntl
import glob
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"  # the tests never wait for a network
os.environ.pop("VLMCLASSIFIER_PATHS", None)
ROOT = Path(__file__).resolve().parent.parent
REALDATA = os.environ.get("VLMCLASSIFIER_REALDATA")


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real images; CI always has it."""
    if not REALDATA:
        pytest.skip("VLMCLASSIFIER_REALDATA is not set")
    return Path(REALDATA)


@pytest.fixture(scope="session")
def labels(realdata) -> Path:
    """The exact class lists and split manifests beside the images."""
    return realdata.parent / "labels"


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Folders that all test processes share: the first that wants one makes it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make) -> Path:
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (base / name).exists():
                make(base / f"{name}.new")
                (base / f"{name}.new").rename(base / name)
        return base / name

    return made


@pytest.fixture(scope="session")
def images(once) -> Path:
    """A data root with the manifests of the four benchmarks: real images, else generated images."""
    if REALDATA:
        return Path(REALDATA)
    module = script("scripts/make_images.py")
    return once("images", lambda out: module.main(module.Args(out=out, count=60)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no worker is left alone with one (with --no-loadscope-reorder)."""
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


@pytest.fixture(scope="session")
def tiny(once) -> Path:
    """One miniature checkpoint folder per model that has one, TINY/KEY."""
    from vlmclassifier.models import MODELS
    from vlmclassifier.tiny import has_miniature, make_tiny

    return once(
        "tiny", lambda out: [make_tiny(spec, out / spec.key) for spec in filter(has_miniature, MODELS.values())]
    )


@pytest.fixture(scope="session")
def figures_root(once) -> Path:
    """PlaneFigures with 3 train images and 1 test image per class."""
    module = script("scripts/make_plane_figures.py")
    return once("figures", lambda out: module.main(module.Args(out=out, train=3, test=1)))


@pytest.fixture(scope="session")
def trained(figures_root, once) -> Path:
    """Mini checkpoints of a few steps, TRAINED/{clip,lm,vlm}, by the script: CLIP and language model side by side."""
    return once("trained", lambda out: pretrain(figures_root, out))


def pretrain(images: Path, out: Path, **more: object) -> None:
    """The training script with a handful of steps."""
    module = script("training_analysis/pretrain_mini.py")
    settings = {"data_root": images, "preset": "smoke", "clip_steps": 6, "vlm_steps": 20, "evaluate": False} | more
    module.main(module.Args(out=out, **settings))


@pytest.fixture
def own(tmp_path) -> "Own":
    """A small benchmark of one's own, to break in many ways."""
    return Own(tmp_path)


class Own:
    """Three images, two classes, a manifest: `args` are the flags that name it."""

    def __init__(self, folder: Path) -> None:
        from PIL import Image

        self.folder = folder
        self.manifest, self.classes = folder / "mine.jsonl", folder / "classes.json"
        self.rows = [{"image": f"{i}.png", "label": ["cat", "dog"][i % 2], "split": "test"} for i in range(3)]
        for i in range(3):
            Image.new("RGB", (30, 20), (80 * i, 10, 10)).save(folder / f"{i}.png")
        self.classes.write_text('["cat", "dog"]')
        self.write()

    def write(self, *extra: str) -> None:
        self.manifest.write_text("\n".join([*map(json.dumps, self.rows), *extra]) + "\n")

    @property
    def args(self) -> dict:
        return {"benchmark": str(self.manifest), "classes": self.classes}


def noise(size: tuple[int, int], seed: int = 0) -> "Image.Image":
    """An image of noise, the same in every run."""
    import numpy as np
    from PIL import Image

    width, height = size
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def script(path: str):
    """A script of the project as a module, so that a test can call its `main` without a new process."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = sys.modules.setdefault(path, importlib.util.module_from_spec(spec))
    if not hasattr(module, "Args"):
        sys.path.insert(0, str((ROOT / path).parent))  # as when it is run
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str((ROOT / path).parent))
    return module


def run_script(*command: object, env: dict | None = None, check: bool = True) -> subprocess.CompletedProcess:
    """Run a script, a module (-m) or a launcher (bash FILE) in a process of its own, from the project's root."""
    process = start_script(*command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stdout, stderr = process.communicate()
    assert not check or process.returncode == 0, stderr
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start_script(*command: object, env: dict | None = None, **options: object) -> subprocess.Popen:
    """Start what `run_script` runs; `options` go to Popen.

    Scripts, and processes of accelerate's launcher, are forked by the warm server, which has the imports loaded;
    options of the interpreter need a new one.
    """
    words = [str(word) for word in command]
    python = str(ROOT / "tests" / "warm_python")
    warm = {"WARM_SERVER": warm_server(), "WARM_INTERPRETER": sys.executable}
    environment = {**os.environ, **warm, "PYTHON": python, "PYTHON_EXEC": python, **(env or {})}
    words = words if words[0].endswith("bash") else [python, *words]
    return subprocess.Popen(words, cwd=ROOT, env=environment, **options)


def kill_script(process: subprocess.Popen, pid_file: Path) -> None:
    """SIGKILL for a script whose environment has WARM_PID_FILE=`pid_file`."""
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    assert process.wait() == 128 + signal.SIGKILL


def warm_server() -> str:
    """The socket of the session's warm server (tests/warm_server.py), which is started by the first that needs it."""
    session = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    place = Path(tempfile.gettempdir()) / f"vlmclassifier-warm-{session}"
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            words = [sys.executable, str(ROOT / "tests" / "warm_server.py"), str(place), str(session)]
            server = subprocess.Popen(words, cwd=ROOT, start_new_session=True)
            while not place.exists():
                assert server.poll() is None, "the warm server ended"
                time.sleep(0.05)
    return str(place)


@contextlib.contextmanager
def starting_line(folder: Path, processes: int):
    """Hold every lease of a run until this many processes have opened it: they begin together on a busy machine too."""
    folder.mkdir()
    with open(folder / ".lock", "a+b") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX, 1 << 30, 0)
        yield
        deadline = time.monotonic() + 300
        while _holders(folder / ".lock") < processes + 1:  # this process is one
            assert time.monotonic() < deadline, "the processes did not open the run"
            time.sleep(0.05)


def _holders(file: Path) -> int:
    pids = set()
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # the process ended meanwhile
            if os.readlink(link) == str(file):
                pids.add(link.split("/")[2])
    return len(pids)
