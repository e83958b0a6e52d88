"""The numbers of a model with multi-head latent attention (MLA) and routed experts, whatever they were read from."""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quantkit.errors import QuantkitError

Mla = Literal["split", "combined"]
"""How a file stores kv_b: as attn_k_b and attn_v_b, or whole as attn_kv_b, as files before split MLA do."""

MLA: Mapping[str, Mla] = {"split": "split", "combined": "combined"}  # by what recipes and plans call them
SCORING = ("softmax", "sigmoid", "sqrtsoftplus")
RATIOS = (0, 4, 128)  # of tokens to a compressed entry; 0: a layer has none
MTP = "num_nextn_predict_layers"  # of config.json
MAX_SIZE, MAX_LAYERS, MAX_EXPERTS = 1 << 24, 1 << 12, 1 << 17  # the last of all layers; R1 has 15,616
MAX_STREAMS = 1 << 10  # and iterations that mix them; V4 has 4 and 20


def is_finite(value: Any) -> bool:
    """Whether it is a number that a float can hold; JSON has whole numbers of any length."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension: the factors that shape rotary frequencies and the softmax scale."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def attention_factor(self) -> float:
        """mscale of DeepSeek's modelling code: the softmax scale is multiplied by its square."""
        return 0.1 * self.mscale_all_dim * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class Indexer:
    """DeepSeek sparse attention (DSA): a token attends to the top_k positions that a small scorer of n_head heads, each
    of `width` numbers, likes best; to all if there are no more.

    interleaved: whether its rotary embedding turns neighbours, as the main attention's does, or halves.
    full: of each layer, whether it has a scorer; the others attend to what the last one before them chose.
    """

    n_head: int
    width: int
    top_k: int
    interleaved: bool
    full: tuple[bool, ...]

    @property
    def shares(self) -> bool:
        """Whether some layers take over what others chose."""
        return not all(self.full)


@dataclass(frozen=True)
class Compression:
    """DeepSeek-V4's attention: a token sees the last `window` positions, whose one key is their value too, and in most
    layers an entry for every `ratio` positions before it, of ratio 4 those that an indexer likes best.

    ratios: of each layer. rope_base: of layers that compress, to which alone YaRN belongs. The outputs of the heads
    fall into n_group groups, each of which gets lora numbers of its own before the output matrix.
    """

    ratios: tuple[int, ...]
    window: int
    rope_base: float
    n_group: int
    lora: int


@dataclass(frozen=True)
class Streams:
    """Manifold-constrained hyper-connections: the residual stream is n streams, which a layer mixes by a matrix that
    `iterations` of Sinkhorn's make doubly stochastic."""

    n: int
    iterations: int
    eps: float


