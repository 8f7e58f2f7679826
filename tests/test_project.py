"""What the README promises of the file, the unit and the settings."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import PROGRAM, README

from alarmrelay import CONNECTIONS, FAILURE_KINDS, SETTINGS

TOP = PROGRAM.parent
UNIT = (TOP / "alarmrelay.service").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.stdlib_module_names is new in 3.10")
def test_the_program_imports_the_standard_library_alone():
    imported = set()
    for node in ast.walk(ast.parse(PROGRAM.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported
    assert imported <= set(sys.stdlib_module_names)


def test_the_readmes_table_of_settings_is_that_of_the_program():
    rows = re.findall(r"^\| `(\w+)` \| (?:(?:`([^`]*)`|required) )?\|", README, re.MULTILINE)
    documented = [(name, default) for name, default in rows if name in SETTINGS]
    assert documented == [(name, setting.default) for name, setting in SETTINGS.items()]


def test_the_readme_quotes_the_log_as_it_is():
    known = [PROGRAM.read_text(encoding="utf-8"), "database or disk is full"]  # SQLite's words
    known += [f"delivery {kind}" for kind in FAILURE_KINDS]
    table = README.partition("| line | meaning | what to do |")[2].partition("\n\n")[0]
    lines = [row.split(" | ")[0] for row in table.splitlines()]
    quotes = re.findall("`(.+?)`", "\n".join(lines))
    assert len(quotes) > 35
    for quote in quotes:
        for words in re.findall(r"\b(?!or )[a-z]{2,}(?: [a-z]+)+\b", quote):
            assert any(words in text for text in known), f"{words!r} of {quote!r}"


def test_each_way_in_which_http_server_fails_has_a_test():
    rows = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for mark in getattr(node, "decorator_list", []):
                if "pitfall" in ast.unparse(mark):
                    assert node.name.startswith("test_")
                    rows.add(mark.args[0].value)
    assert rows == set(range(1, 25))


def test_only_what_belongs_stands_at_the_top_level():
    if not (TOP / ".git").exists():
        pytest.skip("this is no checkout")
    done = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True, check=True)
    entries = {line.split("/")[0] for line in done.stdout.splitlines()}
    visible = {entry for entry in entries if not entry.startswith(".")}
    assert visible == {"alarmrelay.py", "alarmrelay.service", "tests", "Makefile", "README.md"}


@pytest.mark.parametrize(
    "line",
    [
        "Type=notify",
        "DynamicUser=yes",
        "StateDirectory=alarmrelay",
        "EnvironmentFile=-/etc/alarmrelay.env",
        "Restart=always",
        "RestartPreventExitStatus=78",
        "StartLimitIntervalSec=0",
        "FileDescriptorStoreMax=1",
        f"LimitNOFILE={CONNECTIONS + 64}",
        "ExecStart=/usr/bin/python3 /usr/local/bin/alarmrelay.py",
    ],
)
def test_the_unit_says(line):
    assert line in UNIT.splitlines()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="there is no /usr/bin/python3")
def test_systemd_has_nothing_to_say_against_the_unit():
    command = ["systemd-analyze", "verify", str(TOP / "alarmrelay.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_make_help_lists_every_target():
    done = subprocess.run(
        ["make", "-s", "help"], cwd=TOP, capture_output=True, text=True, check=True
    )
    targets = set(re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.MULTILINE))
    assert {line.split()[0] for line in done.stdout.splitlines()} == targets


def test_make_test_hosts_fails_and_says_why_where_it_cannot_run():
    command = [sys.executable, str(Path(__file__).parent / "tools/hosts.py")]
    done = subprocess.run(
        command, env={"PATH": "/nonexistent"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout.startswith("no host has run: that needs debootstrap, systemd-nspawn, ")
    assert done.stderr == ""


def test_make_demo_tells_the_story_and_ends_by_itself(tmp_path):
    environ = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["make", "-s", "demo", f"PYTHON={sys.executable}"]
    done = subprocess.run(
        command, cwd=TOP, env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = done.stdout.splitlines()
    assert len(shown) <= 100  # two screens
    assert max(map(len, shown)) <= 110
    for part in (
        'system_reboot_issued.json  ->  200 {"status": "accepted"}',
        "**Receive Time:** Sat Jan 18 05:57:01 2020 CET",
        'interface_down.json  ->  200 {"status": "accepted"}',
        "**Receive Time:** Fri Mar  8 09:02:12 2024 CET",
        "14 alarms  ->  14 times 200",
        'the last of them again  ->  200 {"status": "duplicate"}',
        '401 {"error": "wrong credentials"}',
        "Team, **14 alarms** are received from vManage:",
        "message-5, a reply to message-2",
        "message-6, a reply to message-4",
        "✅ cleared (Medium)",
        "alarm 1 taken: ",
        "alarm 1 delivered: message=message-1 ",
        "delivery paused: 429",
        "refused: 401 wrong credentials",
        "alarm 3 delivered: message=message-4 ",
        "Each alarm was on disk before it was answered with 200.",
    ):
        assert part in done.stdout
    told = " ".join(done.stdout.split())  # long lines are broken
    outage = README.partition("## What the room looks like")[2].partition("\n## ")[0]
    quoted = [line.strip(" └─").partition("…")[0].strip() for line in outage.splitlines()]
    lines = [line for line in quoted if line.startswith(("Team,", "**", "- 🔴"))]
    assert len(lines) > 15
    assert not [line for line in lines if " ".join(line.split()) not in told]
