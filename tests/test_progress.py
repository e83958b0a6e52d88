"""A log has a line where a layer ends, now and then; ETA and rate are of this run alone."""

from io import StringIO

import pytest
from rich.console import Console

from quantkit import progress
from quantkit.progress import Meter, clock, track


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time, to be set."""
    at = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: at[0])
    return at


def test_a_log_has_a_line_at_most_every_half_minute(now, capsys):
    with track("layers", 400e9, "B") as advance:
        for layer in range(1, 5):
            for _ in range(4):
                now[0] += 10
                advance(25e9, f"layer {layer} of 4")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == ("layers: layer 1 of 4, 19%, 75.00 GB of 400.00 GB, 2.50 GB/s, elapsed 0:00:30, ETA 0:02:10")
    assert [line.split(", ")[0] for line in lines[1:-1]] == [f"layers: layer {n} of 4" for n in (2, 3, 4)]
    assert lines[-1] == "layers: done in 0:02:40, 2.50 GB/s"


def test_a_long_first_layer_says_when_all_will_be_done(now, capsys):
    with pytest.raises(KeyboardInterrupt), track("layers", 100, "layers") as advance:
        for _ in range(60):
            now[0] += 10
            advance(0.01, "in layer 1 of 100")
        raise KeyboardInterrupt
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("elapsed ")[1].split(",")[0] for line in lines] == ["0:00:30", "0:05:30", "0:10:00"]
    assert lines[-1].startswith("layers: stopped: in layer 1 of 100")


def test_what_an_earlier_run_did_says_nothing_of_the_speed(now):
    meter = Meter(100, "layers", done=60, before=50)
    now[0] += 20
    assert meter.rate == 0.5 and meter.left == 80 and meter.share == 0.6
    assert Meter(9, "tokens").text(4630.5) == "4,630 tokens" and Meter(9, "tokens").text(0.0696) == "0.0696 tokens"
    assert Meter(0, "layers").share == 1 and Meter(5, "layers").left is None and clock(None) == "?"


def test_levels(now, capsys):
    try:
        progress.set_level("quiet")
        progress.say("decided")
        progress.say("warning: beware")
        progress.set_level("verbose")
        with track("layers", 2, "layers") as advance:
            for layer in (1, 2):
                advance(1, f"layer {layer} of 2")
        assert [line[:15] for line in capsys.readouterr().err.splitlines()] == [
            "warning: beware",
            "layers: layer 1",
            "layers: layer 2",
        ]
    finally:
        progress.set_level("normal")


def test_labelled_lines_keep_their_column_on_a_terminal_only(monkeypatch):
    text = f"moments     24.4 MB, {'experts as rows, ' * 5}in mom"
    written = {}
    for terminal in (False, True):
        written[terminal] = StringIO()
        console = Console(file=written[terminal], force_terminal=terminal, width=80, color_system=None)
        monkeypatch.setattr(progress, "console", console)
        progress.say(text)
        progress.say("\n".join(["layer   fewest", *["    1      810"] * 6]))  # a table, which is longer, stays one
        progress.say("warning: pip install " + "x" * 80)  # may be copied: the terminal itself breaks it
    logged, shown = (written[terminal].getvalue().splitlines() for terminal in (False, True))
    assert logged[0] == text and shown[-1] == logged[-1]
    assert [line[:12].strip() for line in shown[:2]] == ["moments", ""] and max(map(len, shown[:-1])) <= 80
    assert shown[2:] == logged[1:]


def test_a_terminal_of_80_columns_has_room_for_the_bar(now, monkeypatch):
    import io

    from rich.console import Console

    shown = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={})
    monkeypatch.setattr(progress, "console", shown)
    with track("layers", 688e9, "B") as advance:
        now[0] += 50000
        advance(344e9, "in layer 31 of 61")
    last = shown.file.getvalue()
    assert "in layer 31 of 61" in last and "6.88 MB/s" in last and "ETA 13:53:20" in last
