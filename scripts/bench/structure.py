"""How Python packages are built: files, functions, signatures, docstrings, imports. Prints a row of a table for each.

    python scripts/bench/structure.py quantkit nano-vllm/nanovllm tinygrad/tinygrad/llm

Figures: docs/results/structure.md. tests/test_structure.py holds quantkit to its limits, with these counts.
"""

import argparse
import ast
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from statistics import median

Function = ast.FunctionDef | ast.AsyncFunctionDef
Graph = dict[str, set[str]]
LONG_FILE, LONG_FUNCTION, MANY = 400, 50, 7
HEAD = (
    "package | files, lines | root modules | median file, over 400 | function median, 99 %, over 50 | "
    "signatures over 7 | public without docstring | cyclic groups (with faces) | longest import chain | "
    "fmt: skip | README words"
)


class Package:
    """The sources under a folder that is a package."""

    def __init__(self, path: Path):
        self.path = path.resolve()
        self.texts = {file: file.read_text(encoding="utf-8") for file in sorted(self.path.rglob("*.py"))}
        self.trees = {file: ast.parse(text) for file, text in self.texts.items()}

    def place(self, file: Path, node: ast.stmt) -> str:
        """Where a reader finds it."""
        return f"{file.relative_to(self.path)}:{node.lineno} {getattr(node, 'name', '')}"

    def functions(self) -> Iterator[tuple[str, Function]]:
        """Every function with its place."""
        for file, tree in self.trees.items():
            yield from ((self.place(file, node), node) for node in ast.walk(tree) if isinstance(node, Function))

    def public(self) -> Iterator[tuple[str, ast.ClassDef | Function]]:
        """Classes, functions and methods that a reader may use, with their places."""
        for file, tree in self.trees.items():
            yield from ((self.place(file, node), node) for node in public(tree))

    def root_modules(self) -> list[str]:
        """Names of the modules that stand in no folder."""
        return [file.stem for file in self.texts if file.parent == self.path and not file.stem.startswith("__")]

    def skips(self) -> int:
        """Places that the formatter is kept from."""
        return sum(text.count(mark) for text in self.texts.values() for mark in ("fmt: " + "skip", "fmt: " + "off"))

    def name_of(self, file: Path) -> str:
        """The module's."""
        parts = file.relative_to(self.path.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def imports(self) -> Graph:
        """Module -> modules of the package that it imports, inside functions too; not for type checkers alone."""
        names = {self.name_of(file) for file in self.texts}
        found: Graph = {}
        for file, tree in self.trees.items():
            module = self.name_of(file)
            around = [*module.split("."), *(("",) if file.stem == "__init__" else ())]
            wanted = set()
            for node in _run(tree):
                if isinstance(node, ast.Import):
                    wanted |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    base = ".".join(
                        [*around[: -node.level], *filter(None, [node.module])] if node.level else [node.module]
                    )
                    wanted |= {full if (full := f"{base}.{alias.name}") in names else base for alias in node.names}
            found[module] = (wanted & names) - {module}
        return found

    @cached_property
    def with_faces(self) -> Graph:
        """`imports`, and with each module the packages around it, whose __init__ runs first."""
        graph = {}
        for module, wanted in self.imports.items():
            faces = {".".join(name.split(".")[:n]) for name in wanted for n in range(2, name.count(".") + 1)}
            known = faces & set(self.imports)
            graph[module] = wanted | {face for face in known if not f"{module}.".startswith(f"{face}.")}
        return graph


def public(tree: ast.AST) -> Iterator[ast.ClassDef | Function]:
    """Not what stands inside functions or private classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def _run(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run: without those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from _run(node)


def n_lines(node: Function) -> int:
    """From `def` to its last line."""
    return (node.end_lineno or 0) - node.lineno + 1


def n_parameters(node: Function) -> int:
    """self and cls not counted."""
    a = node.args
    bound = bool(a.args) and a.args[0].arg in ("self", "cls")
    return len(a.posonlyargs + a.args + a.kwonlyargs) - bound


def cycles(graph: Graph) -> list[set[str]]:
    """Groups of modules that import each other, directly or not."""
    below = {module: _below(graph, module) for module in graph}
    groups = {frozenset({a, *(b for b in below[a] if a in below[b])}) for a in graph if a in below[a]}
    return [set(group) for group in groups]


def _below(graph: Graph, module: str) -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def longest_chain(graph: Graph) -> list[str]:
    """Of imports, the importing module first; a module of a cycle is passed once."""
    known: dict[str, list[str]] = {}

    def from_here(module: str, above: tuple[str, ...]) -> list[str]:
        if module not in known:
            ways = (from_here(name, (*above, module)) for name in graph[module] if name not in above)
            known[module] = [module, *max(ways, key=len, default=[])]
        return known[module]

    return max((from_here(module, ()) for module in graph), key=len)


def row(package: Package) -> str:
    """The figures under HEAD."""
    files = [text.count("\n") for text in package.texts.values()]
    lengths = sorted(n_lines(node) for _, node in package.functions())
    named = [node for _, node in package.public()]
    without = sum(not ast.get_docstring(node) for node in named) / max(1, len(named))
    readme = next((p / "README.md" for p in package.path.parents if (p / "README.md").exists()), None)
    cells = (
        package.path.name,
        f"{len(files)}, {sum(files):,}",
        f"{len(package.root_modules())}",
        f"{median(files):.0f}, {sum(n > LONG_FILE for n in files)}",
        f"{median(lengths):.0f}, {lengths[len(lengths) * 99 // 100]}, {sum(n > LONG_FUNCTION for n in lengths)}",
        f"{sum(n_parameters(node) > MANY for _, node in package.functions())}",
        f"{100 * without:.1f} %",
        f"{len(cycles(package.imports))} ({len(cycles(package.with_faces))})",
        f"{len(longest_chain(package.imports))}",
        f"{package.skips()}",
        f"{len(readme.read_text(encoding='utf-8').split()):,}" if readme else "–",
    )
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path, help="Folders with an __init__.py.")
    print(HEAD, *(row(Package(path)) for path in parser.parse_args().packages), sep="\n")


if __name__ == "__main__":
    main()
