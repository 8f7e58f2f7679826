"""Run the tests as `make test` does: a process for each file, two at once for each processor.

They start some hundred relays, and half of the time they wait for what those do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ALL_PASSED = 0  # exit status of pytest
NONE_SELECTED = 5  # by -k in PYTEST_ADDOPTS


def size_of(path: Path) -> int:
    """Return a file's size in bytes."""
    return path.stat().st_size


def run(path: Path) -> bool:
    """Run the tests of a file, print what pytest says, and return whether all went well."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", str(path)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    print(f"{path.name}\n{done.stdout}", end="", flush=True)
    return done.returncode in (ALL_PASSED, NONE_SELECTED)


def main() -> int:
    """Run all files, and return 0 if all tests have passed."""
    began_s = time.monotonic()
    # The largest first, or one processor would wait for another at the end.
    paths = sorted(TESTS.glob("test_*.py"), key=size_of, reverse=True)
    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:
        try:
            results = list(pool.map(run, paths))
        except KeyboardInterrupt:  # which those that run have had, too
            pool.shutdown(cancel_futures=True)
            raise
    failed = [path.name for path, is_well in zip(paths, results) if not is_well]
    print(f"{len(paths)} files in {time.monotonic() - began_s:.0f} s, not well: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
