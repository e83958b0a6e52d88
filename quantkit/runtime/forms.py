"""The two forms of multi-head latent attention: keys and values of every head, or kv_b absorbed into the query."""

import torch
import torch.nn.functional as F

from quantkit.runtime.pauses import pause

SCORE_ELEMENTS = 1 << 26  # attention scores held at once: 256 MB as float32
QUERY_TILE = 128  # queries per tile: scores above the diagonal are wasted only within a tile


def expanded(
    query: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b: tuple[torch.Tensor, torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """Whole chunks without a cache: keys and values per head are cheaper than attention over the latent.

    query [s, t, h, n + r], latent [s, t, c], k_rope [s, t, r] -> values [s, t, h, v]. kv_b: k_b, v_b.
    """
    (n_seq, t, n_head, _), (k_b, v_b) = query.shape, kv_b
    k_nope = torch.einsum("stc,hcn->shtn", latent, k_b)
    # One product: the einsum of bfloat16 on the CPU first copies v_b, which takes ten times as long.
    values = (latent @ v_b.flatten(0, 1).T).view(n_seq, t, n_head, -1).transpose(1, 2)
    keys = torch.cat((k_nope, k_rope[:, None].expand(n_seq, n_head, t, -1)), dim=-1)
    v_head = values.shape[-1]
    if values.device.type == "cpu":  # torch's fused CPU kernel wants values as long as keys, else it computes all t x t
        values = F.pad(values, (0, max(0, keys.shape[-1] - v_head)))
    mixed = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, is_causal=True, scale=scale)
    return mixed[..., :v_head].transpose(1, 2)


def absorbed(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax over the compressed cache, which all heads share; in tiles of queries, so that scores stay few.

    q_latent [s, t, h, c], q_rope [s, t, h, r], latent [s, n, c], k_rope [s, n, r] -> [s, t, h, c]. The t queries are
    the last t of the n cached positions. mask bool [s, t, n]: which of these they attend to.
    """
    n_seq, t, n_head, _ = q_latent.shape
    n = latent.shape[1]
    key = torch.cat((latent, k_rope), dim=-1).transpose(1, 2)  # [s, c + r, n]
    query = torch.cat((q_latent.to(latent.dtype), q_rope.to(latent.dtype)), dim=-1)
    out = torch.empty_like(q_latent, dtype=latent.dtype)
    step = max(1, min(QUERY_TILE, SCORE_ELEMENTS // (n_seq * n_head * n)))
    column = torch.arange(n, device=latent.device)
    for begin in range(0, t, step):
        end = min(begin + step, t)
        seen = n - t + end  # later columns are masked for the whole tile
        scores = query[:, begin:end].flatten(1, 2) @ key[..., :seen]
        scores = scores.float().mul_(scale).view(n_seq, end - begin, n_head, seen)
        if end - begin > 1:
            last = torch.arange(n - t + begin, n - t + end, device=latent.device)
            scores.masked_fill_((column[:seen] > last[:, None])[:, None, :], float("-inf"))
        if mask is not None:
            scores.masked_fill_(~mask[:, begin:end, None, :seen], float("-inf"))
        weights = scores.softmax(-1).to(latent.dtype)
        out[:, begin:end] = (weights.flatten(1, 2) @ latent[:, :seen]).view(n_seq, end - begin, n_head, -1)
        # Behind 16,000 tokens all tiles of a piece take longer than others should wait.
        pause(latent.device, "a tile of attention")
    return out
