"""Runs inprocess/ in the host's interpreter once, and reports it file by file."""

from pathlib import Path

import pytest

FILES = sorted(path.stem for path in (Path(__file__).parent / "inprocess").glob("test_*.py"))


@pytest.mark.parametrize("name", FILES)
def test_inside_the_host(name, inprocess_results):
    outcomes = inprocess_results.get(name)
    assert outcomes, f"{name}.py did not run"
    failures = [f"{test}\n{text}" for test, text in outcomes if text]
    assert not failures, f"{len(failures)} of {len(outcomes)} failed in {name}.py\n\n" + "\n\n".join(failures)
