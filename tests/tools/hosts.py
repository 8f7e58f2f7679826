"""The whole story on real hosts: Debian 11, 12 and 13, each booted with its own systemd.

make test-hosts runs it, as root on a Debian. Each host is made once with debootstrap, in
$XDG_CACHE_HOME/alarmrelay-hosts, and booted from a copy with systemd-nspawn. It has a network of
its own without a way out. This program joins that network, plays Webex and vManage in it, and runs
commands on the host.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from harness import PAYLOADS, PROGRAM, README, basic
from webex_standin import ROOM, TOKEN, Fault, WebexStandIn

SUITES = {"bullseye": "Debian 11", "bookworm": "Debian 12", "trixie": "Debian 13"}
PACKAGES = "systemd,systemd-sysv,dbus,python3,tzdata,iproute2,curl"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "alarmrelay-hosts")
TOOLS = ("debootstrap", "systemd-nspawn", "nsenter", "pgrep")
PORT = 5001
SETTINGS = """
bearer_token={token}
room_id={room}
webhook_username=vmanage
webhook_password='correct horse: battery'
webex_url={url}
"""
# ==================================================================================================
# PATCHES THE PROGRAM: this drop-in runs the real program with its accept loop made to hang once a
# file is there. It names what is inside the program (select.select, STALL_S, HEADER_S) and has to
# follow when that changes. Nothing else in this file does.
HANG_WATCHDOG_S = 4  # as in the drop-in
HANG = """[Service]
WatchdogSec=4
ExecStart=
ExecStart=/usr/bin/python3 -c "import os, sys, time; sys.path.insert(0, '/usr/local/bin'); \\
import alarmrelay; alarmrelay.STALL_S = alarmrelay.HEADER_S = 1.0; \\
real = alarmrelay.Server.service_actions; \\
alarmrelay.Server.service_actions = lambda server: ( \\
time.sleep(1000) if os.path.exists('/var/lib/hang') else real(server)); \\
os._exit(alarmrelay.main())"
"""
# ==================================================================================================


# === Hosts: made, booted, spoken to ===============================================================
def make_tree(suite: str) -> None:
    """Make a host's tree, unless it is there."""
    if (CACHE / suite / "etc/debian_version").exists():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    new = CACHE / f"{suite}.new"
    shutil.rmtree(new, ignore_errors=True)
    options = ["--variant=minbase", f"--include={PACKAGES}", suite, str(new)]
    subprocess.run(["debootstrap", *options], check=True, stdout=subprocess.DEVNULL, timeout=900)
    new.rename(CACHE / suite)


