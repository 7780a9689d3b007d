"""What fails beside other tests is run once more, and alone; what fails twice, or often, stays failed."""

from pathlib import Path

import pytest

from tests import second_look


@pytest.mark.parametrize(("late", "broken", "code"), [(0, 0, 0), (1, 0, 0), (6, 0, 0), (7, 0, 1), (0, 1, 1), (1, 1, 1)])
def test_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: int, broken: int, code: int) -> None:
    """A few that fail only at the first time pass; more of them, and one that always fails, do not."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text(
        "import pathlib, pytest\n"
        f"@pytest.mark.parametrize('how', ['a::b[c]'] + ['late'] * {late} + ['broken'] * {broken})\n"
        "def test_it(how, request):\n"
        "    seen = pathlib.Path(request.node.name.replace('/', '_') + '.seen')\n"
        "    first = not seen.exists()\n"
        "    seen.touch()\n"
        "    assert how != 'broken' and not (how.startswith('late') and first)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert second_look.main(["-p", "no:cacheprovider"], tmp_path / "tests.xml") == code
