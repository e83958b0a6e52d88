"""Several prompts in one pass of the GPU's engine: the numbers of each alone, launches that do not grow with them, and
memory that does neither."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantkit import bundle
from quantkit.models import family
from quantkit.models.config import ModelConfig
from quantkit.models.tokenizer import tokenize
from quantkit.runtime.engines import gpu_memory
from quantkit.runtime.engines.gpu import GpuEngine
from quantkit.runtime.engines.gpu_layers import GpuLayer
from quantkit.runtime.engines.pieces import PLANNED, POSITIONS, ROWS, Pieces, attention, batches
from quantkit.runtime.generate import Piece
from quantkit.runtime.packed import Plain
from quantkit.runtime.pauses import pausing
from quantkit.runtime.sources.gguf import open_gguf

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BEFORE = 90  # tokens that sequences have which go on


@pytest.fixture(scope="module")
def path(made):
    return next(made.glob("tiny-r1-*.gguf"))


@pytest.fixture(scope="module")
def engine(path) -> GpuEngine:
    return GpuEngine(open_gguf(path, n_threads=1), 16, 300, 3)


@pytest.fixture(scope="module")
def text(engine) -> list[int]:
    """Whose experts are chosen by margins: of tokens at random one is nearly another's equal."""
    return tokenize(engine.weights.tokenizer(), "The ship went down in the storm. " * 60)


def some(text: list[int], *sizes: tuple[int, int]) -> list[Piece]:
    """Pieces of so many tokens that begin there, each with a text of its own."""
    return [Piece(slot, text[slot + begin :][:n], begin) for slot, (n, begin) in enumerate(sizes)]


def kld(a: torch.Tensor, b: torch.Tensor) -> float:
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).max())


@pytest.mark.parametrize("device", DEVICES)
def test_as_each_alone(path, text, device):
    """Beginnings and others, of uneven lengths: all logits, those of the last tokens in the order of the pieces, and
    what is decoded next."""
    engine = GpuEngine(open_gguf(path, device, n_threads=1), 8, 300, 3)
    engine.by_steps = False  # short ones would be one
    most = 5e-3 if device == "cuda" else 1e-6
    # (30, 90) and (2, 7) are padded to 30 tokens, of which the first that the second one is given see nothing.
    pieces = some(text, (20, 90), (33, 0), (150, 0), (20, 7), (5, 0), (1, 90), (30, 90), (2, 7))
    shared = next(batch for batch in batches(pieces, engine.config.n_head) if pieces[6] in batch)
    assert pieces[7] in shared
    slots = [piece.slot for piece in pieces]

    def begin() -> None:
        for piece in pieces:
            if piece.begin:
                engine.prefill(piece.slot, text[piece.slot :][:BEFORE], 0)

    def told(piece: Piece, to: list[torch.Tensor]) -> Piece:
        return piece._replace(each=lambda rows: to.append(rows.clone()))

    begin()
    together, alone = ({slot: list[torch.Tensor]() for slot in slots} for _ in range(2))
    last = engine.prefill_together([told(piece, together[piece.slot]) for piece in pieces]).clone()
    after = engine.decode(slots, [5] * len(slots)).clone()
    begin()
    ends = [engine.prefill_together([told(piece, alone[piece.slot])])[0].clone() for piece in pieces]
    for slot in slots:
        assert kld(torch.cat(alone[slot]), torch.cat(together[slot])) < most
    assert kld(torch.stack(ends), last) < most
    assert kld(engine.decode(slots, [5] * len(slots)), after) < most


class Launches(TorchDispatchMode):
    """How many there would be on a GPU: operations that are no views, and make more than room."""

    n = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        views = (found.alias_info and not found.alias_info.is_write for found in operation._schema.returns)
        self.n += not (any(views) or "empty" in operation.name())
        return operation(*args, **(kwargs or {}))


def dequantized(layer: GpuLayer) -> GpuLayer:
    """A GPU does that by a kernel for each matrix."""
    q_a, norm, q_b = layer.q
    parts = ("kv_a", "k_b", "v_b", "output")
    plain = {part: Plain(getattr(layer, part).dense()) for part in parts}
    return replace(layer, q=(Plain(q_a.dense()), norm, Plain(q_b.dense())), **plain)


@pytest.mark.parametrize("begin", [0, BEFORE])
def test_launches_do_not_grow_with_short_prompts(engine, text, begin):
    """Of one, four and sixteen, of uneven lengths; one alone needs no padding."""
    layer = dequantized(engine.layers[1])

    def launches_of(n: int) -> int:
        pieces = some(text, *((20 + i % 5, begin) for i in range(n)))
        placed = Pieces(pieces, engine.config, engine.buffers.turned)
        h = torch.zeros(len(placed.tokens), engine.config.d)
        with torch.no_grad(), Launches() as launches:  # inference mode would hide what operations consist of
            attention(h, layer, engine.config, engine.cache[1], placed)
        return launches.n

    one, few, many = map(launches_of, (1, 4, 16))
    print(f"from {begin}: {one}, {few}, {many} launches for attention of 1, 4, 16 prompts in a layer")
    assert few == many <= one + 8


