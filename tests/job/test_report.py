"""The report: one page, no outside requests, readable on a phone, looked at in a real browser where there is one."""

import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from quantkit.__main__ import main
from quantkit.errors import QuantkitError
from quantkit.job.certify import CertifyOptions, certify_file
from quantkit.job.plan import plan_model
from quantkit.job.report import FIGURES, Material, write_report
from quantkit.planning.bitmap import bit_map
from quantkit.planning.plan import Plan

SECTIONS = ["summary", *FIGURES, "generation", "certificate", "provenance"]
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory) -> Path:
    """The folder of `make`, certified, beside another that was measured alike."""
    root = tmp_path_factory.mktemp("report")
    folder = Path(shutil.copytree(made, root / "tiny-r1-1.58bit"))
    file = folder / "tiny-r1-1.58bit.gguf"
    certify_file(file, "cpu", folder / "certify.json", CertifyOptions("llama.cpp", "tiny-r1", oracle=False))
    other = json.loads((folder / "verify.json").read_text()) | {"bytes": 9_000_000, "kld_mean": 0.1}
    (root / "larger").mkdir()
    (root / "larger" / "verify.json").write_text(json.dumps(other))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def elements(page: str) -> list[tuple[str, dict]]:
    parser = Elements()
    parser.feed(page)
    return parser.found


def test_every_section_has_its_content(page):
    found = elements(page)
    assert [attrs["id"] for tag, attrs in found if tag == "section"] == SECTIONS
    assert sum(tag == "svg" for tag, _ in found) == len(FIGURES)
    assert "Not measured" in page  # generation was not asked for, and the page says how to
    assert re.search(r'class="pass">pass</td>', page) and "checkpoint fingerprint" in page and "sha256" in page


def test_nothing_is_loaded_from_elsewhere(page):
    for tag, attrs in elements(page):
        assert tag not in ("script", "iframe", "object", "embed", "img"), tag
        for key, value in attrs.items():
            if key in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value.startswith(("#", "data:")), (tag, key, value)
    assert "@import" not in page and not re.search(r"url\((?!#|[\"']?#)", page)
    assert '<meta name="viewport" content="width=device-width' in page


def test_figures_are_also_pngs(folder):
    for name in FIGURES:
        with Image.open(folder / f"report-{name}.png") as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 300
            assert len(image.convert("L").getcolors(256)) > 20  # something is drawn


def test_the_same_folder_gives_the_same_page(folder, page):
    assert write_report(folder)[0].read_text(encoding="utf-8") == page


def test_neighbours_measured_alike_share_the_chart(folder):
    assert list(Material.load(folder).others) == ["larger"]
    other = folder.parent / "larger" / "verify.json"
    value = json.loads(other.read_text())
    other.write_text(json.dumps(value | {"text_sha256": "another"}))
    assert Material.load(folder).others == {}
    other.write_text(json.dumps(value))


def test_names_from_files_are_escaped(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    scores = json.loads((copy / "verify.json").read_text())
    (copy / "verify.json").write_text(json.dumps(scores | {"file": "<script>alert(1)</script>"}))
    write_report(copy)
    assert "<script" not in (copy / "report.html").read_text()


def test_a_plan_alone_is_worth_a_page(folder, tmp_path):
    shutil.copy(folder / "plan.json", tmp_path)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Not certified" in page and sum(tag == "svg" for tag, _ in elements(page)) == 1


def test_r1_bit_map_has_a_cell_for_every_matrix():
    plan = plan_model("deepseek-r1", "1.58bit")
    axes = bit_map(plan).axes[0]
    mesh = axes.collections[0].get_array()
    matrices = [t for t in plan.tensors if len(t.shape) > 1]
    assert mesh.count() - int((mesh != mesh).sum()) == len(matrices)
    assert isinstance(plan, Plan) and mesh.shape[1] == 62


def test_nothing_to_report_is_one_clear_line(tmp_path):
    done = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert done.exit_code == 1 and "neither verify.json nor plan.json" in done.stderr
    (tmp_path / "verify.json").write_text("{")
    with pytest.raises(QuantkitError, match=r"verify\.json"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_make_notes_where_the_file_comes_from(made):
    noted = json.loads((made / "provenance.json").read_text())
    assert noted["command"] == "quantkit.make, called from Python" and len(noted["calibration_sha256"]) == 64


def browser_binary() -> str | None:
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("QUANTKIT_BROWSER") or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    binary = browser_binary()
    if binary is None:
        pytest.skip("no Chromium or Chrome on this machine (or QUANTKIT_BROWSER)")
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 900}], ids=["phone", "desktop"])
def test_in_a_browser(browser, folder, size, tmp_path):
    phone = size is PHONE
    context = browser.new_context(viewport=size, is_mobile=phone, has_touch=phone, device_scale_factor=2)
    tab = context.new_page()
    asked, errors = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    address = (folder / "report.html").as_uri()
    tab.goto(address)
    assert [url for url in asked if url != address and not url.startswith("data:")] == []
    assert errors == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= size["width"]  # nothing sticks out sideways
    for name in SECTIONS:
        box = tab.locator(f"section#{name}").bounding_box()
        assert box and box["width"] > 300 and box["height"] > 60, name
    for name in FIGURES:
        box = tab.locator(f"section#{name} svg").bounding_box()
        assert box and box["width"] > 300 and box["height"] > 120, name
    sizes = tab.evaluate("""[...document.querySelectorAll('p, td, th, span, svg text')]
        .filter(e => e.textContent.trim()).map(e => { const box = e.getBoundingClientRect(), svg = e.closest('svg');
                    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
                    return parseFloat(getComputedStyle(e).fontSize) * scale; })""")
    assert min(sizes) >= 9, "text too small to read"
    image = Image.open(io.BytesIO(tab.screenshot(full_page=True, path=tmp_path / "page.png")))
    assert image.width == size["width"] * 2 and len(image.convert("L").getcolors(256)) > 100
    context.close()
