"""Imports point one way: a part uses only what stands above it in this list. Package faces count as imports."""

import ast
from pathlib import Path

import quantkit

ORDER = [
    "errors",
    "sizes",
    "tensors",
    "bundle",
    "ranks",
    "progress",
    "container",
    "machine",
    "ggml",
    "codecs",
    "formats",
    "remote",
    "models",
    "planning",
    "runtime",
    "serving",
    "calibration",
    "encoding",
    "evaluation",
    "job",
    "cli",
    "__main__",
]
PACKAGE = Path(quantkit.__file__).parent


def imported(path: Path) -> set[str]:
    """Top-level parts of quantkit that a module imports, relative imports included."""
    found = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("quantkit.")}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            if node.level == 0 and module[0] == "quantkit":
                found |= {module[1]} if len(module) > 1 else {name.name for name in node.names}
            elif node.level and node.level == depth:
                found |= {module[0]} if module[0] else {name.name for name in node.names}
    return found - {"__version__"}


def test_imports_point_one_way():
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        later = set(ORDER[ORDER.index(part) + 1 :])
        assert not imported(path) & later, f"{path.name} imports {imported(path) & later}"


def bound(path: Path) -> set[str]:
    """Names that a module has: what it defines, assigns and imports, under `if` and `try` too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom):
            found |= {name.asname or name.name for name in node.names}
    return found


def test_scripts_import_what_there_is():
    """Few tests run them, and some need what is not installed: what they take from the package is looked up."""
    for script in (PACKAGE.parent / "scripts").rglob("*.py"):
        for node in ast.walk(ast.parse(script.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "quantkit":
                path = PACKAGE.joinpath(*str(node.module).split(".")[1:])
                there = (
                    {inner.stem if inner.suffix else inner.name for inner in path.iterdir()} if path.is_dir() else set()
                )
                there |= bound(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))
                missing = {name.name for name in node.names} - there
                assert not missing, f"{script.name}: {node.module} has no {', '.join(sorted(missing))}"
