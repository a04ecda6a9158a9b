"""Imports run one way, private names of other packages live in one file, and `import hf_distill` is light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_distill"
# Lower layers first. A module may import its own layer and those below it.
LAYERS = (
    ("signals", "losses", "taps", "heads"),
    ("objectives",),
    ("training", "curricula", "teachers", "students", "baselines", "evaluation", "hub", "embedded"),
    ("methods",),
    (
        "recipe",
        "recipe_data",
        "recipe_evaluate",
        "recipe_preference",
        "recipe_classification",
        "recipe_domains",
        "recipe_embedded",
        "recipe_inputs",
        "recipe_miniplm",
        "recipe_objectives",
        "recipe_vlm",
        "testing",
        "testing_promises",
        "testing_worker",
        "tiny",
        "tiny_classifiers",
        "tiny_vlm",
        "cli",
        "demo",
        "__main__",
    ),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
COMPAT = PACKAGE / "training" / "compat.py"
INTERNAL_MODULES = ("trl.models.utils", "trl.trainer.utils", "trl.experimental", "trl.kernels")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of all that a file imports, in functions too, but not what only type checkers see."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative
                parts = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                base = ".".join(parts) + (f".{base}" if base else "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def test_a_module_has_no_place_in_the_layers():
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in files(PACKAGE)} - {"__init__"}
    assert names <= LEVEL.keys(), f"give {sorted(names - LEVEL.keys())} a place in LAYERS"


def test_a_lower_layer_imports_a_higher_one():
    wrong = []
    for path in files(PACKAGE):
        level = LEVEL.get(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), len(LAYERS))
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] == "hf_distill" and len(parts) > 1 and LEVEL.get(parts[1], 0) > level:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_private_names_are_imported_outside_compat():
    wrong = []
    for path in files(PACKAGE, ROOT / "recipes"):
        for line, name in imports(path):
            package, *rest = name.split(".")
            private = any(part.startswith("_") and not part.startswith("__") for part in rest)
            internal = name.startswith(tuple(module + "." for module in INTERNAL_MODULES)) or name in INTERNAL_MODULES
            if path != COMPAT and package in ("trl", "transformers", "accelerate", "peft") and (private or internal):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_importing_the_package_is_slow():
    code = "import sys, hf_distill; print(*{'transformers', 'trl', 'datasets'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
