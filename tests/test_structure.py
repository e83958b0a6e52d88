"""The house stays one that a reader finds the way in: sizes, names, imports. Kernels may be long.

docs/results/structure.md has the figures; scripts/bench/structure.py counts.
"""

import ast
import sys
from pathlib import Path

import pytest

import quantkit

sys.path.append(str(Path(__file__).parents[1] / "scripts" / "bench"))
from structure import Function, Package, cycles, longest_chain, n_lines, n_parameters

LONGEST_FILE, LONGEST_FUNCTION, LONGEST_CHAIN = 400, 50, 10
MOST_PARAMETERS, MOST_WITH_MORE = 7, 15
MOST_ROOT_MODULES, MOST_SKIPS, MOST_UNDOCUMENTED = 9, 10, 0.05


@pytest.fixture(scope="module")
def package() -> Package:
    return Package(Path(quantkit.__file__).parent)


def compiled(node: Function) -> bool:
    """Whether numba or Triton makes machine code of it."""
    return any("jit" in ast.unparse(d) or ast.unparse(d) == "part" for d in node.decorator_list)


def test_imports_form_no_cycle_and_no_long_chain(package):
    assert not cycles(package.imports) and not cycles(package.with_faces)
    longest = longest_chain(package.imports)
    assert len(longest) <= LONGEST_CHAIN, " > ".join(longest)


def test_imports_are_whole(package):
    for file, tree in package.trees.items():
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)), file


def test_the_root_holds_few_modules(package):
    assert len(package.root_modules()) <= MOST_ROOT_MODULES, package.root_modules()


def test_files_and_functions_are_short(package):
    assert not [str(file) for file, text in package.texts.items() if text.count("\n") > LONGEST_FILE]
    for place, node in package.functions():
        assert compiled(node) or n_lines(node) <= LONGEST_FUNCTION, place


def test_few_functions_take_many_arguments(package):
    long = [place for place, node in package.functions() if n_parameters(node) > MOST_PARAMETERS]
    assert len(long) <= MOST_WITH_MORE, long


def test_public_names_say_what_they_are(package):
    named = list(package.public())
    without = [place for place, node in named if not ast.get_docstring(node)]
    assert len(without) <= MOST_UNDOCUMENTED * len(named), without


def test_layout_is_the_formatters(package):
    assert package.skips() <= MOST_SKIPS
