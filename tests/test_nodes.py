"""Which nodes a run avoids."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from launch import nodes

DAY_S = 86_400.0


def strike(node: str, at: float, weight: float = 1.0) -> dict[str, Any]:
    """Return what the ledger says of a death."""
    return {"event": "strike", "t": at, "node": node, "weight": weight}


def test_two_deaths_on_one_node() -> None:
    """One death is nobody's proof; two on one node are; on two nodes they are not."""
    assert nodes.avoid([strike("n1", 0)], 10) == []
    assert nodes.avoid([strike("n1", 0), strike("n2", 5)], 10) == []
    assert nodes.avoid([strike("n1", 0), strike("n2", 5), strike("n1", 6)], 10) == ["n1"]


def test_a_lost_node_counts_twice() -> None:
    """A node that SLURM has lost is left out at once."""
    assert nodes.avoid([strike("n1", 0, 2.0)], 10) == ["n1"]


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.floats(0, 1000), st.sampled_from([1.0, 2.0])), max_size=40))
def test_everything_is_forgiven(deaths: list[tuple[str, float, float]]) -> None:
    """After a day nothing is held against any node, and never are more than four left out."""
    events = [strike(*death) for death in deaths]
    assert len(nodes.avoid(events, 1000)) <= 4
    if len(deaths) < 20:
        assert nodes.avoid(events, 1000 + 2 * DAY_S) == []
