"""Run the tests in as many processes as there are processors, each with a share of the files.

More than a third of the time they wait for a child process or for what it does.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SHARES = 8  # more than processors, or one would wait for another at the end


def run(paths: list[Path]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", *map(str, paths)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main() -> int:
    """Print the output of each process, and the sum; return 0 if all tests have passed."""
    began_s, counts = time.monotonic(), dict[str, int]()
    paths = sorted(Path(__file__).parent.glob("test_*.py"), key=lambda path: -path.stat().st_size)
    shares, status = [paths[number::SHARES] for number in range(SHARES)], 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for process in threads.map(run, shares):
            print(process.stdout, end="", flush=True)
            status |= process.returncode != 0
            for number, what in re.findall(
                r"(\d+) (\w+)", (process.stdout.splitlines() or [""])[-1]
            ):
                if what != "warnings":
                    counts[what] = counts.get(what, 0) + int(number)
    found = ", ".join(f"{number} {what}" for what, number in counts.items())
    print(f"in all: {found} in {time.monotonic() - began_s:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
