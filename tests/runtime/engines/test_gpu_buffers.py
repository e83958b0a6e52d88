"""What a decoding step begins with: rows of the embedding and places, in one piece of memory."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from quantkit.errors import QuantkitError
from quantkit.ggml.quants import dequantize, quantize
from quantkit.runtime.engines.embedding import Embedding
from quantkit.runtime.engines.gpu_buffers import SHORT, Buffers, rows_of
from quantkit.runtime.sources.gguf import open_gguf

N_VOCAB = 40
DECODED = ("F32", "F16", "BF16")  # before they are sent
TYPES = (*DECODED, "Q4_K", "Q6_K", "Q8_0")


@pytest.fixture(scope="module")
def config(made):
    return open_gguf(next(made.glob("tiny-r1-*.gguf"))).config


def embedding_of(qtype: str, config) -> tuple[Embedding, np.ndarray]:
    """Of 40 tokens, and what they are."""
    rows = np.random.default_rng(0).standard_normal((N_VOCAB, config.d), np.float32)
    data = quantize(qtype, rows)
    file = SimpleNamespace(
        tensors={"token_embd.weight": SimpleNamespace(qtype=qtype, row_bytes=data.shape[1])}, data=lambda name: data
    )
    known = SimpleNamespace(d=config.d, n_vocab=N_VOCAB)
    return Embedding(SimpleNamespace(file=file, config=known, device=torch.device("cpu"))), dequantize(
        qtype, data, config.d
    )


@pytest.mark.parametrize("qtype", TYPES)
def test_what_a_step_begins_with(config, qtype):
    """Of every kind of type, for fewer tokens and for more than before: rows that are too many repeat the last."""
    embedding, values = embedding_of(qtype, config)
    assert embedding.packed == (qtype not in DECODED)
    buffers = Buffers(config, SHORT, 512, embedding.row_bytes, torch.device("cpu"))
    for number, n in enumerate((5, 1, 7, SHORT), 1):
        m, tokens = rows_of(n), [(11 * i + n) % N_VOCAB for i in range(n)]
        where = [100 + i for i in range(n)], [3 * i for i in range(n)], list(range(n))
        embedding.put(tokens, buffers.tokens_there[:n])
        buffers.begin(n, m, where)
        found = embedding.decoded(buffers.fetch(m))
        repeated = tokens + tokens[-1:] * (m - n)
        torch.testing.assert_close(found, torch.from_numpy(values[repeated]), rtol=1e-6, atol=0)
        expected = [part + part[-1:] * (m - n) for part in where]
        assert buffers.at[: 3 * m].view(3, m).tolist() == expected and buffers.at[-1] == number


def test_a_token_that_has_no_row(config):
    embedding, _ = embedding_of("Q4_K", config)
    buffers = Buffers(config, 2, 512, embedding.row_bytes, torch.device("cpu"))
    for token in (-1, N_VOCAB):
        with pytest.raises(QuantkitError, match=f"token id {token} is beyond the model's 40 tokens"):
            embedding.put([0, token], buffers.tokens_there)
    assert not buffers.tokens_there.any()
