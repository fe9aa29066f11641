"""Protects: nothing imports upward, sections never import sections, the lower floors import no torch."""

import ast
import sys
from pathlib import Path

from conftest import ROOT, run_script

PACKAGE = ROOT / "vlmclassifier"
FLOORS = [
    {"records"},
    {
        "paths",
        "images",
        "benchmarks",
        "prompts",
        "models",
        "scoring",
        "provenance",
        "runs",
        "values",
        "tables",
        "findings",
        "importing",
        "preparing",
        "cli",
        "plane_figures",
    },
    {"devices", "vlm", "clip", "api"},
    {"ranking", "probing", "finetuning", "checkpoints", "tiny", "pretraining"},
]
HEAVY = {"torch", "transformers", "open_clip", "torchvision", "scipy", "pandas", "timm", "matplotlib"}
SECTIONS = [
    "main_results", "inference_analysis", "feature_analysis", "data_analysis", "training_analysis", "imagewikiqa",
]  # fmt: skip


def imported(file: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports, in functions too unless `top_level_only`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor(module: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if module in names)


def modules() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in PACKAGE.rglob("*.py"):
        found.setdefault(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(file)
    found.pop("__init__")
    return found


def test_nothing_imports_upward():
    for module, files in modules().items():
        for file in files:
            for name in imported(file):
                parts = name.split(".")
                if parts[0] == "vlmclassifier" and len(parts) > 1:
                    assert floor(parts[1]) <= floor(module), f"{file.name} imports {name}"
                assert parts[0] not in {*SECTIONS, "scripts", "tests"}, f"{file.name} imports {name}"


def test_there_is_no_circle():
    edges = {}
    for module, files in modules().items():
        names = {name.split(".")[1] for f in files for name in imported(f) if name.startswith("vlmclassifier.")}
        edges[module] = names - {module}
    while edges:
        leaves = {module for module, names in edges.items() if not names & set(edges)}
        assert leaves, f"a circle among {sorted(edges)}"
        edges = {module: names for module, names in edges.items() if module not in leaves}


def test_the_lower_floors_import_nothing_heavy():
    for module, files in modules().items():
        if floor(module) <= 1:
            for file in files:
                heavy = {name.split(".")[0] for name in imported(file, top_level_only=True)} & HEAVY
                assert not heavy, f"{file.name} imports {heavy} at the top"


def test_the_lower_floors_load_no_torch():
    names = ", ".join(f"vlmclassifier.{module}" for module in modules() if floor(module) <= 1)
    code = f"import sys, {names}; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert run_script("-c", code).stdout.strip() == "[]"


def test_sections_never_import_sections():
    for section in SECTIONS:
        for file in (ROOT / section).glob("*.py"):
            others = {name.split(".")[0] for name in imported(file)} & ({*SECTIONS, "scripts", "tests"} - {section})
            assert not others, f"{file} imports {others}"


def test_no_file_is_named_after_an_import():
    taken = set(sys.stdlib_module_names) | HEAVY | {"tokenizers", "datasets", "peft"}
    for folder in [*SECTIONS, "scripts"]:
        for file in (ROOT / folder).glob("*.py"):
            assert file.stem not in taken, f"{file} would hijack {file.stem}"