@contextlib.contextmanager
def booted(suite: str) -> Iterator[int]:
    """Boot a copy of a host, and yield the pid of its systemd."""
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=f"{suite}-") as folder:
        tree = Path(folder, "root")
        subprocess.run(["cp", "-a", "--reflink=auto", str(CACHE / suite), str(tree)], check=True)
        options = ["--register=no", "--private-network", "--keep-unit", "--console=read-only"]
        nspawn = subprocess.Popen(
            ["systemd-nspawn", "-q", "-b", "-D", str(tree), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield until(lambda: leader_of(nspawn), f"{suite} does not boot", 120)
        finally:
            nspawn.send_signal(signal.SIGTERM)  # it powers the host off
            with contextlib.suppress(subprocess.TimeoutExpired):
                nspawn.wait(30)
            nspawn.kill()
            nspawn.wait()


def leader_of(nspawn: subprocess.Popen[bytes]) -> int:
    """Return the pid of the host's systemd once it has started everything, else 0."""
    assert nspawn.poll() is None, "systemd-nspawn has ended: it needs root and its cgroups"
    children = subprocess.run(
        ["pgrep", "-x", "-P", str(nspawn.pid), "systemd"], capture_output=True, text=True
    ).stdout.split()
    if not children:
        return 0
    leader = int(children[0])
    state = on_host(leader, "systemctl", "is-system-running", check=False).stdout.strip()
    if state not in ("running", "degraded"):
        return 0
    return leader


def on_host(
    leader: int, *command: str, check: bool = True, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command in all namespaces of the host, and return what it said."""
    done = subprocess.run(
        ["nsenter", "-t", str(leader), "-m", "-u", "-i", "-n", "-p", "-r", "-w", *command],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "SYSTEMD_PAGER": ""},
    )
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done


def until(condition: Callable[[], Any], otherwise: str, timeout_s: float = 30) -> Any:
    """Wait until the condition holds, and return what it returned."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(otherwise)


class Host:
    """A booted host, in whose network this process runs."""

    def __init__(self, leader: int) -> None:
        self.leader = leader

    def run(self, command: str, check: bool = True, stdin: str = "") -> str:
        """Run a shell's command and return what it said; raise if it fails, unless not to check."""
        done = on_host(self.leader, "sh", "-c", command, check=check, stdin=stdin)
        return done.stdout + done.stderr

    def status(self, command: str) -> int:
        """Return a shell command's exit status."""
        return on_host(self.leader, "sh", "-c", command, check=False).returncode

    def write(self, path: str, text: str, mode: str = "644") -> None:
        """Write a file, and its folder if there is none."""
        self.run(f"mkdir -p $(dirname {path}); cat > {path}; chmod {mode} {path}", stdin=text)

    def show(self, name: str) -> str:
        """Return a property of the unit."""
        return self.run(f"systemctl show --value -p {name} alarmrelay").strip()

    def journal(self) -> str:
        """Return what the relay has logged in all its lives."""
        return self.run("journalctl -q --no-pager -o cat -u alarmrelay")

    def settings(self, webex: WebexStandIn, **changes: str | None) -> None:
        """Write the settings with these changes; None takes one out."""
        text = SETTINGS.format(token=TOKEN, room=ROOM, url=webex.url)
        for name, value in changes.items():
            text = re.sub(f"{name}=.*\n", "", text)
            if value is not None:
                text += f"{name}={value}\n"
        self.write("/etc/alarmrelay.env", text, "600")

    def drop_in(self, text: str) -> None:
        """Do what `systemctl edit` does; an empty text takes it away."""
        self.write("/etc/systemd/system/alarmrelay.service.d/override.conf", text)
        self.run("systemctl daemon-reload")


def post(message: str) -> int:
    """Post an alarm on a connection of its own, and return the answer's status.

    Return 0 if the connection breaks; raise ConnectionRefusedError and the like if there is none.
    """
    content = json.dumps({"message": message}).encode()
    client = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    with contextlib.closing(client):
        client.connect()
        try:
            client.request("POST", "/", content, {"Authorization": basic()})
            response = client.getresponse()
            response.read()
        except (OSError, http.client.HTTPException):
            return 0
        return response.status


# === The story, a chapter each ====================================================================
def install(host: Host, webex: WebexStandIn) -> None:
    """scp, sudo python3 alarmrelay.py install."""
    host.write("/root/alarmrelay.py", PROGRAM.read_text(encoding="utf-8"))
    said = host.run("cd /root && python3 alarmrelay.py install")
    assert said.endswith("sudo systemctl enable alarmrelay && sudo systemctl restart alarmrelay\n")
    modes = host.run("stat -c '%a %U' /etc/alarmrelay.env /usr/local/bin/alarmrelay.py")
    assert modes == "600 root\n755 root\n", modes


def start_without_settings(host: Host, webex: WebexStandIn) -> None:
    """It fails at once, with a clear line in status and journal, and not in a loop."""
    assert host.status("systemctl start alarmrelay") == 1
    assert (host.show("ActiveState"), host.show("NRestarts")) == ("failed", "0")
    assert host.show("ExecMainStatus") == "78"
    line = "bearer_token: expected the Webex bot's token, in one word, found nothing: "
    status = host.run("systemctl status alarmrelay", check=False)
    assert line in status, status
    assert f'Status: "{line}' in status, status
    assert line in host.journal()
    host.run("mv /etc/alarmrelay.env /etc/away; systemctl reset-failed alarmrelay")
    assert host.status("systemctl start alarmrelay") == 1
    assert (host.show("ActiveState"), host.show("NRestarts")) == ("failed", "0")
    status = host.run("systemctl status alarmrelay", check=False)
    assert f'Status: "{line}' in status, status
    host.run("mv /etc/away /etc/alarmrelay.env")


def check_and_start(host: Host, webex: WebexStandIn) -> None:
    """The two commands that install has printed, and check in between."""
    host.settings(webex)
    said = host.run("/usr/local/bin/alarmrelay.py check")
    verdicts = [line.split(":")[0] for line in said.splitlines()]
    assert verdicts == ["ok"] * 4, said
    assert "state directory /var/lib/alarmrelay: " in said, said
    host.run("systemctl enable --now alarmrelay")
    assert host.show("ActiveState") == "active"
    assert host.run("systemctl is-enabled alarmrelay") == "enabled\n"
    said = host.run("systemctl status alarmrelay")
    words = "All alarms are in the room; listening on 0.0.0.0 port 5001; 0 waiting, 0 delivered"
    assert f'Status: "{words}"' in said, said


def deliver_the_sample(host: Host, webex: WebexStandIn) -> None:
    """The workshop's sample, by the host's own curl."""
    sample = (PAYLOADS / "system_reboot_issued.json").read_text(encoding="utf-8")
    url = "http://127.0.0.1:5001/"
    said = host.run(f"curl -s -u 'vmanage:correct horse: battery' -d @- {url}", stdin=sample)
    assert said == '{"status": "accepted"}', said
    webex.wait_for(lambda: webex.messages)
    golden = (PAYLOADS / "system_reboot_issued.md").read_text(encoding="utf-8")
    late = "<br>**Delayed:**"
    assert webex.texts()[0].split(late)[0] == golden.strip().split(late)[0]
    until(lambda: "1 delivered" in host.show("StatusText"), "the status does not follow")
    said = host.run("cd /tmp && /usr/local/bin/alarmrelay.py send")  # with the settings of the host
    assert said == '200 {"status": "accepted"}\n', said
    host.write("/tmp/alarm.json", '{"message": "of a file"}')
    host.run("cd /tmp && /usr/local/bin/alarmrelay.py send alarm.json")
    webex.wait_for(lambda: len(webex.messages) == 3)
    assert "of a file" in webex.texts()[-1]
    assert " taken: room=/ rule='System_Reboot_Issued'" in host.journal()


def run_hardened(host: Host, webex: WebexStandIn) -> None:
    """The unit as it stands holds: another user, no privileges, nothing to write but its own."""
    pid = host.show("MainPID")
    told = dict(re.findall(r"(\w+):\s+(\S+)", host.run(f"cat /proc/{pid}/status")))
    assert told["Uid"] != "0"
    assert (told["NoNewPrivs"], told["Seccomp"], int(told["CapEff"], 16)) == ("1", "2", 0), told
    mounts = host.run(f"cat /proc/{pid}/mountinfo")
    assert re.search(r"^\d+ \d+ \S+ \S+ / ro[, ]", mounts, re.MULTILINE), "the root is writable"
    state = host.run("stat -c '%a' /var/lib/private/alarmrelay/ /var/lib/private/alarmrelay/*.db")
    assert state.split() == ["700", "600"], state


def run_with_the_addresses_of_the_readme(host: Host, webex: WebexStandIn) -> None:
    """The README's drop-in for IPAddressAllow= leaves the relay at work."""
    lines = re.search(r"^ +\[Service\]\n +IPAddressDeny=any\n.*\n", README, re.MULTILINE)[0]
    host.drop_in(re.sub("^ +", "", lines, flags=re.MULTILINE))
    host.run("systemctl restart alarmrelay")
    assert "IPAddressDeny=any" in host.run("systemctl cat alarmrelay")
    assert post("from localhost") == 200
    webex.wait_for(lambda: "from localhost" in webex.texts()[-1])
    host.drop_in("")


def keep_the_token_in_a_credential(host: Host, webex: WebexStandIn) -> None:
    """With the README's drop-in it is neither in the environment nor in a command line."""
    host.settings(webex, bearer_token=None)
    host.write("/etc/alarmrelay.token", TOKEN, "600")
    assert "LoadCredential=bearer_token:/etc/alarmrelay.token" in README
    drop_in = "[Service]\nLoadCredential=bearer_token:/etc/alarmrelay.token\n"
    kinds = [drop_in]
    if host.status("command -v systemd-creds") == 0:
        name = "/etc/alarmrelay.token.encrypted"
        command = f"systemd-creds encrypt --name=bearer_token /etc/alarmrelay.token {name}"
        assert command in README
        host.run(f"{command} && ! grep -q {TOKEN} {name}")
        assert f"LoadCredentialEncrypted=bearer_token:{name}" in README
        kinds.append(f"[Service]\nLoadCredentialEncrypted=bearer_token:{name}\n")
    for number, text in enumerate(kinds):
        host.drop_in(text)
        host.run("systemctl restart alarmrelay")
        pid = host.show("MainPID")
        assert TOKEN not in host.run(f"cat /proc/{pid}/environ /proc/{pid}/cmdline")
        assert post(f"credential {number}") == 200
        webex.wait_for(lambda n=number: f"credential {n}" in webex.texts()[-1])
        assert host.run("/usr/local/bin/alarmrelay.py check").count("ok: ") == 4
    host.drop_in("")
    host.settings(webex)
    host.run("systemctl restart alarmrelay")


def change_listen(host: Host, webex: WebexStandIn) -> None:
    """Another address on the same port is had at the first try, and the old socket is given up."""
    count = host.show("NRestarts")
    for address in ("127.0.0.1:5001", "0.0.0.0:5001"):
        host.settings(webex, listen=address)
        host.run("systemctl restart alarmrelay")
        assert f"; listening on {address.replace(':', ' port ')};" in host.show("StatusText")
        assert post(f"to {address}") == 200
    assert host.show("NRestarts") == count


def restart_and_kill_under_load(host: Host, webex: WebexStandIn) -> None:
    """Ten restarts and ten kills; no connection is refused, every 200 stands in the room."""
    over = threading.Event()
    before = len(webex.messages)
    answered: list[str] = []
    broken: list[str] = []

    def keep_posting(client: int) -> None:
        number = 0
        while not over.is_set():
            number += 1
            name = f"load {client}-{number}."
            status = post(name)  # raises if it cannot connect
            if status == 200:
                answered.append(name)
            else:
                broken.append(name)
            over.wait(0.02)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(keep_posting, client) for client in range(4)]
        try:
            for kind in ("restart", "kill -s KILL"):
                for _ in range(10):
                    pid = host.show("MainPID")
                    enough = len(answered) + 5
                    host.run(f"systemctl {kind} alarmrelay")
                    until(lambda old=pid: host.show("MainPID") not in (old, "0"), "no new process")
                    until(lambda least=enough: len(answered) >= least, "no more answers")
                if kind == "restart":
                    print(f"  {len(broken)} requests broke in ten restarts", flush=True)
                    assert not broken, broken
        finally:
            over.set()
        for client in clients:
            client.result()  # not one was refused
    print(f"  {len(answered)} answered, {len(broken)} broke in ten kills", flush=True)
    assert len(answered) > 200
    last = f"the last of {len(answered)}."
    assert post(last) == 200
    until(lambda: last in "".join(webex.texts()[-3:]), "the spool does not drain", 120)
    room = "".join(webex.texts()[before:])
    lost = [name for name in answered if name not in room]
    assert not lost, f"answered, but not in the room: {lost}"
    assert host.show("Result") == "success"


def be_killed_by_the_watchdog(host: Host, webex: WebexStandIn) -> None:
    """An accept loop that hangs is killed and started again within twice WatchdogSec."""
    host.drop_in(HANG)
    host.run("systemctl restart alarmrelay")
    assert post("before the fault") == 200
    pid = host.show("MainPID")
    host.run("touch /var/lib/hang")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        late = pool.submit(post, "waits in the kernel")
        until(
            lambda: host.show("MainPID") not in (pid, "0"),
            "it was not killed",
            2 * HANG_WATCHDOG_S + 1,
        )
        host.run("rm /var/lib/hang")
        assert late.result(30) in (0, 200)
    assert "Watchdog timeout" in host.run("journalctl -q --no-pager -o cat")
    until(lambda: host.show("ActiveState") == "active", "it does not come back")
    until(lambda: post("after the fault") == 200, "it does not answer")
    host.drop_in("")
    host.run("systemctl restart alarmrelay")


def stop_and_upgrade(host: Host, webex: WebexStandIn) -> None:
    """An upgrade over waiting alarms: the settings stay, the alarms arrive, by the new program."""
    webex.fault_for = lambda _: Fault(status=401)
    assert post("waits over the upgrade") == 200
    settings = host.run("md5sum /etc/alarmrelay.env")
    new = re.sub('__version__ = ".*"', '__version__ = "9.9.9"', PROGRAM.read_text("utf-8"))
    host.write("/root/alarmrelay.py", new)
    said = host.run("cd /root && python3 alarmrelay.py install")
    assert said.endswith("sudo systemctl restart alarmrelay\n"), said
    webex.fault_for = lambda _: None
    host.run("systemctl restart alarmrelay")
    webex.wait_for(lambda: "waits over the upgrade" in webex.texts()[-1])
    assert "alarmrelay 9.9.9: " in host.journal()
    assert settings == host.run("md5sum /etc/alarmrelay.env")
    host.run("systemctl stop alarmrelay")
    assert (host.show("ActiveState"), host.show("Result")) == ("inactive", "success")
    with contextlib.suppress(ConnectionRefusedError):
        post("to nobody")
        raise AssertionError("a stopped relay still listens")


STORY = (
    install,
    start_without_settings,
    check_and_start,
    deliver_the_sample,
    run_hardened,
    run_with_the_addresses_of_the_readme,
    keep_the_token_in_a_credential,
    change_listen,
    restart_and_kill_under_load,
    be_killed_by_the_watchdog,
    stop_and_upgrade,
)


# === All hosts ====================================================================================
def tell(leader: int) -> int:
    """Run the story; this process is in the host's network already."""
    host = Host(leader)
    host.run("ip link set lo up")
    about = "import sqlite3, sys; print(sys.version.split()[0], sqlite3.sqlite_version)"
    system = host.run("systemctl --version").split()[1]
    print(f"  systemd {system}, Python and SQLite {host.run(f'python3 -c {about!r}')}", end="")
    with WebexStandIn() as webex:
        for chapter in STORY:
            began_s = time.monotonic()
            try:
                chapter(host, webex)
            except BaseException:
                print(f"FAILED {chapter.__name__}\n{host.journal()[-3000:]}", flush=True)
                raise
            print(f"  ok {chapter.__name__} ({time.monotonic() - began_s:.1f} s)", flush=True)
        assert "Traceback" not in host.journal()
    return 0


def run_host(suite: str) -> bool:
    """Boot a host and tell the story in its network; return whether all went well."""
    name = f"{SUITES[suite]} ({suite})"
    print(name, flush=True)
    try:
        with booted(suite) as leader:
            command = ["nsenter", "-t", str(leader), "-n", sys.executable, __file__, str(leader)]
            is_well = subprocess.run(command, timeout=900, check=False).returncode == 0
    except (OSError, subprocess.SubprocessError, AssertionError) as error:
        print(f"  {error}")
        is_well = False
    verdict = "ok" if is_well else "FAILED"
    print(f"{name}: {verdict}\n", flush=True)
    return is_well


def main() -> int:
    """Make and run all hosts; return 0 if the story went well on each of them."""
    if len(sys.argv) > 1:
        return tell(int(sys.argv[1]))
    needs = [tool for tool in TOOLS if not shutil.which(tool)]
    if os.geteuid() != 0:
        needs.append("root")
    if needs:
        print(f"no host has run: that needs {', '.join(needs)}, on a Debian or like it")
        return 1
    with concurrent.futures.ThreadPoolExecutor(len(SUITES)) as pool:
        list(pool.map(make_tree, SUITES))
    # One after the other: they share the caller's cgroup.
    failed = [suite for suite in SUITES if not run_host(suite)]
    print(f"{len(SUITES) - len(failed)} of {len(SUITES)} hosts ran the whole story")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
