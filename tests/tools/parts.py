"""Run the tests in as many processes as there are processors, each with a share of the files.

More than a third of the time they wait for a child process or for what it does.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

SHARES = 8  # more than processors, or one would wait for another at the end
GOOD = (0, 5)  # pytest's exit status: all passed; none selected, by -k in PYTEST_ADDOPTS


def main() -> int:
    """Print the output of each process, and the sum; return 0 if all tests have passed."""
    began_s, counts, running = time.monotonic(), dict[str, int](), list[subprocess.Popen[bytes]]()
    paths = sorted(
        Path(__file__).resolve().parents[1].glob("test_*.py"), key=lambda path: -path.stat().st_size
    )
    shares, status = [paths[number::SHARES] for number in range(SHARES)], 0

    def run(share: list[Path]) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", "-q", "-rfEs", *map(str, share)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # to be stopped as a whole
        )
        running.append(process)
        text = process.communicate()[0].decode(errors="replace")
        return process.returncode, text

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        jobs = {threads.submit(run, share): share for share in shares if share}

        def stop(*_: object) -> None:
            for job in jobs:
                job.cancel()
            for process in running:
                with suppress(ProcessLookupError):  # it has ended
                    os.killpg(process.pid, signal.SIGTERM)  # and the relays that it has started

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        for job in as_completed(jobs):
            code, text = (2, "stopped before it began\n") if job.cancelled() else job.result()
            print(text, end="", flush=True)
            found = re.findall(r"(\d+) (\w+)", (text.splitlines() or [""])[-1])
            for number, what in found:
                counts[what] = counts.get(what, 0) + int(number)
            if code not in GOOD or not found:
                status = 1
                print(f"exit status {code}:", *(path.name for path in jobs[job]), flush=True)
    total = ", ".join(f"{number} {what}" for what, number in counts.items())
    print(f"in all: {total} in {time.monotonic() - began_s:.0f} s, {'not ' * status}all well")
    return status


if __name__ == "__main__":
    sys.exit(main())
