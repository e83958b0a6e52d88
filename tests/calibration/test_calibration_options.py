"""How much text a calibration takes, where nobody says."""

import json
from types import SimpleNamespace

import pytest
import torch

from quantkit import bundle
from quantkit.calibration import options, state
from quantkit.calibration.collect import Accumulator, collect
from quantkit.calibration.corpus import Chunks, TextChoice
from quantkit.calibration.options import LEAST, check_length, sized, wanted
from quantkit.calibration.state import PassState
from quantkit.errors import QuantkitError
from quantkit.models import family
from quantkit.runtime.rates import active_weights
from quantkit.runtime.sources.checkpoint import CheckpointSource


@pytest.fixture(scope="module")
def r1():
    return family.from_hf(json.loads((bundle.models_dir() / "deepseek-r1" / "config.json").read_text()))


@pytest.fixture
def machine(monkeypatch):
    """Of so much GPU memory and RAM, bytes."""

    def of(gpu, ram):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gpu))
        monkeypatch.setattr(options, "machine_memory", lambda: ram)
        return torch.device("cuda")

    return of


def test_r1_wants_four_tokens_a_dimension_and_small_models_what_they_ever_had(r1, tiny):
    assert wanted(r1) == 917504 == 4 * 7168 * 256 // 8
    assert wanted(family.from_hf(tiny.config)) == LEAST == 131072


def test_a_gpu_takes_them_if_it_or_ram_has_room(r1, machine):
    choice = TextChoice()
    assert sized(choice, r1, torch.device("cpu")).n_tokens == LEAST
    assert sized(choice, r1, machine(80 * 10**9, 512 * 10**9)).n_tokens == 917504
    assert sized(choice, r1, machine(24 * 10**9, 128 * 10**9)).n_tokens == 917504
    less = sized(choice, r1, machine(24 * 10**9, 32 * 10**9)).n_tokens
    assert LEAST < less < 917504 and less % 512 == 0
    assert sized(choice, r1, machine(12 * 10**9, 4 * 10**9)).n_tokens == LEAST
    assert sized(TextChoice(n_tokens=1000), r1, machine(80 * 10**9, 512 * 10**9)).n_tokens == 1000


def test_a_short_text_is_said_with_what_to_give_and_what_the_pass_takes(r1, tiny, capsys):
    chunks = Chunks(torch.zeros(1024, 512, dtype=torch.int64), torch.zeros(0), ())
    large = SimpleNamespace(config=r1, device=torch.device("cuda"))
    check_length(chunks, TextChoice(n_tokens=917504), large)
    short, takes = capsys.readouterr().err.splitlines()
    assert "524,288 tokens of 917,504, 2.3 for each dimension" in short and "--data" in short
    assert takes.startswith("524,288 tokens: 15.0 GB, 14.0 GiB of disk") and "about 7 minutes" in takes
    check_length(chunks, TextChoice(n_tokens=524288), large)
    assert capsys.readouterr().err.splitlines() == [takes]
    check_length(chunks, TextChoice(n_tokens=917504), CheckpointSource(tiny))
    assert not capsys.readouterr().err


def test_a_token_of_r1_meets_37_billion_weights(r1):
    assert active_weights(r1) == pytest.approx(37e9, rel=0.02)


def test_large_hidden_states_are_saved_after_every_fourth_layer_and_a_pass_goes_on_from_there(
    tiny, tmp_path, monkeypatch
):
    source, tokens = CheckpointSource(tiny), torch.randint(0, 700, (2, 64), generator=torch.Generator().manual_seed(0))
    whole = collect(source, tokens)
    monkeypatch.setattr(state, "LARGE", 0)
    monkeypatch.setattr(state, "EVERY", 2)
    kept = PassState(tmp_path / "state", "job")

    def stopped(layer):
        if layer == 3:
            raise KeyboardInterrupt
        return Accumulator(layer, source.config.n_expert)

    with pytest.raises(KeyboardInterrupt):
        collect(source, tokens, kept, watch=stopped)
    assert kept.resume()[1] == 2
    found = collect(source, tokens, kept)
    assert all((found[name].in_sum2 == entry.in_sum2).all() for name, entry in whole.items())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(QuantkitError, match=r"needs 2\.0 GB, 1\.9 GiB; free are 1\.0 MB, 1\.0 MiB; take"):
        PassState(tmp_path / "other", "job").check_disk(10**9)
    PassState(tmp_path / "other", "job").check_disk(4 * 10**5)
    with pytest.raises(QuantkitError, match=r"needs 0\.8 MB, 0\.8 MiB beside the file's 0\.5 MB, 0\.5 MiB; free are"):
        PassState(tmp_path / "other", "job").check_disk(4 * 10**5, 5 * 10**5)
