"""float32 products of a calibrating CPU."""

import pytest
import torch

from quantkit.runtime import products


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_products_are_near_and_do_not_depend_on_threads(threads):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(777, 512, generator=g), torch.randn(96, 512, generator=g)
    expected, found = (x.double() @ w.double().T).float(), []
    with products.fast_products():
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append((x @ w.T, x.T @ x))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    rounded = torch.cpu._is_amx_tile_supported()
    assert (found[0][0] - expected).norm() < (4e-3 if rounded else 1e-6) * expected.norm()
    with products.fast_products(), products.exact_products():
        assert (x @ w.T - expected).norm() < 1e-6 * expected.norm()
    assert products._matmul.fp32_precision == "none"


def test_few_shapes_serve_all_numbers_of_rows():
    rows = torch.ones(5000, 4)
    assert products.rounded_up(rows[:777]).shape == (777, 4)  # only where it helps
    with products.fast_products():
        shapes = {len(products.rounded_up(rows[:n])) for n in range(1, 5001)}
        some = products.rounded_up(rows[:777])
    assert len(shapes) < 80 and len(some) <= 777 * 9 / 8
    assert torch.equal(some[:777], rows[:777]) and not some[777:].any()
