"""Run the tests in as many processes as there are processors, each with a share of the files.

More than half of the time they wait for a child process or for what it does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MOST = 4  # beyond that the longest file decides


def main() -> int:
    """Print the output of each process in turn; return 0 if all tests have passed."""
    paths = sorted(Path(__file__).parent.glob("test_*.py"), key=lambda path: path.stat().st_size)
    count = min(len(os.sched_getaffinity(0)), MOST)
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs"]
    parts = [
        subprocess.Popen(
            [*command, *paths[number::count]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for number in range(count)
    ]
    for part in parts:
        sys.stdout.buffer.write(part.communicate()[0])
        sys.stdout.flush()
    return int(any(part.returncode for part in parts))


if __name__ == "__main__":
    sys.exit(main())
