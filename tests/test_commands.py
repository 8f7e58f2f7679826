"""check, send and install, as an operator runs them."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from harness import PAYLOADS, PROGRAM, Relay, environment, program, run, run_as_nobody
from test_tls import make_pair, secured
from webex_standin import ROOM, TOKEN, Fault

from alarmrelay import SETTINGS

NOBODY = "http://127.0.0.1:9/v1"  # where no Webex answers


def checked(environ: dict[str, str]) -> list[str]:
    """Run check, and return what it prints: a line for each thing, whatever is wrong."""
    done = run(environ, "check")
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert all(re.match("(ok|warning|wrong): ", line) for line in lines)
    assert done.returncode == any(line.startswith("wrong: ") for line in lines)
    rooms = sorted(name for name in environ if name.startswith("room_id"))
    things = [re.split("[:; ]+", line)[1] for line in lines]
    assert things == ["settings", "state", "bearer_token", *rooms]
    for secret in (TOKEN, environ["webhook_password"]):
        assert secret not in done.stdout
    return lines


def wrong(environ: dict[str, str]) -> list[str]:
    """Return what check finds to be wrong."""
    return [line[7:] for line in checked(environ) if line.startswith("wrong: ")]


def test_check_says_ok_for_each_thing_that_is_right(tmp_path, webex):
    settings, state, *others = checked(environment(tmp_path, webex.url, time_zone="Asia/Tokyo"))
    assert re.fullmatch(r"ok: settings; in Asia/Tokyo it is \w+ \w+ [ \d:]+ JST", settings)
    assert state.startswith(f"ok: state directory {tmp_path / 'state'}: ")
    assert others == ["ok: bearer_token: vManage alarms", "ok: room_id: Network   Operations"]
    assert [request["method"] for request in webex.requests] == ["GET", "GET"]
    assert webex.requests[1]["path"] == f"/v1/rooms/{ROOM}"
    assert not (tmp_path / "state").exists()  # it only looks


def test_check_warns_of_a_persons_token(tmp_path, webex):
    webex.person = "person"
    *_, token, room = checked(environment(tmp_path, webex.url))
    assert token == (
        "warning: bearer_token: vManage alarms, a person's, which ends after 12 hours: create a bot"
    )
    assert room.startswith("ok: room_id: ")


def test_check_says_what_to_do_about_a_bad_token(tmp_path, webex):
    webex.token = "another"
    token, _ = wrong(environment(tmp_path, webex.url))
    assert token.startswith("bearer_token: 401 Unauthorized: The request requires a ")
    assert token.endswith("; replace bearer_token and restart")


def test_check_looks_at_every_room_and_says_what_to_do_where_the_bot_is_not(tmp_path, webex):
    webex.rooms.add("of-ops")
    rooms = {"room_id_ops": "of-ops", "room_id_noc": "of/others?#", "room_id_z": "of-ops"}
    (room,) = wrong(environment(tmp_path, webex.url, **rooms))
    assert room.startswith("room_id_noc: 404 Not Found: Could not find a room ")
    assert room.endswith("that the bot is a member of the room")
    assert "/v1/rooms/of%2Fothers%3F%23" in [request["path"] for request in webex.requests]


def test_check_says_what_to_do_about_a_wrong_root_of_the_api(tmp_path, webex):
    token, *_ = wrong(environment(tmp_path, webex.url.replace("/v1", "")))
    assert token.startswith("bearer_token: 404 ")
    assert "check room_id and webex_url" in token


def test_check_says_what_to_do_when_webex_cannot_be_reached(tmp_path):
    token, _ = wrong(environment(tmp_path, NOBODY))
    assert token == (
        "bearer_token: no answer: [Errno 111] Connection refused;"
        " check network, clock and https_proxy; if a proxy opens TLS, SSL_CERT_FILE"
    )


def test_check_says_what_to_do_when_something_else_answers(tmp_path, webex):
    webex.faults.append(Fault(status=200, body=b"<html>Log in</html>"))
    (token,) = wrong(environment(tmp_path, webex.url))
    assert token.endswith("no id in it; check webex_url; does a proxy answer for Webex?")


def test_check_shows_a_directory_whose_name_is_no_utf_8(tmp_path, webex):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    _, state, *_ = checked(environment(tmp_path, webex.url, STATE_DIRECTORY=name))
    assert state.startswith(f"ok: state directory {tmp_path}/caf\\udce9: ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_check_says_what_to_do_about_a_directory_that_cannot_be_written(tmp_path, webex):
    done = run_as_nobody(tmp_path, environment(tmp_path, webex.url), "check")
    assert done.returncode == 1
    assert f"wrong: state directory {tmp_path / 'state'}: " in done.stdout
    assert " MiB free; must have 16 MiB and be writable by the relay's user\n" in done.stdout
    (tmp_path / "state").write_text("a file")
    (state,) = wrong(environment(tmp_path, webex.url))
    assert state.startswith(f"state directory {tmp_path / 'state'}: ")


def test_check_names_every_setting_that_is_wrong(tmp_path, webex):
    done = run(environment(tmp_path, webex.url, room_id=None, time_zone="Europe/Madird"), "check")
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    assert [line.split(" ERROR ")[1].split(":")[0] for line in lines] == ["room_id", "time_zone"]
    assert lines[0].endswith("found nothing: export room_id=... or set it in /etc/alarmrelay.env")


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
    command = [sys.executable, *program({"ENV_FILE": str(tmp_path / "alarmrelay.env")}), "check"]
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", **own}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30)
    assert ("expected" in done.stderr) != is_asked
    assert (done.stdout == "systemd-run is asked\n") == is_asked
    assert (done.returncode == 7) == is_asked


def preview_in_a_shell(words: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run preview as "$@" in this line of a shell."""
    command = ["sh", "-c", words, "sh", sys.executable, "-X", "dev", str(PROGRAM), "preview"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=30)


