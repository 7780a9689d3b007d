"""Which nodes a run avoids."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from launch.backends.slurm import bad_nodes

DAY_S = 86_400.0


def strike(node: str, at: float, lost: bool = False) -> dict[str, Any]:
    """Return what the ledger says of a death."""
    return {"event": "strike", "t": at, "node": node, "lost": lost}


def test_two_deaths_on_one_node() -> None:
    """One death is nobody's proof; two on one node are; on two nodes they are not."""
    assert bad_nodes.avoid([strike("n1", 0)], 10) == []
    assert bad_nodes.avoid([strike("n1", 0), strike("n2", 5)], 10) == []
    assert bad_nodes.avoid([strike("n1", 0), strike("n2", 5), strike("n1", 6)], 10) == ["n1"]


def test_a_lost_node_counts_twice() -> None:
    """A node that SLURM has lost is left out at once."""
    assert bad_nodes.avoid([strike("n1", 0, lost=True)], 10) == ["n1"]


def test_a_program_that_dies_everywhere() -> None:
    """A program that dies on a third node too is not chased on: only lost nodes are left out then."""
    deaths = [strike(node, at) for at, node in enumerate(["n1", "n1", "n2", "n2"])]
    assert sorted(bad_nodes.avoid(deaths, 10)) == ["n1", "n2"]
    assert bad_nodes.avoid([*deaths, strike("n3", 9)], 10) == []
    assert bad_nodes.avoid([*deaths, strike("n3", 9), strike("n4", 9, lost=True)], 10) == ["n4"]


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.floats(0, 1000), st.booleans()), max_size=40))
def test_everything_is_forgiven(deaths: list[tuple[str, float, bool]]) -> None:
    """After days nothing is held against any node, and never are more than four left out."""
    events = [strike(*death) for death in deaths]
    assert len(bad_nodes.avoid(events, 1000)) <= 4
    assert bad_nodes.avoid(events, 1000 + 2 * DAY_S) == []
