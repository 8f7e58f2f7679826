"""Settings: read, checked, and complained about all at once, before anything listens."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from harness import PROGRAM, Relay, environment, run

from alarmrelay import SETTINGS, SettingsError, read_settings

GOOD = {
    "bearer_token": "NjM0-token_of.a~bot",
    "room_id": "Y2lzY29zcGFyazovL3VzL1JPT00",
    "webhook_username": "cleur",
    "webhook_password": "cleur",
}


def problems(**changes: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read_settings({**GOOD, **changes})
    assert caught.value.exit_status == 78
    return str(caught.value).splitlines()


def test_systemd_is_told_why_there_is_no_start():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("")  # the kernel gives it a name, unix(7)
        systemd.settimeout(20)
        address = "@" + systemd.getsockname()[1:].decode()
        done = run({**GOOD, "room_id": "", "listen": "x", "NOTIFY_SOCKET": address})
        assert done.returncode == 78
        words = systemd.recv(4096).decode()
    assert words.startswith("STATUS=room_id: expected the id of a Webex room, in one word, found ")
    assert words.endswith("; listen: expected address:port, found 'x'")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("listen", "127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("listen", "[fe80::1]:65535", ("fe80::1", 65535)),
        ("webex_url", "https://api-usgov.webex.com/v1", "https://api-usgov.webex.com/v1"),
        ("webex_url", "http://127.0.0.1:8080/v1", "http://127.0.0.1:8080/v1"),
        ("webex_url", "http://[::1]/v1", "http://[::1]/v1"),
        ("webex_url", "http://localhost", "http://localhost"),
        ("retention_days", "1", 1),
        ("webhook_password", "a: b ñ 🔑", "a: b ñ 🔑"),
        ("webhook_username", " cleur\n", "cleur"),
        ("retention_days", "", 30),
        ("vmanage_url", "http://vmanage_1:8443", "http://vmanage_1:8443"),
        ("vmanage_url", "https://[2001:db8::1]/x/", "https://[2001:db8::1]/x/"),
    ],
)
def test_good_values_are_taken(name, text, value):
    assert getattr(read_settings({**GOOD, name: text}), name) == value


BAD = {
    "listen": ["5001", ":5001", "localhost:5001", "::1:5001", "0.0.0.0:65536", "0.0.0.0:+80"],
    "time_zone": ["Europe/Madird", "../etc/passwd", "Europe"],
    "webex_url": [
        "webexapis.com/v1",
        "http://webexapis.com/v1",
        "http://127.0.0.1.evil.example/v1",
        "http://10.0.0.1/v1",
        "https://",
        "https://a b/v1",
        "ftp://webexapis.com",
        "https://webexapis.com:abc/v1",
        "https://webexäpis.com/v1",
    ],
    "vmanage_url": [
        "vmanage.example",
        "https://vmanage.example/) [x",
        "https://vmanage.example/#/app",
        "javascript:alert(1)",
        "https://",
    ],
    "retention_days": ["0", "-1", "1.5", "١", "100000"],
}


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in BAD.items() for text in texts]
)
def test_a_bad_value_is_named_with_what_was_found_and_what_was_expected(name, text):
    (line,) = problems(**{name: text})
    assert line.startswith(f"{name}: expected {SETTINGS[name].expected}")
    assert repr(text) in line


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bearer_token", "s3cr3t with space"),
        ("bearer_token", "s3cr3t\r\nX-Header: x"),
        ("webhook_password", "s3cr3t\nline"),
        ("webhook_password", "s3cr3t\udcff"),
        ("webex_url", "https://user:s3cr3t@webexapis.com/v1"),
        ("webex_url", "https://webexapis.com/v1?access_token=s3cr3t"),
        ("room_id", "Bearer s3cr3t"),
        ("webhook_username", "cleur:s3cr3t"),
    ],
)
def test_a_secret_is_never_shown(name, text):
    (line,) = problems(**{name: text})
    assert line.startswith(f"{name}: expected ")
    assert "s3cr3t" not in line
    assert "a hidden value" in line


def test_rooms_are_found_in_the_environment_and_among_the_credentials(tmp_path):
    for name, text in {"room_id_b": "of-b\n", "room_id_both": "credential", "other": "x"}.items():
        (tmp_path / name).write_text(text)
    rooms = {"room_id_a_1": "of-a", "room_id_both": "variable", "room_id_empty": " "}
    settings = read_settings({**GOOD, **rooms, "CREDENTIALS_DIRECTORY": str(tmp_path)})
    more_rooms = {"/a_1": "of-a", "/b": "of-b", "/both": "credential"}
    assert settings.room_ids == {"/": GOOD["room_id"], **more_rooms}
    assert read_settings(GOOD).room_ids == {"/": GOOD["room_id"]}


ROOMS = "Ops", "a-b", "ä", "healthz", "metrics", "", "a/b", "NAME", "a b"


@pytest.mark.parametrize(
    ("name", "text"),
    [*((f"room_id_{room}", "s3cr3t") for room in ROOMS), ("room_id_ops", "two s3cr3ts")],
)
def test_a_room_must_have_a_name_that_is_a_path_and_an_id_of_one_word(name, text):
    (line,) = problems(**{name: text})
    assert line.startswith(f"{name}: expected a room's id; NAME: a-z, 0-9, _, not healthz, metrics")
    assert "s3cr3t" not in line


def test_missing_settings_are_named_all_at_once_with_the_line_to_export_them(tmp_path):
    done = run({"STATE_DIRECTORY": str(tmp_path / "state"), "listen": "nonsense"})
    assert done.returncode == 78
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 5
    for name, line in zip(
        ["bearer_token", "room_id", "webhook_username", "webhook_password"], lines
    ):
        assert f"{name}: " in line
        assert f"export {name}=" in line
    assert "'nonsense'" in lines[4]
    assert not (tmp_path / "state").exists()


@pytest.mark.pitfall(24)
def test_a_host_without_time_zones_is_told_which_package_to_install(tmp_path):
    done = run({**environment(tmp_path, "http://127.0.0.1:9/v1"), "PYTHONTZPATH": ""})
    assert done.returncode == 78
    assert "time_zone" in done.stderr
    assert "tzdata" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_credential_wins_over_the_variable(tmp_path):
    (tmp_path / "bearer_token").write_text("from-the-file\n")
    (tmp_path / "time_zone").write_text("Asia/Tokyo")
    settings = read_settings({**GOOD, "CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert settings.bearer_token == "from-the-file"
    assert str(settings.time_zone) == "Asia/Tokyo"
    assert settings.webhook_username == GOOD["webhook_username"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", None])
def test_a_credential_that_cannot_be_used_is_named(tmp_path, content):
    if content is None:
        (tmp_path / "bearer_token").mkdir()
    else:
        (tmp_path / "bearer_token").write_bytes(content)
    # Not the variable either: a wrong file must not go unnoticed behind a good variable.
    (line,) = problems(CREDENTIALS_DIRECTORY=str(tmp_path))
    assert line.startswith("bearer_token: expected ")
    assert str(tmp_path / "bearer_token") in line
    assert GOOD["bearer_token"] not in line


def test_the_address_being_taken_is_a_clear_error(tmp_path, relay):
    environ = environment(tmp_path / "other", relay.environ["webex_url"])
    done = run({**environ, "listen": f"127.0.0.1:{relay.port}"})
    assert done.returncode == 74
    assert "listen: " in done.stderr
    assert "Address already in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_state_directory_that_cannot_be_is_a_clear_error(tmp_path):
    (tmp_path / "state").write_text("a file in the way")
    done = run(environment(tmp_path, "http://127.0.0.1:9/v1"))
    assert done.returncode == 74
    assert str(tmp_path / "state") in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("variable", ["XDG_STATE_HOME", "HOME"])
def test_without_systemd_the_spool_is_in_the_users_state(tmp_path, webex, variable):
    home = str(tmp_path / "home")
    folder = Path(home) if variable == "XDG_STATE_HOME" else Path(home, ".local", "state")
    with Relay(tmp_path, webex.url, STATE_DIRECTORY=None, **{variable: home}):
        assert (folder / "alarmrelay" / "alarmrelay.db").exists()
        assert (folder / "alarmrelay" / "alarmrelay.db").stat().st_mode & 0o077 == 0


def test_of_several_state_directories_the_first_is_taken(tmp_path, webex):
    first = tmp_path / "first"
    with Relay(tmp_path, webex.url, STATE_DIRECTORY=f"{first}:{tmp_path / 'second'}"):
        assert (first / "alarmrelay.db").exists()


def test_usage_and_version():
    assert run({}, "--version").stdout.startswith("alarmrelay 0.")
    assert "preview" in run({}, "--help").stdout
    assert run({}, "--nonsense").returncode == 2
    missing = run({}, "preview", "/nonexistent")
    assert missing.returncode == 74
    assert "No such file" in missing.stderr
    wrong = run({}, "preview", str(PROGRAM))
    assert wrong.returncode == 1
    assert "no JSON" in wrong.stderr


def test_an_empty_watchdog_usec_is_none(tmp_path, webex):
    with Relay(tmp_path, webex.url, WATCHDOG_USEC="") as relay:
        relay.told("STATUS=All alarms are in the room")
    assert "WATCHDOG=1" not in "".join(relay.said)


def test_systemd_is_told_of_a_full_disk_whose_directory_is_no_utf_8(tmp_path, webex):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    limits = {"FREE_BYTES": 2**60, "TICK_S": 0.05}
    with Relay(tmp_path, webex.url, limits, STATE_DIRECTORY=name) as relay:
        relay.told("STATUS=New alarms are refused: the disk is full, or under ")
