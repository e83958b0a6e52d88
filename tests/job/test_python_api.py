"""`import quantkit`: quick to import, typed, and its page runs as it stands."""

import inspect
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.job import api

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> dict[str, Any]:
    """What the page's code leaves, run from top to bottom in a folder of its own."""
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        patch.setattr(sys, "stdout", printed := io.StringIO())
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
        names["printed"] = printed.getvalue()
        names["here"] = Path.cwd()
    return names


def test_the_page_runs(page):
    made, scores = page["made"], page["scores"]
    assert made.files[0].name == "tiny-r1-1.58bit.gguf" and made.plan.recipe == "1.58bit"
    assert made.kld == made.scores["kld_mean"] > 0
    assert (page["here"] / "tiny" / "again.json").is_file() and 0 < scores["kld_mean"] < 5
    assert page["plan"].target == "ktransformers" and page["smaller"].n_bytes < 150e9 and page["smaller"].outlook
    assert page["text"].strip() and page["answer"].startswith("<think>")
    assert page["printed"].splitlines()[0].startswith("140.") and "90,000,000,000" in page["printed"]


def test_generation_is_the_command_lines(page):
    from click.testing import CliRunner

    from quantkit.__main__ import main

    args = ["run", str(page["here"] / page["made"].folder), "-p", "It was a dark and stormy", "-n", "16", "--temp", "0"]
    assert CliRunner().invoke(main, args).stdout == page["text"] + "\n"


def test_importing_is_quick_and_light():
    program = (
        "import sys, time; began = time.process_time(); import quantkit; spent = time.process_time() - began\n"
        "heavy = {'torch', 'numpy', 'click', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert quantkit.make.__doc__ and 'torch' in sys.modules\nprint(spent)"
    )
    assert float(subprocess.check_output([sys.executable, "-c", program])) < 0.1


def test_what_is_not_there_is_refused(made):
    with pytest.raises(TypeError, match="unexpected keyword 'recipes'; there are recipe, target, size"):
        quantkit.plan("tiny-r1", recipes="1.58bit")
    with pytest.raises(quantkit.QuantkitError, match="size much: not a size"):
        quantkit.make("tiny-r1", size="much")
    with pytest.raises(quantkit.QuantkitError, match="the last one must be the user's"):
        quantkit.Model.load(made, context=64).chat([{"role": "system", "content": "x"}])
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = quantkit.quantise


def test_a_plan_without_the_mtp_layer():
    plans = [quantkit.plan("deepseek-v3.2", recipe="unsloth-1.58bit", mtp=mtp) for mtp in (True, False)]
    assert [max(t.layer or 0 for t in plan.tensors) for plan in plans] == [61, 60]


def test_every_public_name_is_documented():
    text = PAGE.read_text(encoding="utf-8")
    assert set(quantkit.__all__) <= set(dir(quantkit))
    for name in quantkit.__all__:
        assert name in text and inspect.getdoc(getattr(quantkit, name)), name
    for keywords in (api.PlanKeywords, api.MakeKeywords, api.VerifyKeywords, api.SamplingKeywords):
        assert all(re.search(rf"\b{key}\b", text) for key in keywords.__annotations__), keywords
