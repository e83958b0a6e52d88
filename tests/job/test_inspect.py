"""What a stranger's file says is shown, not obeyed."""

import hostile_gguf

from quantkit.job.inspect import SHOWN, describe


def test_metadata_cannot_steer_the_terminal(tmp_path):
    model = hostile_gguf.model()
    model.metadata |= {"general.name": "a\x1b]0;title\x07\x1b[2J\r\nfake line\u202e", "general.x\x1b[31m": "y" * 10_000}
    text = describe(str(model.write(tmp_path / "m.gguf")))
    assert all(line.isprintable() for line in text.splitlines()) and "\\x1b]0;title\\x07" in text
    assert not any(line.startswith("fake") for line in text.splitlines())
    assert max(map(len, text.splitlines())) < SHOWN + 200 and "[10,000 characters]" in text
