"""What a file writes beside what its original writes: judged alike, counted with intervals, and broken files named."""

import json
import shutil

import pytest
from click.testing import CliRunner
from mutations import Model, dropped_experts, looping
from rich.console import Console

from quantkit.__main__ import main
from quantkit.errors import QuantkitError
from quantkit.evaluation.behaviour import judge, rates, tasks
from quantkit.evaluation.behaviour.compare import table, words
from quantkit.evaluation.behaviour.items import Amount, Item
from quantkit.evaluation.behaviour.tasks import Tasks, prompts
from quantkit.evaluation.behaviour.writing import Notes
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.job import evaluate as evaluating
from quantkit.job.evaluate import place_of_evaluation
from quantkit.runtime.sources.gguf import open_gguf

AMOUNT = ("-n", "16", "--tokens", "40", "-c", "256", "--device", "cpu", "--parallel", "16")


@pytest.fixture(scope="module")
def path(made):
    return next(made.glob("tiny-r1-*.gguf"))


@pytest.fixture(scope="module")
def folder(path, tmp_path_factory):
    """With the evaluation of a good file."""
    folder = tmp_path_factory.mktemp("evaluated")
    done = run(path, folder / "good.json")
    assert done.exit_code == 0, done.output
    (folder / "said").write_text(done.output)
    return folder


def run(file, out):
    return CliRunner().invoke(main, ["evaluate", str(file), *AMOUNT, "--json", str(out)])


def test_a_good_file_is_no_worse(folder):
    found, said = json.loads((folder / "good.json").read_text()), (folder / "said").read_text()
    assert found["findings"] == [] and "no worse than the original" in said
    assert "original: 119 continuations," in said and "tok/s" in said  # the duration, before the first
    whats = {(row["what"], row["mode"]) for row in found["rates"]}
    assert {("ends in a loop", "sampled"), ("code does not parse", "greedy"), ("needle not found", "greedy")} <= whats
    assert all(row["ci95"][0] <= row["rate"] <= row["ci95"][1] for row in found["rates"])
    words = found["words"]
    assert 0 < words["nll_reference"] < words["nll"] < words["nll_reference"] + 1
    assert words["lost_ci95"][0] < words["lost_ci95"][1]


def test_where_nothing_can_be_written_is_heard_before_the_work(path):
    done = run(path, "/proc/none/evaluate.json")
    assert done.exit_code == 1 and "/proc/none/evaluate.json: cannot write here" in done.stderr, done.output
    assert "continuations" not in done.output


def test_a_stopped_run_goes_on(path, folder, tmp_path):
    """Cut in the middle of a line, at another place for either side; the same figures."""
    for name in [path.name for path in folder.glob("*.jsonl")]:
        data = (folder / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) * 3 // 5 if "original" in name else len(data) - 7])
    (tmp_path / "good.jsonl").rename(tmp_path / "again.jsonl")
    done = run(path, tmp_path / "again.json")
    assert done.exit_code == 0 and "continuations are there already" in done.output, done.output
    again, good = (json.loads(file.read_text()) for file in (tmp_path / "again.json", folder / "good.json"))
    assert again["rates"] == good["rates"] and again["words"]["nll"] == pytest.approx(good["words"]["nll"])
    at_once = run(path, tmp_path / "again.json")
    assert "tokens to read" not in at_once.output and at_once.exit_code == 0


def broken(path, folder, tmp_path, change) -> str:
    """What is said of a file that was changed. The original's continuations are there already."""
    model = Model(path)
    change(model)
    for name in folder.glob("evaluate-original-*.jsonl"):
        shutil.copy(name, tmp_path)
    done = run(model.write(tmp_path / "broken.gguf"), tmp_path / "evaluate.json")
    assert done.exit_code == 1 and "original writes" not in done.output, done.output
    return done.output


def test_a_file_that_loops_is_named(path, folder, tmp_path):
    said = broken(path, folder, tmp_path, looping)
    assert "worse: ends in a loop: " in said and " greedy continuations [" in said, said


def test_a_dropped_expert_is_named(path, folder, tmp_path):
    said = broken(path, folder, tmp_path, dropped_experts)
    assert "worse: blk.2.ffn_down_exps.weight expert 3: all zeros: the expert is dropped" in said
    assert "worse: blk.1.exp_probs_b.bias expert 5: biased against by 1" in said


def test_another_model_is_refused(path, tmp_path):
    done = CliRunner().invoke(main, ["evaluate", str(path), "--reference", "deepseek-r1"])
    assert done.exit_code == 1 and "description without weights" in done.output


def test_what_cannot_be_asked_is_refused_at_once(path, tmp_path):
    done = CliRunner().invoke(main, ["evaluate", str(path), "--tokens", "200000"])
    assert done.exit_code == 1 and "more than the 163,840 that the model was made for" in done.output
    done = run(path, tmp_path / "x.jsonl")
    assert done.exit_code == 1 and "name it x.json" in done.output


def test_other_questions_are_not_answered_by_old_notes(path, tmp_path, monkeypatch):
    """Another chat template, another version of quantkit: the original has to write again."""
    asked = []

    def notes(place, about, **_):
        asked.append((place.name, about))
        raise QuantkitError("seen enough")

    monkeypatch.setattr(evaluating, "Notes", notes)
    for n_shots in (tasks.SHOTS, tasks.SHOTS, tasks.SHOTS + 1):
        monkeypatch.setattr(tasks, "SHOTS", n_shots)
        assert "seen enough" in run(path, tmp_path / "x.json").output
    assert asked[0] == asked[1] and asked[0][0] != asked[2][0] and asked[0][1] != asked[2][1]


