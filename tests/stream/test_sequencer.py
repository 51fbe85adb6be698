"""Offsets are committed in order whatever order the work finishes in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stream.sequencer import AckSequencer


@given(st.permutations(range(12)))
def test_whatever_finishes_first_the_committable_offset_never_passes_unfinished_work(order):
    sequencer = AckSequencer()
    slots = [sequencer.begin(next_offset=10 * (n + 1)) for n in range(12)]
    done = set()
    for position in order:
        sequencer.finish(slots[position])
        done.add(position)
        prefix = next((n for n in range(12) if n not in done), 12)
        assert sequencer.committable == (10 * prefix if prefix else None)
    assert sequencer.unfinished == 0


def test_a_single_unfinished_unit_at_the_head_holds_everything_back():
    """The shape in which stock Faust commits past the message in flight (issue 606)."""
    sequencer = AckSequencer()
    head, *rest = [sequencer.begin(offset) for offset in (2586, 2587, 2588, 2589)]
    for slot in rest:
        assert not sequencer.finish(slot)
    assert sequencer.committable is None
    assert sequencer.finish(head)
    assert sequencer.committable == 2589
