"""The house stays one that a reader finds the way in: sizes, names, imports. Kernels may be long."""

import ast
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import quantkit

PACKAGE = Path(quantkit.__file__).parent
FILES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_CHAIN = 400, 50, 10
MOST_PARAMETERS, MOST_WITH_MORE = 7, 15
MOST_ROOT_MODULES, MOST_SKIPS, MOST_UNDOCUMENTED = 9, 10, 0.05

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    """Every function with its place."""
    for path, tree in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", node


def compiled(node: Function) -> bool:
    """Whether numba or Triton makes machine code of it."""
    return any("jit" in ast.unparse(d) or ast.unparse(d) == "part" for d in node.decorator_list)


def public(tree: ast.AST) -> Iterator[ast.ClassDef | Function]:
    """Classes, functions and methods that a reader may use; not what stands inside functions or private classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, inside functions too; not for type checkers alone."""
    names = {name_of(path) for path in FILES}
    found: dict[str, set[str]] = {}
    for path, tree in FILES.items():
        blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        hidden = {id(inner) for block in blocks for inner in ast.walk(block)}
        wanted = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in hidden:
                assert node.level == 0, f"{path}: relative import"
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                wanted |= {name if name in names else node.module or "" for name in full}
        found[name_of(path)] = (wanted & names) - {name_of(path)}
    return found


def with_faces() -> dict[str, set[str]]:
    """`imports`, and with each module the packages around it, whose __init__ runs first."""
    graph = {}
    for module, wanted in imports().items():
        faces = {".".join(name.split(".")[:n]) for name in wanted for n in range(2, name.count(".") + 1)}
        graph[module] = wanted | {face for face in faces if not f"{module}.".startswith(f"{face}.")}
    return graph


def chain(graph: dict[str, set[str]], module: str, above: tuple[str, ...], known: dict[str, list[str]]) -> list[str]:
    """The longest chain of imports from a module; a cycle fails."""
    assert module not in above, f"a cycle: {' > '.join([*above[above.index(module) :], module])}"
    if module not in known:
        below = (chain(graph, name, (*above, module), known) for name in graph[module])
        known[module] = [module, *max(below, key=len, default=[])]
    return known[module]


def test_imports_form_no_cycle_and_no_long_chain():
    for graph in (imports(), with_faces()):
        known: dict[str, list[str]] = {}
        for module in graph:
            chain(graph, module, (), known)
    known = {}
    longest = max((chain(imports(), module, (), known) for module in imports()), key=len)
    assert all(b in imports()[a] for a, b in pairwise(longest))
    assert len(longest) <= LONGEST_CHAIN, " > ".join(longest)


def test_the_root_holds_few_modules():
    modules = [p.name for p in PACKAGE.glob("*.py") if p.stem not in ("__init__", "__main__")]
    assert len(modules) <= MOST_ROOT_MODULES, modules


def test_files_and_functions_are_short():
    assert not [str(path) for path in FILES if path.read_text(encoding="utf-8").count("\n") > LONGEST_FILE]
    for place, node in functions():
        assert compiled(node) or (node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION, place


def test_few_functions_take_many_arguments():
    long = []
    for place, node in functions():
        a = node.args
        bound = bool(a.args) and a.args[0].arg in ("self", "cls")
        if len(a.posonlyargs + a.args + a.kwonlyargs) - bound > MOST_PARAMETERS:
            long.append(place)
    assert len(long) <= MOST_WITH_MORE, long


def test_public_names_say_what_they_are():
    named = [(path.name, node) for path, tree in FILES.items() for node in public(tree)]
    without = [f"{path}:{node.lineno} {node.name}" for path, node in named if not ast.get_docstring(node)]
    assert len(without) <= MOST_UNDOCUMENTED * len(named), without


def test_layout_is_the_formatters():
    marks = ("fmt: " + "skip", "fmt: " + "off")
    assert sum(path.read_text(encoding="utf-8").count(mark) for path in FILES for mark in marks) <= MOST_SKIPS