@pytest.mark.parametrize("begin", [0, BEFORE])
def test_others_are_let_in(engine, text, begin):
    """After every layer's attention and feed-forward, and within the attention of those that see something before."""
    pieces = some(text, (20, begin), (30, 0), (25, begin))
    engine.prefill(9, text[9:19], 0)
    for slot in range(3):
        engine.prefill(slot, text[slot:][:BEFORE], 0)
    expected, alone, parts = engine.prefill_together(pieces).clone(), engine.decode([9], [7]).clone(), list[str]()

    def others(what: str) -> None:
        parts.append(what)
        if len(parts) < 4:
            engine.length[9] = 10
            assert torch.equal(engine.decode([9], [7]), alone)

    with pausing(others):
        found = engine.prefill_together(pieces).clone()
    assert torch.equal(found, expected)
    n = engine.config.n_layer
    assert parts.count("attention") == parts.count("feed-forward") == n
    assert parts.count("a tile of attention") == (n if begin else 0)


@pytest.mark.parametrize("n", [PLANNED - 1, PLANNED])
def test_attention_that_is_planned_is_for_long_pieces(engine, n):
    """Whatever comes beside them, and afterwards torch chooses as before."""
    placed = Pieces(some(4096 * [0], (5, 0), (n, 0)), engine.config, torch.zeros(4096, engine.config.qk_rope))
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with placed.kernels():
        assert torch.backends.cuda.cudnn_sdp_enabled() == (n >= PLANNED)
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_batches_are_few_and_bounded():
    """Short ones beside a long one, of all lengths, and far into long contexts."""
    lengths = {
        "one long": [1000] + 20 * [1],
        "all alike": 64 * [16],
        "any": [1 + 7 * i % 60 for i in range(32)],
        "doubled": [2**i for i in range(10)],
    }
    for name, sizes in lengths.items():
        for begin in (0, 300, 16000):
            pieces = some(17000 * [0], *((n, begin) for n in sizes))
            found = list(batches(pieces, 128))
            assert sorted(piece.slot for batch in found for piece in batch) == list(range(len(sizes)))
            for batch in (batch for batch in found if len(batch) > 1):
                t = max(len(piece.tokens) for piece in batch)
                assert len(batch) * t <= (ROWS // 2 if begin else ROWS)
                assert not begin or len(batch) * (begin + t) <= POSITIONS
            assert begin == 16000 or len(found) <= 4, (name, begin)
    assert [len(batch) for batch in batches(some(100 * [0], (9, 0), (9, 5), (8, 0), (8, 5)), 128)] == [2, 2]


# Memory: R1's geometry without numbers


class Held(TorchDispatchMode):
    """Most bytes of tensors that were made within it and were there at once."""

    def __init__(self, before: Sequence[torch.Tensor]):
        super().__init__()
        self.before, self.alive, self.most = {t.untyped_storage()._cdata for t in before}, {}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.before:
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.alive = {key: own for key, own in self.alive.items() if not own[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return found


def attention_of_r1(c: ModelConfig) -> GpuLayer:
    """Its matrices, as they are dequantized."""

    def matrix(*shape: int) -> Plain:
        return Plain(torch.empty(shape, dtype=torch.bfloat16, device="meta"))

    def vector(n: int) -> torch.Tensor:
        return torch.empty(n, device="meta")

    assert c.q_lora
    q = matrix(1, c.q_lora, c.d), vector(c.q_lora), matrix(1, c.n_head * c.qk_head, c.q_lora)
    kv_a, k_b = matrix(1, c.kv_lora + c.qk_rope, c.d), matrix(c.n_head, c.kv_lora, c.qk_nope)
    v_b, output = matrix(c.n_head, c.v_head, c.kv_lora), matrix(1, c.d, c.n_head * c.v_head)
    return GpuLayer(vector(c.d), q, kv_a, vector(c.kv_lora), k_b, v_b, output, vector(c.d), None)


def fused(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **_) -> torch.Tensor:
    """What a kernel of a GPU leaves, without scores in memory."""
    return query.new_empty(*query.transpose(1, 2).shape[:3], values.shape[-1]).transpose(1, 2)


@pytest.mark.parametrize(
    "sizes",
    [
        [(1000, 0)] + 20 * [(1, 0)],
        [(64, 0)] + 63 * [(3, 0)],
        16 * [(64, 0)],
        16 * [(64, 4032)],
        32 * [(16, 0)] + 32 * [(16, 1000)],
        [(512, 300)] + 16 * [(31, 300)],
        64 * [(4, 15000)],
        [(2048, 0)] + 32 * [(64, 0)],
        64 * [(16, 496)],
        [(1024, 15000)],
        [(4096, 0)],
        [(4096, 4096)],
    ],
)
def test_memory_stays_within_the_workspace(monkeypatch, sizes):
    """Of the least piece that holds so many tokens; beside it k_b and v_b are dequantized, 34 MB."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    c = family.from_hf(json.loads((bundle.models_dir() / "deepseek-r1" / "config.json").read_text()))
    layer, width = attention_of_r1(c), c.kv_lora + c.qk_rope
    cache = torch.empty(len(sizes), 16384, width, dtype=torch.bfloat16, device="meta")
    turned = torch.empty(16384, c.qk_rope, device="meta")
    pieces = Pieces([Piece(i, [0] * n, begin) for i, (n, begin) in enumerate(sizes)], c, turned)
    matrices = (layer.q[0], layer.q[2], layer.kv_a, layer.k_b, layer.v_b, layer.output)
    before = [layer.attn_norm, layer.q[1], layer.kv_a_norm, cache, *(matrix.weights for matrix in matrices)]
    with torch.inference_mode(), Held(before) as held:
        h = torch.empty(len(pieces.tokens), c.d, device="meta")
        h += attention(h, layer, c, cache, pieces)
    piece = min(n for n in gpu_memory.PIECES if n >= len(h))
    print(sizes[0], len(sizes), held.most, gpu_memory.workspace(c, piece))
    assert 2 * h.nbytes < held.most < gpu_memory.workspace(c, piece) - 34e6
