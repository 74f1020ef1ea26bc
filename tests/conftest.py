"""Fixtures that every kind of test shares."""

from collections import Counter
from pathlib import Path

import pytest


def pytest_terminal_summary(terminalreporter):
    """One line for each reason that tests were skipped for: what did not run is seen without asking."""
    reports = terminalreporter.stats.get("skipped", [])
    for reason, count in Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports).items():
        terminalreporter.write_line(f"{count} skipped: {reason}")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A complete small Open-Sora 2.0 with random weights, laid out as the hub repository. Copy a file before changing it."""
    from demo.tiny import write

    return write(tmp_path_factory.mktemp("tiny") / "Open-Sora-v2")


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory) -> Path:
    """A model of the built-in one's sizes and tokenizers, with random weights. Put it in the place of model_files.SMALL."""
    from training.export import export, random_networks

    folder = tmp_path_factory.mktemp("small")
    return export(*random_networks(folder, seed=0), folder)
