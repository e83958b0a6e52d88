"""The report: one page, no outside requests, readable on a phone and in the dark, looked at in a real browser where
there is one. It is of a folder that `make --baseline`, `verify --prompts` and `certify` left."""

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
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import Calibration
from quantkit.errors import QuantkitError
from quantkit.job import stages
from quantkit.job.certify import CertifyOptions, certify_file
from quantkit.job.finished import place_of_scores
from quantkit.job.make import make
from quantkit.job.options import MakeOptions
from quantkit.job.plan import plan_model
from quantkit.job.report.compare import write_comparison
from quantkit.job.report.figures import FIGURES
from quantkit.job.report.material import Material
from quantkit.job.report.page import _tiles, verdict, write_report
from quantkit.job.report.page import page as render
from quantkit.job.status import status
from quantkit.models.open import open_weights
from quantkit.planning.bitmap import bit_map
from quantkit.planning.plan import Plan

SECTIONS = [
    *(
        "summary",
        "run",
        "baseline",
        "domains",
        "layers",
        "kld",
        "samples",
        "position",
        "classes",
        "bitmap",
        "predicted",
    ),
    *("coverage", "certificate", "provenance"),
]
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
RULES = """name = "small"
description = "types that ggml packs quickly"
target = "llama.cpp"
mla = "split"
rules = [
    { match = "ffn_*_exps", qtype = "Q2_K" },
    { match = "attn_k_b", qtype = "Q8_0" },
    { match = "*", qtype = "Q4_K" },
]
"""


def options(folder: Path) -> MakeOptions:
    """Quick ones, with a baseline."""
    return MakeOptions(
        recipe=folder.parent / "small.toml",
        calibration=Calibration(TextChoice(n_tokens=2048)),
        evaluation=TextChoice(n_tokens=4096),
        encoder="quantkit",
        effort="fast",
        device="cpu",
        baseline=True,
    )


