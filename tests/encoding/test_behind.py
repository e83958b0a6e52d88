"""Work that follows a pass: in order, not too far behind, its errors seen, ended with the pass."""

import threading

import pytest

from quantkit.encoding.behind import Behind


def test_work_is_done_in_order_and_not_too_far_behind():
    begin, seen = threading.Event(), []
    behind = Behind(2, begin.wait)
    for i in range(2):
        behind.add(lambda advance, i=i: seen.append(i))
    third = threading.Thread(target=behind.add, args=(lambda advance: seen.append(2),))
    third.start()
    third.join(0.05)
    assert third.is_alive() and not seen
    begin.set()
    third.join()
    behind.close(failed=False)
    assert seen == [0, 1, 2]


def test_an_error_ends_the_pass():
    def fail(advance):
        raise OSError("full")

    behind = Behind(1, lambda: None)
    behind.add(fail)
    with pytest.raises(OSError, match="full"):
        behind.add(lambda advance: None)
    behind.add(fail)
    with pytest.raises(OSError, match="full"):
        behind.close(failed=False)


def test_a_pass_that_fails_waits_only_for_the_slice_under_way():
    begun, steps = threading.Event(), []

    def endless(advance):
        while True:
            begun.set()
            steps.append(1)
            advance(1.0)

    behind = Behind(4, lambda: None)
    behind.add(endless)
    behind.add(lambda advance: steps.append("never"))
    begun.wait()
    behind.close(failed=True)
    assert "never" not in steps
