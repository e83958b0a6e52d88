"""The knapsack against brute force on small ones."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import QuantkitError
from quantkit.planning.allocate import Infeasible, Item, Limits, Option, allocate, hull, pareto

OPTION = st.tuples(st.integers(1, 60), st.integers(0, 1000).map(lambda n: n / 64))
ITEMS = st.lists(st.tuples(st.lists(OPTION, min_size=1, max_size=4), st.booleans()), min_size=1, max_size=5)


def items_of(drawn):
    return [
        Item(f"t{i}", tuple(Option(f"q{j}", size, damage) for j, (size, damage) in enumerate(options)), resident)
        for i, (options, resident) in enumerate(drawn)
    ]


def brute_force(items, limits):
    """The least damage of all choices within the limits, None if there is none."""
    best = None
    for chosen in product(*(item.options for item in items)):
        inner = sum(o.n_bytes for item, o in zip(items, chosen, strict=True) if item.resident)
        if sum(o.n_bytes for o in chosen) <= limits.total and (limits.resident is None or inner <= limits.resident):
            damage = sum(o.damage for o in chosen)
            best = damage if best is None else min(best, damage)
    return best


def check(items, limits, found):
    by_name = {item.name: {o.qtype: o for o in item.options} for item in items}
    chosen = {name: by_name[name][qtype] for name, qtype in found.types.items()}
    assert found.types.keys() == by_name.keys()
    assert found.n_bytes == sum(o.n_bytes for o in chosen.values()) <= limits.total
    assert found.damage == pytest.approx(sum(o.damage for o in chosen.values()))
    if limits.resident is not None:
        assert sum(chosen[item.name].n_bytes for item in items if item.resident) <= limits.resident


@settings(max_examples=300, deadline=None)
@given(ITEMS, st.integers(1, 250), st.none() | st.integers(0, 150))
def test_lagrange_is_feasible_and_its_bound_holds(drawn, total, resident):
    items, limits = items_of(drawn), Limits(total, resident)
    best = brute_force(items, limits)
    if best is None:
        with pytest.raises(Infeasible):
            allocate(items, limits)
        return
    found = allocate(items, limits)
    check(items, limits, found)
    assert found.bound <= best + 1e-9 <= found.damage + 2e-9


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.integers(1, 250), st.none() | st.integers(0, 150))
def test_what_it_calls_optimal_is(drawn, total, resident):
    items, limits = items_of(drawn), Limits(total, resident)
    best = brute_force(items, limits)
    if best is not None and (found := allocate(items, limits)).gap == 0:
        assert found.damage == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_hull_keeps_falling_returns():
    options = [Option(q, n, d) for q, n, d in (("a", 1, 10), ("b", 2, 9), ("c", 3, 2), ("d", 4, 2.5), ("e", 5, 1))]
    assert [o.qtype for o in pareto(options)] == ["a", "b", "c", "e"]
    assert [o.qtype for o in hull(options)] == ["a", "c", "e"]


def test_exchange_spends_what_the_hull_leaves():
    """The hull alone would stop at `small` for both tensors; the off-hull option uses the bytes."""
    options = (Option("small", 10, 8.0), Option("middle", 14, 7.0), Option("large", 20, 0.0))
    found = allocate([Item("a", options), Item("b", options)], Limits(24))
    assert sorted(found.types.values()) == ["middle", "small"]


def test_infeasible_says_the_smallest_size():
    items = [Item("a", (Option("q", 70, 0.0), Option("r", 50, 1.0))), Item("b", (Option("q", 10, 0.0),), True)]
    with pytest.raises(Infeasible) as caught:
        allocate(items, Limits(59))
    assert caught.value.smallest == 60
    with pytest.raises(Infeasible, match="stay on the GPU: the smallest types need 10 bytes, the limit is 9"):
        allocate(items, Limits(100, 9))
    assert isinstance(caught.value, QuantkitError)
