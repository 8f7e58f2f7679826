"""check and install, as an operator runs them before the first start."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from harness import PROGRAM, environment, run, run_as_nobody
from test_tls import make_pair, serving
from webex_standin import ROOM, TOKEN, Fault, WebexStandIn

from alarmrelay import SETTINGS, UNIT

TOP = PROGRAM.parent


def checked(environ: dict[str, str]) -> tuple[int, list[str]]:
    """Run check, whose output is one line for each thing and nothing else."""
    done = run(environ, "check")
    assert done.stderr == ""
    assert "Traceback" not in done.stdout
    lines = done.stdout.splitlines()
    assert all(re.match("(ok|warning|wrong): ", line) for line in lines)
    assert done.returncode == any(line.startswith("wrong: ") for line in lines)
    for secret in (TOKEN, environ.get("webhook_password", TOKEN)):
        assert secret not in done.stdout
    return done.returncode, lines


def test_check_says_ok_for_each_thing_that_is_right(tmp_path, webex):
    status, lines = checked(environment(tmp_path, webex.url, time_zone="Asia/Tokyo"))
    assert status == 0
    assert re.fullmatch(r"ok: settings; in Asia/Tokyo it is \w+ \w+ [ \d:]+ JST", lines[0])
    assert lines[1].startswith(f"ok: state directory {tmp_path / 'state'}: ")
    assert lines[2:] == ["ok: bearer_token: vManage alarms", "ok: room_id: Network   Operations"]
    assert [request["method"] for request in webex.requests] == ["GET", "GET"]
    assert webex.requests[1]["path"] == f"/v1/rooms/{ROOM}"
    assert not (tmp_path / "state").exists()  # it only looks


def test_check_warns_of_a_persons_token(tmp_path, webex):
    webex.person = "person"
    status, lines = checked(environment(tmp_path, webex.url))
    assert status == 0
    assert lines[2] == (
        "warning: bearer_token: vManage alarms, a person's, which ends after 12 hours: create a bot"
    )
    assert lines[3].startswith("ok: room_id: ")


def test_check_says_what_to_do_about_a_bad_token(tmp_path, webex):
    webex.token = "another"
    status, lines = checked(environment(tmp_path, webex.url))
    assert status == 1
    assert len(lines) == 4
    assert lines[2].startswith("wrong: bearer_token: 401 Unauthorized: The request requires a ")
    assert lines[2].endswith("; replace bearer_token and restart")


def test_check_says_what_to_do_about_a_room_without_the_bot(tmp_path, webex):
    status, lines = checked(environment(tmp_path, webex.url, room_id="of/others?#"))
    assert status == 1
    assert lines[2].startswith("ok: bearer_token: ")
    assert lines[3].startswith("wrong: room_id: 404 Not Found: Could not find a room ")
    assert "that the bot is a member of the room" in lines[3]
    assert webex.requests[1]["path"] == "/v1/rooms/of%2Fothers%3F%23"


@pytest.mark.parametrize("path", ["", "/v2"])
def test_check_says_what_to_do_about_a_wrong_root_of_the_api(tmp_path, webex, path):
    status, lines = checked(environment(tmp_path, webex.url.replace("/v1", path)))
    assert status == 1
    assert lines[2].startswith("wrong: bearer_token: 404 ")
    assert "check room_id and webex_url" in lines[2]


def test_check_says_what_to_do_when_webex_cannot_be_reached(tmp_path):
    status, lines = checked(environment(tmp_path, "http://127.0.0.1:9/v1"))
    assert status == 1
    assert lines[2] == (
        "wrong: bearer_token: no answer: [Errno 111] Connection refused;"
        " check network, clock and https_proxy; if a proxy opens TLS, SSL_CERT_FILE"
    )
    assert len(lines) == 4


def test_check_says_what_to_do_when_something_else_answers(tmp_path, webex):
    webex.faults.append(Fault(status=200, body=b"<html>Log in</html>"))
    status, lines = checked(environment(tmp_path, webex.url))
    assert status == 1
    assert lines[2].endswith("no id in it; check webex_url; does a proxy answer for Webex?")


def test_check_says_what_to_do_about_a_certificate_that_is_not_trusted(tmp_path):
    pair = make_pair(tmp_path, "localhost")
    with WebexStandIn(tls=serving(pair)) as webex:
        status, lines = checked(environment(tmp_path, webex.url))
        assert status == 1
        assert "CERTIFICATE_VERIFY_FAILED" in lines[2]
        assert lines[2].endswith("if a proxy opens TLS, SSL_CERT_FILE")
        trusting = environment(tmp_path, webex.url, SSL_CERT_FILE=str(pair[0]))
        assert checked(trusting)[0] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_check_says_what_to_do_about_a_directory_that_cannot_be_written(tmp_path, webex):
    done = run_as_nobody(tmp_path, environment(tmp_path, webex.url), "check")
    assert done.returncode == 1
    assert f"wrong: state directory {tmp_path / 'state'}: " in done.stdout
    assert " MiB free; must have 16 and be writable by the relay's user\n" in done.stdout
    (tmp_path / "state").write_text("a file")
    assert (
        f"wrong: state directory {tmp_path / 'state'}: "
        in run(environment(tmp_path, webex.url), "check").stdout
    )


def test_check_names_every_setting_that_is_wrong(tmp_path, webex):
    done = run(environment(tmp_path, webex.url, room_id=None, time_zone="Europe/Madird"), "check")
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    assert [line.split(" ERROR ")[1].split(":")[0] for line in lines] == ["room_id", "time_zone"]
    assert lines[0].endswith("found nothing: export room_id=... or set it in /etc/alarmrelay.env")


def test_check_names_the_package_when_there_are_no_time_zones(tmp_path, webex):
    done = run(environment(tmp_path, webex.url, PYTHONTZPATH="/nonexistent"), "check")
    assert (done.returncode, done.stdout) == (1, "")
    assert "install the package tzdata" in done.stderr


@pytest.mark.parametrize(
    ("own", "is_asked"),
    [({}, True), ({"room_id": "mine"}, False), ({"STATE_DIRECTORY": "/nonexistent"}, False)],
)
def test_one_setting_in_the_environment_and_those_of_the_host_are_not_taken(
    tmp_path, own, is_asked
):
    """How those of the host are taken, by systemd itself, is shown in tests/tools/hosts.py."""
    (tmp_path / "alarmrelay.env").write_text("room_id=installed")
    systemd_run = tmp_path / "systemd-run"
    systemd_run.write_text("#!/bin/sh\necho systemd-run is asked\nexit 7\n")
    systemd_run.chmod(0o755)
    code = f"import alarmrelay; alarmrelay.ENV_FILE = {str(tmp_path / 'alarmrelay.env')!r}; "
    done = subprocess.run(
        [sys.executable, "-c", f"{code} raise SystemExit(alarmrelay.main())", "check"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(TOP), **own},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout == "systemd-run is asked\n", done.returncode == 7) == (is_asked, is_asked)
    assert ("expected" in done.stderr) != is_asked


def install(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Install from a directory in which the one file stands alone."""
    lonely = root.parent / "lonely"
    lonely.mkdir(exist_ok=True)
    (lonely / "alarmrelay.py").write_bytes(PROGRAM.read_bytes())
    command = command or (sys.executable, "-X", "dev", "alarmrelay.py")
    return subprocess.run(
        [*command, "install", "--root", str(root)],
        cwd=lonely,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_the_unit_in_the_repository_is_the_one_that_install_writes(tmp_path):
    assert (TOP / "alarmrelay.service").read_text() == UNIT
    install(tmp_path / "root")
    unit = tmp_path / "root/etc/systemd/system/alarmrelay.service"
    assert unit.read_text() == UNIT


def test_install_lays_out_program_unit_and_settings(tmp_path):
    done = install(
        tmp_path / "root", "sh", "-c", f'umask 0; {sys.executable} alarmrelay.py "$@"', ""
    )
    assert (done.returncode, done.stderr) == (0, "")
    root = tmp_path / "root"
    modes = {
        f"/{path.relative_to(root)}": stat.S_IMODE(path.stat().st_mode)
        for path in root.rglob("*")
        if path.is_file()
    }
    assert modes == {
        "/usr/local/bin/alarmrelay.py": 0o755,
        "/etc/systemd/system/alarmrelay.service": 0o644,
        "/etc/alarmrelay.env": 0o600,
    }
    assert (root / "usr/local/bin/alarmrelay.py").read_bytes() == PROGRAM.read_bytes()
    assert done.stdout.endswith(
        "next: sudoedit /etc/alarmrelay.env\n"
        "      sudo systemctl enable alarmrelay && sudo systemctl restart alarmrelay\n"
    )


def test_the_settings_that_install_writes_explain_every_setting(tmp_path):
    install(tmp_path / "root")
    text = (tmp_path / "root/etc/alarmrelay.env").read_text()
    required = {"bearer_token", "room_id", "webhook_username", "webhook_password"}
    for name, (default, _, _, expected) in SETTINGS.items():
        needed, mark = (", required", "") if name in required else ("", "#")
        assert f"\n\n# {name}{needed}: {expected}\n{mark}{name}={default}\n" in text
    values = [line.partition("=") for line in text.splitlines() if not line.startswith("#")]
    assert [name for name, _, value in values if name and not value] == sorted(
        required, key=list(SETTINGS).index
    )


def test_install_again_upgrades_and_leaves_the_settings_alone(tmp_path):
    root = tmp_path / "root"
    install(root)
    settings, program = root / "etc/alarmrelay.env", root / "usr/local/bin/alarmrelay.py"
    settings.write_text("bearer_token=mine\n")
    program.write_text("of yesterday")
    with program.open() as running:
        done = install(root)
        assert running.read() == "of yesterday"  # a running relay keeps the file it has
    assert (done.returncode, done.stderr) == (0, "")
    assert settings.read_text() == "bearer_token=mine\n"
    assert program.read_bytes() == PROGRAM.read_bytes()
    assert install(root, sys.executable, str(program)).returncode == 0  # and from its own place
    assert program.read_bytes() == PROGRAM.read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_install_without_the_right_to_says_so(tmp_path):
    for path in (tmp_path, *list(tmp_path.parents)[:2]):
        path.chmod(0o755)
    drop = ["setpriv", "--reuid=65534", "--clear-groups", "/usr/bin/python3", "alarmrelay.py"]
    done = install(tmp_path / "root", *drop)
    assert done.returncode == 74
    assert "Permission denied" in done.stderr
    assert "install needs root and systemd, or --root DIR" in done.stderr


def test_an_unknown_command_is_a_usage_error(tmp_path):
    done = run({}, "instal")
    assert done.returncode == 2
    assert "invalid choice: 'instal'" in done.stderr


def test_an_unknown_option_is_named():
    done = run({}, "-v")
    assert done.returncode == 2
    assert "unrecognized arguments: -v" in done.stderr
