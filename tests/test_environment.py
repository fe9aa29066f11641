"""Protects: both ways to install give the same pins, and CI runs what the README prints."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PINS = {
    canonicalize_name(name): Version(version)
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
EXTRAS = [Requirement(text) for extra in ("demo", "browser") for text in PROJECT["optional-dependencies"][extra]]


def test_conda_and_pip_install_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    setup = (ROOT / "scripts" / "setup.sh").read_text()
    install = next(line for line in setup.splitlines() if "pip install" in line)
    for words in pip:  # the same two arguments, nothing beside them
        flag, value = words.split()
        assert f"{flag} {value}" in install.replace("'", "")
    assert len(pip) == 2
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    python = next(entry.split("=")[1] for entry in conda if entry.startswith("python="))
    assert Version(python) in Requirement(f"python{PROJECT['requires-python']}").specifier
    assert {entry.split("=")[0] for entry in conda} == {"python", "pip"}


@pytest.mark.parametrize("requirement", REQUIREMENTS + EXTRAS, ids=lambda r: r.name)
def test_every_requirement_is_pinned_within_its_bound(requirement):
    pin = PINS[canonicalize_name(requirement.name)]
    assert pin in requirement.specifier
    assert [spec.operator for spec in requirement.specifier] == [">="], "lower bounds only"


def test_the_installed_versions_keep_the_bounds():
    for requirement in REQUIREMENTS:
        assert importlib.metadata.version(requirement.name) in requirement.specifier


def test_ci_runs_the_readmes_commands_as_printed():
    readme = (ROOT / "README.md").read_text()
    first = re.search(r"```bash\n(.*?)```", readme, re.DOTALL).group(1).split("\n")[:-1]
    commands = [line.split("#")[0].strip() for line in first]  # what stands before the remark
    assert commands == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(command in ci for command in commands)


def test_other_systems_get_a_sentence():
    """Where fcntl does not exist (Windows), importing says which systems are supported, without a traceback."""
    code = "import sys; sys.modules['fcntl'] = None; import vlmclassifier.runs"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "runs on Linux (macOS is untested)" in done.stderr


def test_the_active_environment_is_used_by_a_flag(tmp_path):
    """ACTIVE=1 installs into the active environment, once; without one it is refused."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "CONDA_PREFIX": str(tmp_path), "ACTIVE": "1"}
    for _ in range(2):
        done = subprocess.run(["bash", "scripts/setup.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls.count("pip install") == 1 and "--editable .[dev]" in calls and ".venv" not in done.stdout
    refused = subprocess.run(["bash", "scripts/test.sh"], cwd=ROOT, env={"PATH": "/usr/bin:/bin", "ACTIVE": "1"},
                             capture_output=True, text=True)  # fmt: skip
    assert refused.returncode == 1 and "ACTIVE=1, but no environment is active" in refused.stderr


def test_local_paths_win_and_leave_the_commit_clean(tmp_path, monkeypatch):
    from vlmclassifier import paths

    monkeypatch.setattr(paths, "PROJECT_ROOT", tmp_path)
    monkeypatch.delenv("VLMCLASSIFIER_PATHS", raising=False)
    (tmp_path / "paths.toml").write_text('[models]\na = "x"\nb = "y"\n[trusted_roots]\ndisk = "one"\n')
    assert paths.local_path("models", "a") == tmp_path / "x"
    (tmp_path / "paths.local.toml").write_text('[models]\na = "z"\n[trusted_roots]\ndisk = "two"\nother = "three"\n')
    assert [paths.local_path("models", key) for key in "abc"] == [tmp_path / "z", tmp_path / "y", None]
    assert paths.trusted_roots() == [tmp_path / "two", tmp_path / "three"]
    ignored = subprocess.run(["git", "check-ignore", "paths.local.toml"], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout.strip() == "paths.local.toml"
