"""A long queue in ComfyUI: valid, wrong and interrupted small runs mixed, and the host's memory from the hundredth to the last.

    python -m benchmarks.host_soak [--runs N] [--out FILE]

It is the test tests/host/inprocess/test_soak.py, longer, in the interpreter of the ComfyUI that is found (README.md, Tests).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import record
from demo import comfy, tiny

TEST = Path(__file__).resolve().parents[1] / "tests" / "host" / "inprocess" / "test_soak.py"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_soak", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000, help="queued runs (default 1000: some minutes on two cores)")
    parser.add_argument("--out", help="a JSON report (default benchmarks/results/host_soak_cpu.json)")
    arguments = parser.parse_args()
    installation = comfy.find()
    if installation is None:
        print("No ComfyUI was found; COMFYUI_PATH says where it is.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "soak.json"
        environment = {
            **os.environ,
            "OPEN_SORA_TEST_HOST": str(installation.root),
            "OPEN_SORA_TEST_CHECKPOINT": str(tiny.write(Path(folder) / "tiny")),
            "OPEN_SORA_TEST_BASE": str(Path(folder) / "base"),
            "OPEN_SORA_SOAK_RUNS": str(arguments.runs),
            "OPEN_SORA_SOAK_REPORT": str(report),
        }
        command = [str(installation.python), "-m", "pytest", "-q", "-c", str(TEST.parent / "pytest.ini"), f"--rootdir={TEST.parent}",
                   f"--confcutdir={TEST.parent}", "-p", "no:cacheprovider", "--show-capture=no", f"{TEST}::test_memory_does_not_grow"]  # fmt: skip
        ended = subprocess.run(command, cwd=folder, env=environment)
        if report.is_file():
            print(f"Figures: {record.write('host_soak', json.loads(report.read_text()), arguments.out)}")
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main())
