"""`send` and `check` with several rooms, against the running program."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from harness import PAYLOADS, PROGRAM, Relay, environment, program, run
from test_tls import make_pair, secured

from alarmrelay import SAMPLE

WORKSHOP = json.loads((PAYLOADS / "system_reboot_issued.json").read_bytes())


def sent(relay: Relay, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    listen = relay.environ["listen"].rpartition(":")[0]
    environ = {**relay.environ, "listen": f"{listen}:{relay.port}", **changes}
    environ.pop("NOTIFY_SOCKET", None)
    return run(environ, "send", *arguments)


def test_send_posts_the_workshops_alarm_as_of_now(relay, webex):
    for _ in range(2):  # each has a uuid of its own, or the second would be a duplicate
        done = sent(relay)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == '200 {"status": "accepted"}\n'
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


def test_the_sample_is_the_workshops():
    sample = json.loads(SAMPLE)
    assert sample
    assert {key: WORKSHOP[key] for key in sample} == sample


def test_send_posts_a_file_as_it_is(relay, webex, tmp_path):
    alarm = tmp_path / "alarm.json"
    alarm.write_bytes(b'{"message": "of a file", "x": 1.0}')
    assert sent(relay, str(alarm)).stdout == '200 {"status": "accepted"}\n'
    assert sent(relay, str(alarm)).stdout == '200 {"status": "duplicate"}\n'
    webex.wait_for(lambda: "**Message** : of a file," in "".join(webex.texts()))
    environ = {**relay.environ, "listen": f"127.0.0.1:{relay.port}"}
    command = [sys.executable, "-X", "dev", str(PROGRAM), "send", "-"]
    done = subprocess.run(
        command, env=environ, input=b'{"message": "of stdin"}', capture_output=True
    )
    assert done.stdout == b'200 {"status": "accepted"}\n'
    webex.wait_for(lambda: "**Message** : of stdin," in "".join(webex.texts()))


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
        assert (done.returncode, done.stdout) == (0, '200 {"status": "accepted"}\n')


def test_send_speaks_tls_with_a_certificate_that_signs_itself(tmp_path, webex):
    pair = make_pair(tmp_path, "jumphost.elsewhere")
    with Relay(tmp_path, webex.url, **secured(pair)) as relay:
        done = sent(relay, https_proxy="http://127.0.0.1:9")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == '200 {"status": "accepted"}\n'
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
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = environment(tmp_path, "http://127.0.0.1:9/v1", listen=f"127.0.0.1:{port}")
    done = run(environ, "send")
    assert done.returncode == 1
    assert "Connection refused" in done.stderr
    assert "; systemctl status alarmrelay; if listen, " in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_send_does_not_wait_for_ever_for_an_answer(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        listen = f"127.0.0.1:{silent.getsockname()[1]}"
        environ = environment(tmp_path, "http://127.0.0.1:9/v1", listen=listen)
        # The default of a parameter is as old as its class: the fault is put in its place.
        fault = "alarmrelay.Client.__init__.__defaults__ = (0.5,)"
        command = [sys.executable, *program({"REQUEST_S": 0.5}, fault), "send"]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "no answer within 0.5 s; systemctl status alarmrelay; if" in done.stderr


def test_send_shows_whatever_answers_there(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"

        def answer() -> None:
            client, _ = other.accept()
            with client:
                client.recv(65536)
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff!")

        thread = threading.Thread(target=answer)
        thread.start()
        done = run(environment(tmp_path, "http://127.0.0.1:9/v1", listen=listen), "send")
        thread.join(20)
    assert (done.returncode, done.stdout) == (0, "200 \ufffd!\n")


def test_send_names_the_settings_that_are_missing(tmp_path):
    done = run(environment(tmp_path, "http://127.0.0.1:9/v1", webhook_password=None), "send")
    assert done.returncode == 78
    assert "webhook_password: expected a password for vManage" in done.stderr


def test_check_looks_at_every_room(tmp_path, webex):
    webex.rooms.add("of-ops")
    rooms = {"room_id_ops": "of-ops", "room_id_noc": "of others"[:2], "room_id_z": "of-ops"}
    done = run(environment(tmp_path, webex.url, **rooms), "check")
    assert done.returncode == 1
    lines = done.stdout.splitlines()[3:]
    assert [line.split(": ")[:2] for line in lines] == [
        ["ok", "room_id"],
        ["wrong", "room_id_noc"],
        ["ok", "room_id_ops"],
        ["ok", "room_id_z"],
    ]
    assert "404 Not Found" in lines[1]
