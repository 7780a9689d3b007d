"""How property tests are run here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st


def test_the_default_run_tries_the_same_examples_every_time(request: pytest.FixtureRequest) -> None:
    """Of two searches by the same property test each sees what the other has seen."""
    if request.config.getoption("--hypothesis-profile"):
        pytest.skip("another profile was asked for")
    seen: list[list[int]] = []

    @given(st.integers())
    def collect(number: int) -> None:
        seen[-1].append(number)

    for _ in range(2):
        seen.append([])
        collect()
    assert seen[0] == seen[1]
