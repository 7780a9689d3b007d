"""Which boundaries the processes hold, so that one of them is common."""

from hypothesis import example, given
from hypothesis import strategies as st

from jobkit.preemption import boundaries


def holds(every: int, begun: int, at: int) -> set[int]:
    """Return what a process holds that has come to boundary `at` and holds every so manieth."""
    held: list[int] = []
    for step in range(begun, at + 1):
        if step == begun or step % every == 0:
            held = [*boundaries.kept(held, 100, begun), step]
    return set(held)


@given(
    strides=st.tuples(*[st.sampled_from([1, 2, 4, 8, 16, 64, 256])] * 2),
    begun=st.integers(0, 300),
    done=st.integers(0, 600),
    drift=st.integers(0, 2),
)
@example(strides=(1, 8), begun=1, done=3, drift=0)  # the one has left behind where the loop began, the other has not
@example(strides=(128, 512), begun=0, done=600, drift=0)  # both hold so few that those of _RUNGS must reach as far
def test_processes_hold_a_common_boundary(strides: tuple[int, int], begun: int, done: int, drift: int) -> None:
    """Though they hold differently many, and are steps apart, two processes hold a boundary of a few steps before."""
    at = begun + done
    common = holds(strides[0], begun, at) & holds(strides[1], begun, at + drift)
    assert max(common) > at - 2 * max(strides)


@given(steps=st.sets(st.integers(0, 1000)), room=st.integers(0, 9), begun=st.integers(0, 1000))
def test_no_more_than_there_is_room_for(steps: set[int], room: int, begun: int) -> None:
    """What is held before the newest never exceeds its room, and is never something new."""
    left = boundaries.kept(steps, room, begun)
    assert len(left) <= room
    assert set(left) <= steps
