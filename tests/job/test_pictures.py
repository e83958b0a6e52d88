"""Pictures that commands draw: of any name, whole or not at all."""

import dataclasses
import resource
import shutil

from click.testing import CliRunner

from quantkit.__main__ import main
from quantkit.calibration.sensitivity import heat_map
from quantkit.formats.sensitivity import Entry, Sensitivity
from quantkit.job.plan import plan_model
from quantkit.job.publish.card import layer_plot
from quantkit.job.report.page import write_report
from quantkit.planning import bitmap

NAME = "a$x_{$b"  # to matplotlib: mathematics that does not end


def test_a_full_disk_leaves_no_half_picture_or_plan(tmp_path):
    """As a disk that fills up while the file is written."""
    (tmp_path / "old.png").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        for name in ("old.png", "new.svg", "plan.json"):
            done = CliRunner().invoke(main, ["plan", "tiny-r1", "-o", str(tmp_path / name)])
            assert done.exit_code == 1 and f"{name}: " in done.output and "too large" in done.output, done.output
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"] and (tmp_path / "old.png").read_bytes() == b"old"


def test_a_name_is_no_mathematics(made, tmp_path):
    plan = dataclasses.replace(plan_model("tiny-r1", "1.58bit"), model=NAME)
    bitmap.draw(plan, tmp_path / "map.svg")
    assert layer_plot(plan)[:4] == b"\x89PNG"
    entry = Entry("blk.1.ffn_down_exps.weight", "ffn_down_exps", 1, "IQ1_S", 64, 0.1, 0.01)
    heat_map(Sensitivity(NAME, "full", 512, (entry,)), tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    folder = shutil.copytree(made, tmp_path / NAME)
    shutil.copytree(made, tmp_path / "b$")
    assert write_report(folder)
