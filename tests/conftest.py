"""Fixtures that every kind of test shares."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A complete small Open-Sora 2.0 with random weights, laid out as the hub repository. Copy a file before changing it."""
    from demo.tiny import write

    return write(tmp_path_factory.mktemp("tiny") / "Open-Sora-v2")
