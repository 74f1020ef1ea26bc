"""One host for all of these tests, with files of the released names in its folders and previews on, and what the front-end says of it."""

import pytest

from demo import comfy, front_end, host_record


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running host on this machine, for the whole session."""
    installation, lacking = comfy.find(), front_end.missing()
    if installation is None or lacking:
        pytest.skip(f"tests/browser did not run: {lacking or 'no ComfyUI found'} (README.md, Tests)")
    base = tmp_path_factory.mktemp("browser")
    host_record.lay_out_stand_ins(base)
    with comfy.Server(installation, base, ("--cpu", "--preview-method", "auto")) as running:
        yield running