def run(*arguments: object):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Beside another that was measured alike."""
    root = tmp_path_factory.mktemp("report")
    folder = root / "tiny-r1-small"
    (root / "small.toml").write_text(RULES)
    files, scores = make("tiny-r1", folder, options(folder))
    assert scores["baseline"]["bytes"] == scores["bytes"]
    verified = run("verify", folder, "--tokens", 4096, "--prompts", 1, "--device", "cpu")
    assert verified.exit_code == 0 and str(folder / "verify.json") in verified.stdout, verified.output
    certify_file(files[0], "cpu", folder / "certify.json", CertifyOptions("llama.cpp", "tiny-r1", oracle=False))
    other = json.loads((folder / "verify.json").read_text()) | {"bytes": 9_000_000, "kld_mean": 0.1}
    (root / "larger").mkdir()
    (root / "larger" / "verify.json").write_text(json.dumps(other))
    shutil.copy(folder / "plan.json", root / "larger")
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


def test_the_baseline_is_measured_once_and_its_file_removed(folder, capsys):
    other = json.loads((folder / "baseline.json").read_text())
    assert not (folder / "baseline").exists() and len(list(folder.glob("*r1*.gguf"))) == 1
    times = {name: (folder / name).stat().st_mtime_ns for name in ("verify.json", "baseline.json")}
    _, scores = make("tiny-r1", folder, options(folder))
    said = capsys.readouterr().err.replace("\n", "")
    assert "baseline.json from an earlier run" in said and "verify.json from an earlier run" in said
    assert scores["baseline"] == other and scores["generation"]["samples"]  # which `verify` added
    assert times == {name: (folder / name).stat().st_mtime_ns for name in times}


def test_a_baseline_that_was_stopped_while_it_was_judged_is_not_encoded_again(folder, tmp_path, monkeypatch):
    plan = Plan.from_json((folder / "plan.json").read_bytes())
    given = (plan, folder / "imatrix.gguf", tmp_path / "baseline" / "tiny-r1-small.gguf", "cpu", TextChoice())

    def stopped(*_, **__):
        raise QuantkitError("stopped")

    monkeypatch.setattr(stages, "verify_file", stopped)
    with pytest.raises(QuantkitError, match="stopped"):
        stages.score_by_ggml(open_weights("tiny-r1"), *given)
    assert any("(baseline/tiny-r1-small.gguf)" in line for line in status(tmp_path))
    monkeypatch.setattr(stages.GgmlEncoder, "__call__", stopped)
    monkeypatch.setattr(stages, "verify_file", lambda path, *_, **__: {"bytes": path.stat().st_size})
    assert stages.score_by_ggml(open_weights("tiny-r1"), *given)["bytes"] > 4_000_000
    assert not (tmp_path / "baseline").exists()


@pytest.mark.parametrize(("given", "why"), [(["--encoder", "ggml"], "takes itself"), (["--no-verify"], "leave out")])
def test_a_baseline_without_a_comparison_is_refused(given, why, tmp_path):
    done = run("make", "--baseline", "-o", tmp_path / "x", *given)
    assert done.exit_code == 1 and "--baseline compares" in done.stderr and why in done.stderr
    assert not (tmp_path / "x").exists()


def test_the_forecast_counts_the_baseline():
    done = run("make", "--baseline", "--dry-run", "--device", "cpu")
    assert re.search(r"baseline    about .* more: 4.1 MB", done.stdout), done.output


def test_every_section_has_its_content(page):
    found = elements(page)
    assert [attrs["id"] for tag, attrs in found if tag == "section"] == SECTIONS
    assert sum(tag == "svg" for tag, _ in found) == len(FIGURES) + 1  # the bit map twice: also for phones
    assert re.search(r'class="pass">pass</td>', page) and "checkpoint fingerprint" in page and "sha256" in page
    assert "the original</p>" in page and page.count("<blockquote>") == 3
    assert "llama-cli -m tiny-r1-small.gguf" in page and "Not measured" not in page


def test_the_verdict_comes_first(folder, page):
    m = Material.load(folder)
    said = verdict(m)
    assert page.index('class="verdict"') < page.index("<section") and said.count(".\n") == 0
    ratio = m.scores["kld_mean"] / m.baseline["kld_mean"]
    assert f"{ratio:.2f} of what ggml's encoder leaves" in said and "nats a token" in said and "llama.cpp" in said
    failed = {"passed": False, "target": "ollama", "checks": [{"name": "weights", "status": "fail"}]}
    m.certificates.insert(0, failed)
    assert verdict(m) == "Do not use this file for ollama: it failed certification (weights)."
    m.certificates[0] = {"passed": True, "engine_run": False, "verdict": "passed, engine not run", "target": "ollama"}
    assert _tiles(m)[-1] == ("certificate", "engine not run", "ollama: passed, engine not run")  # of an older version
    m.certificates, m.scores = [], m.scores | {"configuration": {"status": "fail"}}
    assert verdict(m).startswith("Do not trust these scores")


def test_a_file_by_ggml_is_not_sent_to_a_baseline(folder):
    """`make --baseline` refuses what has nothing to compare."""
    m = Material.load(folder)
    m.baseline, m.provenance = None, m.provenance | {"encoder": "ggml"}
    shown = render(m, {})
    assert "by ggml&#39;s encoder itself" in shown and "make</code> with --baseline" not in shown


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
            assert image.format == "PNG" and min(image.size) > 250
            assert len(image.convert("L").getcolors(256)) > 20  # something is drawn


def test_the_same_folder_gives_the_same_page(folder, page):
    assert write_report(folder)[0].read_text(encoding="utf-8") == page


def test_neighbours_measured_alike_share_the_chart(folder, tmp_path):
    assert list(Material.load(folder).others) == ["larger"]
    other = folder.parent / "larger" / "verify.json"
    value = json.loads(other.read_text())
    other.write_text(json.dumps(value | {"text_sha256": "another"}))
    assert Material.load(folder).others == {}
    text = write_comparison([folder, other.parent], tmp_path).read_text()
    assert "larger was measured on other text" in text and "nothing can be compared" in text
    other.write_text(json.dumps(value))


def test_one_point_is_no_chart(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "alone"))
    (copy / "baseline.json").unlink()
    scores = json.loads((copy / "verify.json").read_text())
    one = dict([next(iter(scores["domains"].items()))])
    (copy / "verify.json").write_text(json.dumps(scores | {"domains": one, "layers": scores["layers"][:1]}))
    made = {path.name for path in write_report(copy)}
    assert made.isdisjoint({f"report-{name}.png" for name in ("position", "domains", "layers", "predicted")})
    assert not (copy / "report-position.png").exists()  # that of the copied report is gone, too
    assert "No other file that was measured alike" in (copy / "report.html").read_text()


def test_names_from_files_are_escaped(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    scores = json.loads((copy / "verify.json").read_text())
    scores["generation"]["samples"][0]["file"] = scores["file"] = "<script>alert(1)</script>"
    (copy / "verify.json").write_text(json.dumps(scores))
    write_report(copy)
    assert "<script" not in (copy / "report.html").read_text()


def test_a_plan_alone_is_worth_a_page(folder, tmp_path):
    shutil.copy(folder / "plan.json", tmp_path)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Not certified" in page and sum(tag == "svg" for tag, _ in elements(page)) == 3
    assert "nothing has been measured yet" in page


def test_r1_bit_map_has_a_cell_for_every_matrix():
    plan = plan_model("deepseek-r1", "1.58bit")
    axes = bit_map(plan).axes[0]
    mesh = axes.collections[0].get_array()
    matrices = [t for t in plan.tensors if len(t.shape) > 1]
    assert mesh.count() - int((mesh != mesh).sum()) == len(matrices)
    assert isinstance(plan, Plan) and mesh.shape[1] == 62


def test_nothing_to_report_is_one_clear_line(tmp_path):
    done = run("report", tmp_path)
    assert done.exit_code == 1 and "neither verify.json nor plan.json" in done.stderr
    (tmp_path / "verify.json").write_text("{")
    with pytest.raises(QuantkitError, match=r"verify\.json"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_scores_that_verify_did_not_write_are_named(tmp_path):
    (tmp_path / "verify.json").write_text(
        '{"file": "x.gguf", "bytes": 1, "kld_mean": null, "ppl": 3, "ppl_reference": 2}'
    )
    with pytest.raises(QuantkitError, match=r"verify\.json: no number for kld_mean, top1_agreement: not of"):
        write_report(tmp_path)


def test_several_folders_are_compared(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("report", folder, folder.parent / "larger")
    assert done.exit_code == 0 and done.stdout.strip() == "compare.html", done.output
    text = (tmp_path / "compare.html").read_text()
    assert "larger is the nearest to the original" in text and "each of the others is smaller" in text
    assert sum(tag == "svg" for tag, _ in elements(text)) == 3
    (tmp_path / "empty").mkdir()
    shutil.copy(folder / "plan.json", tmp_path / "empty")
    refused = run("report", folder, tmp_path / "empty")
    assert refused.exit_code == 1 and "nothing was measured there" in refused.stderr


def test_make_notes_where_the_file_comes_from(made):
    noted = json.loads((made / "provenance.json").read_text())
    assert noted["command"] == "quantkit.make, called from Python" and len(noted["calibration_sha256"]) == 64


def test_scores_of_another_model_are_not_replaced(made, tmp_path):
    """Two models in one folder: each has its own figures."""
    shutil.copy(made / "tiny-r1-1.58bit.gguf", tmp_path / "second.gguf")
    (tmp_path / "verify.json").write_text('{"file": "first.gguf"}')
    done = run("verify", tmp_path / "second.gguf", "--tokens", 512, "--device", "cpu")
    assert done.exit_code == 0 and json.loads((tmp_path / "verify.json").read_text()) == {"file": "first.gguf"}
    assert json.loads((tmp_path / "verify-second.json").read_text())["file"] == "second.gguf"


def test_scores_against_another_original_do_not_replace_what_make_found(made):
    """A card and a report would show them as its own."""
    file = next(made.glob("tiny-r1-*.gguf"))
    own = json.loads((made / "provenance.json").read_text())["checkpoint"]
    assert place_of_scores(file, own) == made / "verify.json"
    assert place_of_scores(file, "another") == made / f"verify-{file.stem}.json"


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


SHOWN = "[...document.querySelectorAll('p, td, th, span, pre, h1, h2, h3, blockquote, svg text')].filter("
SHOWN += "e => e.textContent.trim() && e.getClientRects().length)"
SIZES = f"""{SHOWN}.map(e => {{ const svg = e.closest('svg');
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    return parseFloat(getComputedStyle(e).fontSize) * scale; }})"""
CUT = f"""{SHOWN}.filter(e => {{ const box = e.getBoundingClientRect();
    return box.right > innerWidth + 1 || box.left < -1 || e.scrollWidth > e.clientWidth + 2 && !e.closest('svg'); }})
    .map(e => e.tagName + ' ' + e.textContent.slice(0, 40))"""
CONTRAST = f"""(() => {{ const light = c => {{ const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255).map(
        v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; }};
    const paper = light(getComputedStyle(document.body).backgroundColor);
    return {SHOWN}.map(e => {{
        const style = getComputedStyle(e), ink = light(e.closest('svg') ? style.fill : style.color);
        return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); }}); }})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("which", ["report", "compare"])
