"""What a person installs: built here from the sources, and looked into."""

import importlib.util
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOME = "https://example.org/someone/quantkit"

pytest.importorskip("hatchling", reason="needs pip install hatchling")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(out)], cwd=ROOT, check=True)
    return out


def test_the_wheel_has_all_that_is_read_at_run_time(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = Parser().parsestr(wheel.read(next(n for n in names if n.endswith("/METADATA"))).decode())
    for folder in ("recipes", "models", "texts"):
        files = {f"quantkit/bundled/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert files and files <= names, folder
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "quantkit").rglob("*") if path.is_file()}
    assert {name for name in package if "__pycache__" not in name} <= names
    assert {"quantkit/py.typed", "quantkit/runtime/native/experts.c"} <= names
    assert metadata["Author"] and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown" and "# quantkit" in metadata.get_payload()


def test_the_sdist_can_be_built_and_read(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = ("pyproject.toml", "hatch_build.py", "Dockerfile", "README.md", "LICENSE", "docs/architecture.md")
    assert {*wanted, "recipes/1.58bit.toml", "models/tiny-r1/config.json", "tests/test_package.py"} <= names
    assert not [name for name in names if name.endswith((".pyc", ".gguf"))]


def hook():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_the_readme_lead_into_the_repository():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", readme)
    made = hook().absolute(readme, HOME, "1.2.3")
    found = re.findall(rf"\]\({HOME}/blob/v1\.2\.3/([^)#\s]+)", made)
    assert found == relative and len(found) > 5 and all((ROOT / name).exists() for name in found)
    assert not re.search(r"\]\((?!https?:|#)", made)
    assert hook().urls(HOME)["Changelog"] == f"{HOME}/blob/main/CHANGELOG.md"
    assert hook().absolute(readme, "", "1") == readme and hook().urls("") == {}
