"""How often each routed expert is chosen, by calibration and lately, and which of them should be in GPU memory."""

import numpy as np

LAYER_SECONDS = 150e-6  # that a token waits for in a layer with any expert on the CPU, besides that one (one H200)
HALF_LIFE = 512  # tokens after which a choice counts half
LEARNT = 0.4  # of hits times misses: how many misses become hits by exchanging (0.3 to 0.7 on the proxies)
MARGIN = 2.0  # choices by which an expert must be hotter than one whose place it takes


def hottest(worth: np.ndarray, sizes: np.ndarray, room: int, whole: int = 0) -> np.ndarray:
    """Which experts to keep in `room` bytes: all of the first `whole` layers, then those worth most a byte as long as
    they fit; of equal ones the first of each layer. worth: [n, n_expert]; sizes: int64 [n], bytes of one expert of each
    layer -> bool [n, n_expert]."""
    n_expert, left = worth.shape[1], room - worth.shape[1] * sizes[:whole].sum()
    here = np.zeros(worth.shape, bool)
    here[:whole] = True
    rest, size = here[whole:].T, np.tile(sizes[whole:], n_expert)  # [n_expert, n]: a view, and flat
    order = np.argsort(-(worth[whole:].T.ravel() / size), kind="stable")
    chosen = np.zeros(len(size), bool)
    chosen[order[np.cumsum(size[order]) <= left]] = True
    rest[:] = chosen.reshape(rest.shape)
    return here


def seconds(here: np.ndarray, shares: np.ndarray, visits: np.ndarray) -> float:
    """That the layers of a token are expected to wait for the CPU. visits: seconds of as many experts there as a token
    chooses, of each layer."""
    missed = (shares * ~here).sum(1)
    missed = missed * (1 - LEARNT * (1 - missed))
    return float((missed * visits + LAYER_SECONDS * ~here.all(1)).sum())


def best(shares: np.ndarray | None, sizes: np.ndarray, n_expert: int, room: int, visits: np.ndarray) -> np.ndarray:
    """Which experts to keep, bool [n, n_expert]: as many layers whole as make tokens fastest, for those need not wait
    for the CPU at all, and of the others the hottest. Without shares none is whole, since the hottest are found only in
    layers of which some are missing, and the first experts begin."""
    n = len(sizes)
    if n_expert * sizes.sum() <= room:
        return np.ones((n, n_expert), bool)
    if shares is None:
        return hottest(np.arange(n_expert, 0, -1) * sizes[:, None], sizes, room)
    fit = np.flatnonzero(np.cumsum(sizes) * n_expert <= room) + 1
    found = [hottest(shares, sizes, room, whole) for whole in (0, *fit)]
    return min(found, key=lambda here: seconds(here, shares, visits))


class Heat:
    """Choices of each expert lately, float64 [n_layer, n_expert]; long ago ones are forgotten exponentially."""

    def __init__(self, shares: np.ndarray, n_used: int):
        """As if tokens had always chosen so: [n_layer, n_expert], a layer's add up to 1; or to 0, if it is unknown."""
        self.kept = 0.5 ** (1 / HALF_LIFE)
        self.choices = shares * (n_used / (1 - self.kept))

    def add(self, layers: np.ndarray, experts: np.ndarray, n_tokens: int) -> None:
        """What a step of n_tokens chose: layers int64 [m], experts int64 [m, n_tokens · n_used]."""
        self.choices *= self.kept**n_tokens
        np.add.at(self.choices, (layers[:, None], experts), 1)

    def swaps(self, here: np.ndarray, layers: np.ndarray, most: int) -> list[tuple[int, int, int]]:
        """(layer, expert that leaves, expert that comes), at most one of a layer, those that gain most first. here:
        bool [n_layer, n_expert]; layers: int64 [m], where something can be exchanged."""
        heat, there, at = self.choices[layers], here[layers], np.arange(len(layers))
        cold, hot = np.where(there, heat, np.inf).argmin(1), np.where(there, -np.inf, heat).argmax(1)
        gain = heat[at, hot] - heat[at, cold]
        gain[~there.any(1) | there.all(1)] = 0
        order = [i for i in np.argsort(-gain)[:most] if gain[i] > MARGIN]
        return [(int(layers[i]), int(cold[i]), int(hot[i])) for i in order]
