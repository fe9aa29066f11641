"""Protects: no module imports a higher layer, no section another section, and the lower layers no torch."""

import ast
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "vlmclassifier"
LAYERS = [
    {"records"},
    {
        "paths",
        "images",
        "generated_images",
        "class_lists",
        "benchmarks",
        "prompts",
        "thoughts",
        "models",
        "identity",
        "arguments",
        "runs",
        "scoring",
        "counting",
        "questions",
        "tables",
        "importing",
        "preparing",
        "cli",
        "plane_figures",
    },
    {"plotting"},
    {"finite", "devices", "vlm", "clip", "api"},
    {"ranking", "probing", "finetuning", "checkpoints", "tiny", "mini", "answering", "asking"},
    {"reporting"},
    {"__main__"},
]
HEAVY = {"torch", "transformers", "open_clip", "torchvision", "scipy", "pandas", "timm", "matplotlib"}
SECTIONS = [
    "main_results", "inference_analysis", "feature_analysis", "data_analysis", "training_analysis", "imagewikiqa",
]  # fmt: skip


def imported_names(file: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports, including imports in functions unless `top_level_only`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(module: str) -> int:
    """The index in LAYERS of a module of the package."""
    return next(number for number, names in enumerate(LAYERS) if module in names)


def modules() -> dict[str, list[Path]]:
    """The files of every top-level module or subpackage of the package."""
    found: dict[str, list[Path]] = {}
    for file in PACKAGE.rglob("*.py"):
        found.setdefault(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(file)
    found.pop("__init__")
    return found


def test_no_module_imports_a_higher_layer():
    for module, files in modules().items():
        for file in files:
            for name in imported_names(file):
                parts = name.split(".")
                if parts[0] == "vlmclassifier" and len(parts) > 1:
                    assert layer(parts[1]) <= layer(module), f"{file.name} imports {name}"
                assert parts[0] not in {*SECTIONS, "scripts", "tests"}, f"{file.name} imports {name}"


def test_no_import_cycles():
    edges = {}
    for module, files in modules().items():
        names = set()
        for file in files:
            names |= {name.split(".")[1] for name in imported_names(file) if name.startswith("vlmclassifier.")}
        edges[module] = names - {module}
    while edges:
        leaves = {module for module, names in edges.items() if not names & set(edges)}
        assert leaves, f"a cycle among {sorted(edges)}"
        edges = {module: names for module, names in edges.items() if module not in leaves}


def test_lower_layers_import_nothing_heavy_at_module_level():
    for module, files in modules().items():
        if layer(module) <= 1:
            for file in files:
                heavy = {name.split(".")[0] for name in imported_names(file, top_level_only=True)} & HEAVY
                assert not heavy, f"{file.name} imports {heavy} at module level"


def test_lower_layers_load_nothing_heavy():
    names = ", ".join(f"vlmclassifier.{module}" for module in modules() if layer(module) <= 1)
    code = f"import sys, {names}; print(sorted({HEAVY!r} & set(sys.modules)))"
    new_interpreter = [sys.executable, "-c", code]  # the warm server has loaded all of them
    assert subprocess.check_output(new_interpreter, cwd=ROOT, text=True).strip() == "[]"


def test_sections_never_import_sections():
    for section in SECTIONS:
        for file in (ROOT / section).glob("*.py"):
            others = {name.split(".")[0] for name in imported_names(file)} & (
                {*SECTIONS, "scripts", "tests"} - {section}
            )
            assert not others, f"{file} imports {others}"


def test_no_script_shadows_an_imported_module():
    reserved = set(sys.stdlib_module_names) | HEAVY | {"tokenizers", "datasets", "peft"}
    for folder in [*SECTIONS, "scripts"]:
        for file in (ROOT / folder).glob("*.py"):
            assert file.stem not in reserved, f"{file} shadows the module {file.stem}"
