"""The sums of the refit on the CPU."""

from quantkit.codecs.format import SUPERBLOCK
from quantkit.encoding.backends.numba_jit import F, jit


@jit
def products(image, unit, a, k):
    """Twin of reference.Backend.products, of one matrix: image [R, m], unit [R, kinds, n] -> a[:, k], a [R, K, K], from
    superblock k // kinds on."""
    kinds = unit.shape[1]
    first = k // kinds
    for r in range(image.shape[0]):
        for at in range(image.shape[1] // SUPERBLOCK):
            left = image[r, at * SUPERBLOCK : (at + 1) * SUPERBLOCK]
            for i in range(kinds):
                right = unit[r, i, (first + at) * SUPERBLOCK :]
                total = F(0)
                for c in range(SUPERBLOCK):
                    total += left[c] * right[c]
                a[r, k, (first + at) * kinds + i] = total