@dataclass(frozen=True)
class ModelConfig:
    """Everything the layer mathematics, the tensor list and the metadata need.

    architecture: GGUF's general.architecture, which names the family (`models.family`).
    q_lora: None for a plain q projection. d, n_ff, ...: widths in weights; n_ff_exp: of one expert. DeepSeek-V4 has one
    key of qk_nope + qk_rope numbers, which is the value too: kv_lora and v_head are its width; and no dense layers.
    """

    architecture: str
    n_layer: int
    d: int
    n_head: int
    q_lora: int | None
    kv_lora: int
    qk_nope: int
    qk_rope: int
    v_head: int
    n_ff: int
    n_ff_exp: int
    n_dense: int
    n_expert: int
    n_used: int
    n_shared: int
    n_group: int
    n_group_used: int
    scoring: str
    norm_weights: bool
    weights_scale: float
    has_bias: bool
    n_vocab: int
    n_context: int
    rms_eps: float
    rope_base: float
    yarn: Yarn | None
    bos: int
    eos: int
    more_ends: tuple[int, ...] = ()  # tokens besides eos that end an answer
    tied: bool = False
    group_score: str = "top2"  # noaux_tc scores a group by its two best experts; V2 by its best
    indexer: Indexer | None = None  # None: every token attends to all before it
    compression: Compression | None = None  # None: multi-head latent attention
    streams: Streams | None = None  # None: one residual stream
    n_hash: int = 0  # first layers whose experts a table chooses, by the token
    limit: float | None = None  # of SwiGLU: gate is at most this, up between it and its negative
    n_mtp: int = 0  # layers behind the last that predict the token after the next (MTP), if a file is to hold them

    @property
    def n_block(self) -> int:
        """Layers and MTP layers, which a file numbers on."""
        return self.n_layer + self.n_mtp

    @property
    def n_moe(self) -> int:
        """Layers with routed experts; the dense ones come first."""
        return self.n_layer - self.n_dense

    @property
    def width(self) -> int:
        """Numbers of a hidden state: all streams."""
        return self.d * (self.streams.n if self.streams else 1)

    @property
    def qk_head(self) -> int:
        """Width of a head's query and key: the part without rotation and the rotated one."""
        return self.qk_nope + self.qk_rope

    @property
    def softmax_scale(self) -> float:
        """What attention scores are multiplied by before the softmax."""
        mscale = self.yarn.attention_factor if self.yarn else 1.0
        return self.qk_head**-0.5 * mscale * mscale

    def is_end(self, token: int) -> bool:
        """Whether an answer ends with this token."""
        return token in self.ends

    @property
    def ends(self) -> tuple[int, ...]:
        """EOS, and the other tokens that end an answer."""
        return self.eos, *self.more_ends

    def has_indexer(self, layer: int) -> bool:
        """Whether this layer chooses positions by itself."""
        return self.indexer is not None and (layer >= self.n_layer or self.indexer.full[layer])

    def is_moe(self, layer: int) -> bool:
        """Whether this layer has routed experts."""
        return layer >= self.n_dense

    def check(self, where: str) -> None:
        """QuantkitError, beginning with `where`, for numbers that no model has."""
        self._check_sizes(where)
        self._check_routing(where)
        yarn = tuple(vars(self.yarn).values()) if self.yarn else ()
        floats = (self.rms_eps, self.rope_base, self.weights_scale, *yarn)
        if not all(type(number) in (int, float) and is_finite(number) for number in floats):
            raise QuantkitError(f"{where}: epsilon, scale or rope parameters are not finite numbers")
        positive = (self.rope_base, *yarn[:4], 1 if self.q_lora is None else self.q_lora)  # all of yarn's but mscale
        if self.rms_eps < 0 or min(positive) <= 0:
            raise QuantkitError(f"{where}: epsilon, q_lora or a rope parameter is negative or zero")
        if self.yarn and self.yarn.beta_slow > self.yarn.beta_fast:  # Kimi's are both 1
            raise QuantkitError(
                f"{where}: yarn's beta_slow {self.yarn.beta_slow:g} is above beta_fast {self.yarn.beta_fast:g}"
            )
        if not all(type(flag) is bool for flag in (self.norm_weights, self.has_bias, self.tied)):
            raise QuantkitError(f"{where}: norm_weights, a bias or tied is not true or false")
        if self.qk_rope % 2:
            raise QuantkitError(f"{where}: qk_rope_head_dim {self.qk_rope} is odd")
        if self.indexer:
            self._check_indexer(where, self.indexer)
        if self.compression:
            self._check_compression(where, self.compression)

    def _check_compression(self, where: str, how: Compression) -> None:
        sizes = (how.window, how.n_group, how.lora)
        if not all(type(number) is int and 0 < number <= MAX_SIZE for number in sizes):
            raise QuantkitError(f"{where}: window, output groups or their rank, {sizes}, are no sizes")
        if len(how.ratios) != self.n_layer or not all(ratio in RATIOS for ratio in how.ratios):
            raise QuantkitError(
                f"{where}: {len(how.ratios)} compression ratios for {self.n_layer} layers, or not all among {RATIOS}"
            )
        if self.n_head % how.n_group:
            raise QuantkitError(f"{where}: {self.n_head} heads do not fall into {how.n_group} equal groups")
        if type(self.n_hash) is not int or not 0 <= self.n_hash <= self.n_layer:
            raise QuantkitError(f"{where}: {self.n_hash} hash layers of {self.n_layer}")
        if self.streams:
            counts = (self.streams.n, self.streams.iterations)
            if not all(type(number) is int and 0 < number <= MAX_STREAMS for number in counts):
                raise QuantkitError(f"{where}: {counts[0]} residual streams, {counts[1]} iterations: no such numbers")
        floats = [how.rope_base, *([self.limit] if self.limit is not None else ())]
        floats += [self.streams.eps] if self.streams else []
        if not all(is_finite(number) and number > 0 for number in floats):
            raise QuantkitError(f"{where}: a rope base, SwiGLU's limit or epsilon is not a positive number")

    def _check_indexer(self, where: str, indexer: Indexer) -> None:
        sizes = (indexer.n_head, indexer.width, indexer.top_k)
        if not all(type(number) is int and 0 < number <= MAX_SIZE for number in sizes):
            raise QuantkitError(f"{where}: heads, width or top-k of the indexer, {sizes}, are no sizes")
        if indexer.width < self.qk_rope:
            raise QuantkitError(
                f"{where}: the indexer's heads of {indexer.width} are narrower than the {self.qk_rope} that turn"
            )
        if self.q_lora is None:
            raise QuantkitError(f"{where}: an indexer needs q_lora_rank: its queries come from there")
        if len(indexer.full) != self.n_layer or not all(type(full) is bool for full in indexer.full):
            raise QuantkitError(
                f"{where}: {len(indexer.full)} indexer types for {self.n_layer} layers, or not all true or false"
            )
        if not (indexer.full[0] or self.compression):
            raise QuantkitError(f"{where}: the first layer has no indexer, and none before it to share with")

    def _check_sizes(self, where: str) -> None:
        attention = (self.d, self.n_head, self.kv_lora, self.qk_nope, self.qk_rope, self.v_head)
        experts = (self.n_ff_exp, self.n_expert, self.n_used, self.n_group, self.n_group_used)
        sizes = (self.n_layer, *attention, self.n_ff, *experts, self.n_vocab)
        whole = (
            *sizes,
            self.n_dense,
            self.n_shared,
            self.q_lora or 0,
            self.n_context,
            self.bos,
            self.eos,
            *self.more_ends,
        )
        if not all(type(number) is int for number in whole):
            raise QuantkitError(f"{where}: a size or token id is not a whole number")
        many = self.n_layer > MAX_LAYERS or self.n_layer * self.n_expert > MAX_EXPERTS
        if many or max(*sizes, self.n_shared) > MAX_SIZE:
            raise QuantkitError(
                f"{where}: {self.n_layer} layers of {self.n_expert} experts, or another size, are beyond any model"
            )
        if type(self.n_mtp) is not int or self.n_mtp not in (0, 1):  # llama.cpp's most
            raise QuantkitError(f"{where}: {self.n_mtp} layers that predict the token after the next, only 0 or 1")
        if min(sizes) < 1 or not 0 <= self.n_dense <= self.n_layer or self.n_shared < 0:
            raise QuantkitError(f"{where}: sizes must be positive and dense layers at most {self.n_layer}")

    def _check_routing(self, where: str) -> None:
        if self.scoring not in SCORING:
            raise QuantkitError(f"{where}: scoring_func {self.scoring!r} is not one of {sorted(SCORING)}")
        if self.n_expert % self.n_group or self.n_group_used > self.n_group:
            raise QuantkitError(f"{where}: {self.n_expert} experts do not fall into {self.n_group} equal groups")
        if self.n_used > self.n_group_used * (self.n_expert // self.n_group):
            raise QuantkitError(f"{where}: top-{self.n_used} needs more experts than the kept groups hold")


def layouts_of(names: Iterable[str]) -> set[Mla]:
    """The MLA layouts that GGUF tensors of these names belong to; llama.cpp rejects a file with tensors of both."""
    found: set[Mla] = set()
    for name in names:
        if ".attn_kv_b." in name:
            found.add("combined")
        elif ".attn_k_b." in name or ".attn_v_b." in name:
            found.add("split")
    return found


def mla_of(names: Iterable[str], default: Mla = "split") -> Mla:
    """The MLA layout that tensors of these names are in. QuantkitError if some are in one and some in the other."""
    found = layouts_of(names) or {default}
    if len(found) > 1:
        raise QuantkitError("attn_kv_b and attn_k_b/attn_v_b in one file: llama.cpp rejects it; keep one MLA layout")
    return found.pop()
