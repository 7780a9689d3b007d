"""Which boundaries the processes hold, so that one of them is common."""

from hypothesis import given
from hypothesis import strategies as st

from jobkit import guard


def holds(every: int, begun: int, at: int) -> set[int]:
    """Return what a process holds that has come to boundary `at` and holds every so manieth."""
    held: list[int] = []
    for step in range(begun, at + 1):
        if step == begun or step % every == 0:
            held = [*guard.kept(held, 100), step]
    return set(held)


@given(
    strides=st.tuples(*[st.sampled_from([1, 2, 4, 8, 16])] * 2),
    begun=st.integers(0, 300),
    done=st.integers(0, 300),
    drift=st.integers(0, 2),
)
def test_processes_hold_a_common_boundary(strides: tuple[int, int], begun: int, done: int, drift: int) -> None:
    """Though they hold differently many, and are steps apart, two processes hold a boundary of a few steps before."""
    at = begun + done
    common = holds(strides[0], begun, at) & holds(strides[1], begun, at + drift)
    assert max(common) > at - 2 * max(strides)


@given(steps=st.sets(st.integers(0, 1000)), room=st.integers(0, 9))
def test_no_more_than_there_is_room_for(steps: set[int], room: int) -> None:
    """What is held before the newest never exceeds its room, and is never something new."""
    left = guard.kept(steps, room)
    assert len(left) <= room
    assert set(left) <= steps