def test_preview_without_standard_input_is_a_clear_error():
    done = preview_in_a_shell('"$@" <&-')
    assert (done.returncode, done.stdout) == (74, "")
    (line,) = done.stderr.splitlines()
    assert " ERROR " in line
    assert "/dev/stdin" in line


def test_preview_ends_without_a_word_once_its_reader_has_enough(tmp_path):
    many = tmp_path / "many.json"
    many.write_text(json.dumps([{"message": "x" * 1000}] * 1000))  # more than a pipe holds
    done = preview_in_a_shell('"$@" | head -1', str(many))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


ACCEPTED = '200 {"status": "accepted"}\n'


def sent(relay: Relay, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run send with the settings of a relay, or with these changed."""
    listen = re.sub("0$", str(relay.port), relay.environ["listen"])
    return run({**relay.environ, "listen": listen, **changes}, "send", *arguments)


def test_send_posts_the_workshops_alarm_as_of_now(relay, webex):
    for _ in range(2):  # each has a uuid of its own, or the second would be a duplicate
        done = sent(relay)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == ACCEPTED
    relay.told("2 delivered")
    golden = (PAYLOADS / "system_reboot_issued.md").read_text(encoding="utf-8").strip()
    form = re.escape(golden).replace(
        re.escape("Sat Jan 18 05:57:01 2020 CET"),
        r"\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d 20\d\d CES?T",
    )
    assert all(re.fullmatch(form, text) for text in webex.texts())
    shown = re.search(r"Time:\*\* \w+ (.*?) CES?T<br>", webex.texts()[0])[1]
    now = datetime.now(ZoneInfo("Europe/Madrid")).replace(tzinfo=None)
    assert abs((datetime.strptime(shown, "%b %d %H:%M:%S %Y") - now).total_seconds()) < 120
    uuids = re.findall(r"uuid='([0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f-]{17})'", relay.log())
    assert len(set(uuids)) == 2


def test_send_posts_a_file_as_it_is(relay, webex, tmp_path):
    alarm = tmp_path / "alarm.json"
    alarm.write_bytes(b'{"message": "of a file", "x": 1.0}')
    assert sent(relay, str(alarm)).stdout == ACCEPTED
    assert sent(relay, str(alarm)).stdout == '200 {"status": "duplicate"}\n'
    environ = {**relay.environ, "listen": f"127.0.0.1:{relay.port}"}
    command = [sys.executable, "-X", "dev", str(PROGRAM), "send", "-"]
    content = '{"message": "of stdin"}'
    done = subprocess.run(command, env=environ, input=content, capture_output=True, text=True)
    assert done.stdout == ACCEPTED
    webex.wait_for_texts("**Message** : of a file,", "**Message** : of stdin,")


def test_what_the_relay_refuses_is_shown_and_is_no_success(relay, tmp_path):
    alarm = tmp_path / "alarm.json"
    alarm.write_bytes(b"[1]")
    done = sent(relay, str(alarm))
    assert done.returncode == 1
    assert done.stdout.startswith('400 {"error": "expected an alarm')
    assert done.stderr.endswith(": 400 Bad Request\n")  # no restart helps
    missing = sent(relay, str(tmp_path / "missing.json"))
    assert missing.returncode == 74
    assert "missing.json" in missing.stderr
    assert "Traceback" not in missing.stderr


@pytest.mark.parametrize("listen", ["0.0.0.0", "[::]", "[::1]", "127.0.0.1"])
def test_send_finds_the_relay_at_each_address(tmp_path, webex, listen):
    with Relay(tmp_path, webex.url, listen=f"{listen}:0") as relay:
        done = sent(relay, https_proxy="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9")
        assert (done.returncode, done.stdout) == (0, ACCEPTED)


def test_send_speaks_tls_with_a_certificate_that_signs_itself(tmp_path, webex):
    pair = make_pair(tmp_path, "jumphost.elsewhere")
    with Relay(tmp_path, webex.url, **secured(pair)) as relay:
        done = sent(relay, https_proxy="http://127.0.0.1:9")
        assert (done.returncode, done.stdout, done.stderr) == (0, ACCEPTED, "")
        done = sent(relay, tls_certificate="", tls_key="")  # settings that have changed since
        assert done.returncode == 1
        assert "restart it" in done.stderr


def test_send_says_what_to_do_about_wrong_credentials(relay):
    done = sent(relay, webhook_password="changed")
    assert done.returncode == 1
    assert done.stdout == '401 {"error": "wrong credentials"}\n'
    assert "; if listen, webhook_... or tls_... changed: restart it" in done.stderr
    assert "changed" not in relay.log()


def test_send_says_what_to_do_when_no_relay_runs(tmp_path):
    done = run(environment(tmp_path, NOBODY, listen="127.0.0.1:9"), "send")
    assert done.returncode == 1
    assert "Connection refused" in done.stderr
    assert "; systemctl status alarmrelay; if listen, " in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_send_does_not_wait_for_ever_for_an_answer(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        listen = f"127.0.0.1:{silent.getsockname()[1]}"
        environ = environment(tmp_path, NOBODY, listen=listen)
        command = [sys.executable, *program({"READ_S": 0.5}), "send"]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "no answer within 0.5 s; systemctl status alarmrelay; if" in done.stderr


def test_send_shows_whatever_answers_there(tmp_path, webex):
    webex.faults.append(Fault(status=200, body=b"\xff!"))
    address = webex.url[len("http://") : -len("/v1")]
    done = run(environment(tmp_path, NOBODY, listen=address), "send")
    assert (done.returncode, done.stdout) == (0, "200 \ufffd!\n")


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


def test_install_lays_out_program_unit_and_settings(tmp_path):
    root = tmp_path / "root"
    done = install(root, "sh", "-c", f'umask 0; {sys.executable} alarmrelay.py "$@"', "")
    assert (done.returncode, done.stderr) == (0, "")
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
    unit = PROGRAM.with_name("alarmrelay.service")  # as it is in the repository
    assert (root / "etc/systemd/system/alarmrelay.service").read_bytes() == unit.read_bytes()
    assert done.stdout.endswith(
        "next: sudoedit /etc/alarmrelay.env\n"
        "      sudo systemctl enable alarmrelay && sudo systemctl restart alarmrelay\n"
    )


def test_the_settings_that_install_writes_explain_every_setting(tmp_path):
    install(tmp_path / "root")
    text = (tmp_path / "root/etc/alarmrelay.env").read_text()
    required = ["bearer_token", "room_id", "webhook_username", "webhook_password"]
    for name, setting in SETTINGS.items():
        if name in required:
            explained = f"# {name}, required: {setting.expected}\n{name}=\n"
        else:
            explained = f"# {name}: {setting.expected}\n#{name}={setting.default}\n"
        assert f"\n\n{explained}" in text
    assert re.findall("^([a-zA-Z_]+)=", text, re.MULTILINE) == required


def test_install_again_upgrades_and_leaves_the_settings_alone(tmp_path):
    root = tmp_path / "root"
    install(root)
    settings = root / "etc/alarmrelay.env"
    program = root / "usr/local/bin/alarmrelay.py"
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
    done = run_as_nobody(tmp_path, {}, "install", "--root", str(tmp_path / "root"))
    assert done.returncode == 74
    assert "Permission denied" in done.stderr
    assert "install needs root and systemd, or --root DIR" in done.stderr
