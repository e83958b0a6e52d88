"""The nouns that every stage shares."""

from quantkit.tensors import split_name


def test_split_name():
    assert split_name("blk.13.exp_probs_b.bias") == ("exp_probs_b", 13)
    assert split_name("token_embd.weight") == ("token_embd", None)
    assert split_name("blk.x.y.weight") == ("blk.x.y", None)