def test_in_a_browser(browser, folder, which, size, scheme, tmp_path):
    path = (
        folder / "report.html" if which == "report" else write_comparison([folder, folder.parent / "larger"], tmp_path)
    )
    phone = size is PHONE
    context = browser.new_context(
        viewport=size, is_mobile=phone, has_touch=phone, device_scale_factor=2, color_scheme=scheme
    )
    tab = context.new_page()
    asked, errors = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(path.as_uri())
    assert [url for url in asked if url != path.as_uri() and not url.startswith("data:")] == []
    assert errors == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= size["width"]  # nothing sticks out sideways
    assert tab.evaluate(CUT) == []
    assert tab.locator("svg:visible").count() >= 3
    for box in (each.bounding_box() for each in tab.locator("svg:visible").all()):
        assert box and box["width"] > 300 and box["height"] > 100
    assert min(tab.evaluate(SIZES)) >= 9, "text too small to read"
    assert min(tab.evaluate(CONTRAST)) >= 3
    image = Image.open(io.BytesIO(tab.screenshot(full_page=True, path=tmp_path / "page.png"))).convert("L")
    assert image.width == size["width"] * 2 and len(image.getcolors(256)) > 100
    assert (image.getpixel((2, 2)) > 128) == (scheme == "light")
    context.close()
