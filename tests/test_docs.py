"""The pages say what is true of the code: commands, options, paths, names and extras that they mention are there."""

import ast
import os
import platform
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from quantkit.__main__ import main

ROOT = Path(__file__).parents[1]
ELSEWHERE = (*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "models").glob("*/README.md")))
GUIDES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ELSEWHERE)
PAGES = (*GUIDES, ROOT / "CHANGELOG.md")  # which names what is gone, too
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
CODE = [path for folder in ("quantkit", "scripts", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
PLACEHOLDER = "scripts/bench/NAME.py"
MOST_WORDS = 900
OPTION = re.compile(r"(?<![\w=-])--?[a-zA-Z][\w-]*")
FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    (.+)$", re.MULTILINE)


def every_page(*pages: Path) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=[str(page.relative_to(ROOT)) for page in pages])


def code_of(page: Path) -> Iterator[str]:
    """What a page, or the docstring of a script, shows as code: lines of blocks, continued ones joined, and pieces
    between backticks."""
    text = text_of(page) if page.suffix == ".md" else ast.get_docstring(ast.parse(text_of(page))) or ""
    text = text.replace("\\\n", " ")
    for block in FENCED.findall(text):
        yield from block.splitlines()
    text = FENCED.sub("", text)
    yield from INDENTED.findall(text)
    yield from (" ".join(piece.split()) for piece in re.findall(r"`([^`]+)`", INDENTED.sub("", text)))


def calls(page: Path, program: str) -> Iterator[str]:
    """What follows the program's name wherever a page calls it, up to a comment or the next command."""
    for line in code_of(page):
        for part in re.split(r"&&|;|\s\|\s(?!--)", re.sub(r"(^|\s)#.*", "", line)):
            if found := re.search(rf"(?:^|[\s(]){program}\s+(.*)", part):
                yield found[1]


def options_of(name: str) -> set[str]:
    command = main.commands[name]
    return {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@every_page(*GUIDES, *SCRIPTS)
def test_commands_have_the_options_that_are_shown(page):
    in_sentences = (piece for piece in code_of(page) if piece.partition(" ")[0] in main.commands)
    for call in (*calls(page, "quantkit"), *in_sentences):
        name, _, rest = call.partition(" ")
        if re.fullmatch("[a-z][a-z-]+", name):
            assert name in main.commands, call
            assert set(OPTION.findall(rest)) <= options_of(name), call


@every_page(*GUIDES, *SCRIPTS)
def test_scripts_have_the_options_that_are_shown(page):
    for call in calls(page, "python3?"):
        script, _, rest = call.partition(" ")
        if not script.startswith("scripts/") or script == PLACEHOLDER:
            continue
        text = text_of(ROOT / script)
        known = set(re.findall(r'"(--?[a-zA-Z][\w-]*)[",/]', text)) | {"--help"}
        if "ignore_unknown_options" in text:  # for the script that it starts
            known |= {flag for path in SCRIPTS for flag in re.findall(r'"(--[\w-]+)"', text_of(path))}
        assert set(OPTION.findall(rest)) <= known, call


@every_page(*GUIDES)
def test_options_in_sentences_exist(page):
    known = {flag for name in main.commands for flag in options_of(name)}
    shown = {flag for line in code_of(page) if not line.startswith("--") for flag in OPTION.findall(line)}
    scripts = {flag for path in CODE for flag in re.findall(r'"(--[\w-]+)"', text_of(path))}
    others = (
        scripts if page.parent.name == "results" else shown
    )  # of accelerate, pip, pytest: named where they are used
    for piece in code_of(page):
        if piece.startswith("--"):
            assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", piece)) <= known | others, piece


def files_called(name: str) -> list[Path]:
    """Where `collect.py`, `calibration/collect.py` or `quantkit/calibration/collect.py` may be."""
    if "/" in name:
        return [path for path in (ROOT / name, ROOT / "quantkit" / name) if path.exists()]
    return [path for path in CODE if path.name == name]


def names_in(path: Path) -> set[str]:
    """Functions, classes and values of a module; methods as Class.method."""
    names = set()
    for node in ast.parse(text_of(path)).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {
                part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
            }
    return names


@every_page(*GUIDES)
def test_files_and_what_is_in_them_exist(page):
    for piece in code_of(page):
        for name in re.findall(r"(?<![\w/.-])(?:quantkit|scripts|docs|tests|recipes)/[\w./*-]*\w", piece):
            assert any(ROOT.glob(name)) or name == PLACEHOLDER, piece
        for name, inside in re.findall(r"(?<![\w/.-])((?:\w+/)*\w+\.py)(?::([\w.]+))?", piece):
            found = files_called(name)
            assert found or name == PLACEHOLDER, piece
            assert not inside or any(inside in names_in(path) for path in found), piece


@every_page(*PAGES)
def test_links_lead_somewhere(page):
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text_of(page)):
        to = page.parent / name if name else page
        assert to.exists(), name
        heads = re.findall(r"^#+ (.+)$", text_of(to), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_pages_that_the_code_names_exist():
    for path in CODE:
        for name in re.findall(r"docs/[\w/-]+\.(?:md|png)", text_of(path)):
            assert (ROOT / name).exists(), f"{path.relative_to(ROOT)}: {name}"


@every_page(*PAGES)
def test_variables_and_extras_exist(page):
    for name in re.findall(r"QUANTKIT_[A-Z_]+", text_of(page)):
        assert any(name in text_of(path) for path in CODE), name
    extras = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    for names in re.findall(r"(?:quantkit|'\.)\[([\w,]+)\]'", text_of(page)):
        assert set(names.split(",")) <= set(extras), names


@every_page(*GUIDES)
def test_tests_that_are_named_exist(page):
    for call in calls(page, "pytest"):
        places = [ROOT / word.partition("::")[0] for word in call.split() if word.startswith("tests/")]
        assert all(place.exists() for place in places), call
        if chosen := re.search(r"-k '?(\w+)", call):
            files = [file for place in places for file in ([place] if place.is_file() else place.rglob("test_*.py"))]
            assert any(re.search(rf"def test_\w*{chosen[1]}", text_of(file)) for file in files), call


def test_the_front_page_is_short():
    assert len(text_of(ROOT / "README.md").split()) <= MOST_WORDS


def test_what_is_claimed_is_what_ci_runs():
    """Python's versions in pyproject.toml, in CONTRIBUTING.md and here; all others are named as untested."""
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    claimed = [c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r"Python :: \d\.\d", c)]
    rows = re.findall(r"^\| (\w+) \| ([^|]*) \|.*\|$", text_of(ROOT / "CONTRIBUTING.md"), re.MULTILINE)
    tested = dict(rows)
    assert claimed == [tested["Python"]] and f"Python {claimed[0]}," in text_of(ROOT / "README.md")
    torch = next(each for each in project["dependencies"] if each.startswith("torch"))
    assert torch in tested["torch"]
    if "CI" in os.environ:
        assert f"{sys.version_info.major}.{sys.version_info.minor}" in claimed
        assert platform.machine() in ("x86_64", "AMD64") and "x86-64" in tested["processor"]