def test_the_interval_is_of_what_is_lost(tmp_path):
    """Also where short continuations lose more than long ones."""
    items = [Item(f"text/{i}", "text", "greedy", (0,), 400, tasks.GREEDY) for i in range(20)]
    theirs, ours = Notes(tmp_path / "theirs", {}), Notes(tmp_path / "ours", {})
    for i, item in enumerate(items):
        n, lost = (10, 2.0 + i % 3 / 10) if i % 2 else (400, 0.1 + i % 3 / 100)
        theirs.add(item.key, tokens=[1] * n, ended=True, nll=float(n))
        ours.add(f"nll/{item.key}", nll=n * (1 + lost))
    found = words(items, theirs, ours)
    assert found["lost"] == pytest.approx(0.159, abs=0.01)
    assert found["lost_ci95"][0] < found["lost"] < found["lost_ci95"][1] < 0.3


def test_two_evaluations_do_not_mix_their_notes(tmp_path):
    first = Notes(tmp_path / "x.jsonl", {"file": 1}, alone=True)
    first.add("a", tokens=[1])
    with pytest.raises(QuantkitError, match="another evaluation writes it"):
        Notes(tmp_path / "x.jsonl", {"file": 2}, alone=True)
    first.file.close()
    assert Notes(tmp_path / "x.jsonl", {"file": 1}, alone=True).found == {"a": {"tokens": [1]}}


def test_a_second_files_figures_replace_none(path, tmp_path):
    first, second = (shutil.copy(path, tmp_path / name) for name in ("first.gguf", "second.gguf"))
    assert place_of_evaluation(first).name == place_of_evaluation(second).name == "evaluate.json"
    of = {"of": {"amount": {}, "file": GGUFFile.open(first).fingerprint()}}
    (tmp_path / "evaluate.jsonl").write_text(json.dumps(of, sort_keys=True) + "\n")  # of a run that was stopped
    assert place_of_evaluation(first).name == "evaluate.json"
    assert place_of_evaluation(second).name == "evaluate-second.json"
    (tmp_path / "evaluate.json").write_text(json.dumps({"file": "second.gguf"}))
    assert place_of_evaluation(second).name == "evaluate.json"
    assert place_of_evaluation(first).name == "evaluate-first.json"


def test_judges():
    assert judge.repeated([1, 2, 3, 4] * 4, 4) == pytest.approx(9 / 13) and judge.repeated(range(50), 4) == 0
    assert judge.repeated([1], 4) == 0
    assert judge.thinks_without_end("so", True) and judge.thinks_without_end("<think>so", False)
    assert not judge.thinks_without_end("so</think>yes", True) and not judge.thinks_without_end("yes", False)
    assert judge.number(" 42, or 43") == "42" and judge.number("none") is None
    good = '{"name": "f", "arguments": {"a": 1}}'
    assert judge.is_call(f" {good}\nuser: more") and not judge.is_call(good[:-1]) and not judge.is_call("[" * 10**5)
    begun = "def f(n):\n"
    for text, cut, right in (
        ("    return n\n", False, True),
        ("    return n\n\nThat was the function.\n", False, True),
        ("    return n + (\n", False, False),
        ("    for i in range(n):\n        if i", True, True),
        ("    return n)\n    x = 1\n    y = 2\n    z = 3\n    a = 4\n    b", True, False),
        ("    return n\n```\nText (", False, True),
        ("pass", False, False),
    ):
        assert judge.parses(begun, text, cut) == right, text


def test_rates():
    low, high = rates.wilson(0, 100)
    assert low == 0 and high == pytest.approx(0.0370, abs=1e-4)  # Wilson's interval of 0 of 100: 0 to 3.70 %
    assert rates.wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert rates.by_chance(8, 10, 2, 10) == pytest.approx(0.0115, abs=1e-4)  # Fisher's one-sided p of [[8, 2], [2, 8]]
    assert rates.by_chance(0, 10, 5, 10) == pytest.approx(1) and rates.by_chance(10, 10, 10, 10) == pytest.approx(1)
    assert rates.Rate("x", "greedy", 30, 100, 2, 100).worse and not rates.Rate("x", "greedy", 4, 100, 2, 100).worse


def test_tasks_are_the_same_each_time(path):
    weights = open_gguf(path, n_threads=1)

    def items(context):
        return Tasks(weights.file.metadata, weights.tokenizer(), weights.config.bos, Amount(7, 64, context)).items()

    assert items(512) == items(512)
    assert len({item.key for item in items(512)}) == len(items(512))
    longest = max(len(item.prompt) + item.n_tokens for item in items(1024) if item.kind == "needle")
    assert 512 < longest <= 1024
    needle = next(item for item in items(512) if item.kind == "needle")
    assert needle.lead.count(needle.wanted) == 1 and needle.lead.endswith("The number of the lighthouse is")
    assert {len(prompts()[kind]) for kind in ("text", "chat", "code")} == {24, 12, 10}


def test_the_table_fits_a_terminal():
    certain = {"rate": 100.0, "ci95": [90.36, 100.0], "rate_reference": 97.5, "ci95_reference": [87.12, 99.56]}
    row = {"what": "repeats its 16-grams", "mode": "sampled", "n": 500, "worse": False, **certain}
    console = Console(width=200)
    with console.capture() as shown:
        console.print(table({"rates": [row]}))
    lines = shown.get().splitlines()
    assert max(map(len, map(str.rstrip, lines))) <= 80 and "90.4–100.0" in lines[-1]
