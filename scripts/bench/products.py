"""Products of float32 on this CPU: GFLOP/s of one thread by MKL, as a calibrating pass makes them, and in bfloat16.

python scripts/bench/products.py
"""

import time
from collections.abc import Callable

import torch

from quantkit.runtime.products import fast_products

ROWS, WIDTH, REPEAT = 5120, 512, 5  # an expert's tokens of proxy-a, and its input


def rate(product: Callable[[], object]) -> float:
    """Best of some, in 10^9 operations a second of CPU time."""
    seconds = []
    for _ in range(REPEAT + 1):
        begin = time.process_time()
        product()
        seconds.append(time.process_time() - begin)
    return 2 * ROWS * WIDTH * WIDTH / min(seconds[1:]) / 1e9


@torch.inference_mode()
def main() -> None:
    """Print them."""
    torch.set_num_threads(1)
    x, w = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH)
    small = x.bfloat16(), w.bfloat16()
    expected = (x.double() @ w.double().T).float()
    print(f"AMX {torch.cpu._is_amx_tile_supported()}, AVX-512 bf16 {torch.cpu._is_avx512_bf16_supported()}")
    print(f"MKL, float32     {rate(lambda: x @ w.T):7.0f}")
    with fast_products():
        error = float((x @ w.T - expected).norm() / expected.norm())
        print(f"oneDNN, float32  {rate(lambda: x @ w.T):7.0f}   relative error {error:.1e}")
    print(f"bfloat16         {rate(lambda: small[0] @ small[1].T):7.0f}")


if __name__ == "__main__":
    main()
