"""What Prometheus is told: the text format, every label from the start, numbers that are right."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import FAST, README, Relay, basic, get, later
from page import Page
from webex_standin import PAUSED, Fault, three_rooms

from alarmrelay import __version__

NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\[\\"n])*)"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? ([0-9.e+-]+)")
FAMILY = re.compile(
    rf"# HELP (?P<name>{NAME}) (?:[^\\\n]|\\\\|\\n)+\n"
    r"# TYPE (?P=name) (?P<kind>counter|gauge|histogram)\n"
    r"(?P<lines>(?:[^#].*\n)+)"
)
STEPS = ("0.5", 1, 2, 5, 10, 30, 60, 300, 900, 3600, 14_400, "+Inf")


def parse_metrics(text: str) -> dict[str, float]:
    """Return the samples of Prometheus's text format 0.0.4; they stand as they should."""
    samples = {}
    names = []
    for family in FAMILY.finditer(text):
        name = family["name"]
        names.append(name)
        assert name.endswith("_total") == (family["kind"] == "counter")
        found = [parse_sample(line) for line in family["lines"].splitlines()]
        ends = ("_bucket", "_sum", "_count") if family["kind"] == "histogram" else ("",)
        assert {key.partition("{")[0] for key, _ in found} == {name + end for end in ends}
        assert len(dict(found)) == len(found)
        if family["kind"] == "histogram":
            check_steps(name, dict(found))
        samples.update(found)
    assert FAMILY.sub("", text) == ""
    assert len(set(names)) == len(names)
    assert min(samples.values()) >= 0
    return samples


def parse_sample(line: str) -> tuple[str, float]:
    """Return a sample's name with its labels, and its value."""
    match = SAMPLE.fullmatch(line)
    assert match, f"no sample: {line!r}"
    labels = re.findall(LABEL, match[2] or "")
    assert len(dict(labels)) == len(labels)
    return line.rpartition(" ")[0], float(match[7])


def check_steps(name: str, samples: dict[str, float]) -> None:
    """Look whether each step of a histogram holds those before it, and the last one all."""
    counts = {key: number for key, number in samples.items() if key.startswith(f"{name}_count{{")}
    for key, count in counts.items():
        start = key.replace("_count{", "_bucket{")[:-1] + ",le="
        steps = {step: number for step, number in samples.items() if step.startswith(start)}
        assert list(steps) == [f'{start}"{le}"}}' for le in STEPS]
        assert sorted(steps.values()) == list(steps.values())
        assert list(steps.values())[-1] == count
        assert key.replace("_count{", "_sum{") in samples
    assert len(samples) == len(counts) * (len(STEPS) + 2)


def metrics(relay: Relay) -> dict[str, float]:
    """Return the samples, without the program's name."""
    status, headers, text = get(relay, "/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4")
    return {key.replace("alarmrelay_", "", 1): n for key, n in parse_metrics(text).items()}


def test_metrics_tell_how_late_alarms_are(tmp_path, webex):
    webex.fault_for = lambda _: PAUSED
    with Relay(tmp_path, webex.url) as relay:
        relay.post({"message": "x"})
        relay.told("limits the bot")
    webex.fault_for = lambda _: None
    with Relay(tmp_path, webex.url, **later(tmp_path, 0.75)) as relay:
        relay.told("0 waiting, 1 delivered")
        found = metrics(relay)
    assert found['oldest_waiting_seconds{room="/"}'] == 0
    assert 2700 <= found['delivery_seconds_sum{room="/"}'] < 3600
    steps = [found[f'delivery_seconds_bucket{{room="/",le="{le}"}}'] for le in STEPS]
    assert steps == [0] * 9 + [1] * 3


def test_a_clock_that_is_set_back_makes_no_number_negative(tmp_path, webex):
    release = threading.Event()
    webex.faults.append(Fault(hold=release, take=True, status=200))
    with Relay(tmp_path, webex.url, **later(tmp_path, 0)) as relay:
        relay.post({"message": "x"})
        webex.wait_for(lambda: webex.requests)
        later(tmp_path, -1)
        assert metrics(relay)['oldest_waiting_seconds{room="/"}'] == 0
        assert Page(relay).rows["rooms"][0][3] == "oldest 0 s"
        release.set()
        relay.told("0 waiting, 1 delivered")
        assert metrics(relay)['delivery_seconds_sum{room="/"}'] == 0
        assert Page(relay).rows["alarms"][0][-1] == "delivered after 0.0 s"


def test_every_metric_is_there_from_the_start_at_zero(tmp_path, webex):
    before = time.time()
    with Relay(tmp_path, webex.url, **three_rooms(webex)) as relay:
        found = metrics(relay)
    assert before <= found.pop("process_start_time_seconds") <= time.time()
    assert found.pop(f'build_info{{version="{__version__}"}}') == 1
    codes = (200, 400, 401, 404, 405, 408, 411, 413, 414, 431, 501, 503)
    expected = {f'requests_total{{code="{code}"}}' for code in codes}
    names = "alarms_accepted_total duplicates_total messages_delivered_total alarms_waiting "
    names += "alarms_delivered_total oldest_waiting_seconds delivery_seconds_sum "
    for room in ("/", "/ops", "/noc"):
        for name in f"{names} delivery_seconds_count".split():
            expected.add(f'{name}{{room="{room}"}}')
        for reason in ("held", "refused", "paused", "failed"):
            expected.add(f'delivery_failures_total{{room="{room}",reason="{reason}"}}')
        for le in STEPS:
            expected.add(f'delivery_seconds_bucket{{room="{room}",le="{le}"}}')
    assert set(found) == expected
    assert set(found.values()) == {0.0}


ALARMS = "alarms_accepted_total", "alarms_delivered_total", "delivery_seconds_count"
STORY = {
    **dict.fromkeys((f'{name}{{room="/"}}' for name in ALARMS), 6),
    **dict.fromkeys((f'{name}{{room="/ops"}}' for name in ALARMS), 12),
    **dict.fromkeys((f'{name}{{room="/noc"}}' for name in ALARMS), 1),
    'messages_delivered_total{room="/"}': 6,
    'messages_delivered_total{room="/ops"}': 1,
    'messages_delivered_total{room="/noc"}': 1,
    'delivery_failures_total{room="/",reason="held"}': 1,
    'delivery_failures_total{room="/ops",reason="paused"}': 1,
    'delivery_failures_total{room="/noc",reason="refused"}': 2,
    'delivery_failures_total{room="/noc",reason="failed"}': 1,
    'duplicates_total{room="/"}': 1,
    'requests_total{code="200"}': 8,
    'requests_total{code="400"}': 1,
    'requests_total{code="401"}': 1,
}


def test_the_numbers_of_a_story_are_right(tmp_path, webex):
    limits = {**FAST, "HOLD_S": 0.1}
    release = threading.Event()
    with Relay(tmp_path, webex.url, limits=limits, **three_rooms(webex)) as relay:
        for message in ("a", "b", "a"):
            assert relay.post({"message": message})[0] == 200
        relay.post([{"message": "c"}, {"message": "d"}, {"message": "e"}])
        relay.post({"message": "f"}, Authorization=basic(password="wrong"))
        relay.post(b"{")
        relay.told("0 waiting, 5 delivered")
        webex.faults.append(Fault(status=401))
        relay.post({"message": "g"})
        relay.told("0 waiting, 6 delivered")
        webex.faults.append(Fault(hold=release, status=429, headers={"Retry-After": "0"}))
        relay.post([{"message": f"number {number}"} for number in range(12)], "/ops")
        relay.told("12 waiting, 6 delivered")
        assert metrics(relay)['alarms_waiting{room="/ops"}'] == 12
        release.set()
        relay.told("0 waiting, 18 delivered")
        # Refused in two of its forms; the third is lost on its way, and then it is taken.
        webex.faults.extend([Fault(status=400), Fault(status=400), Fault(reset_before=True)])
        relay.post({"message": "h"}, "/noc")
        relay.told("0 waiting, 19 delivered")
        found = metrics(relay)
    assert found['delivery_seconds_sum{room="/"}'] >= 0.1  # one was held so long
    other = ("build_info", "process_start", "delivery_seconds_bucket", "delivery_seconds_sum")
    counted = {key: number for key, number in found.items() if not key.startswith(other)}
    assert counted == {**dict.fromkeys(counted, 0), **STORY}


def test_no_count_goes_back_while_alarms_come_in(relay, webex):
    done = threading.Event()
    posted = [0] * 8  # by each client
    scrapes = list[dict[str, float]]()
    accepted = 'alarms_accepted_total{room="/"}'

    def post(client: int) -> None:
        connection = relay.connect()
        while not done.is_set():
            body = {"message": f"number {client} {posted[client]}"}
            assert relay.post(body, connection=connection)[0] == 200
            posted[client] += 1
        connection.close()

    with ThreadPoolExecutor(len(posted)) as pool:
        clients = [pool.submit(post, client) for client in range(len(posted))]
        try:
            while len(scrapes) < 100 or len({scrape[accepted] for scrape in scrapes}) < 10:
                scrapes.append(metrics(relay))
        finally:
            done.set()
        for client in clients:
            client.result()
    relay.told(f"0 waiting, {sum(posted)} delivered")
    last = metrics(relay)
    scrapes.append(last)
    gauges = ("alarms_waiting", "oldest_waiting_seconds")
    for before, after in zip(scrapes, scrapes[1:]):
        back = [key for key in before if after[key] < before[key] and not key.startswith(gauges)]
        assert back == []
    assert last[accepted] == last['delivery_seconds_count{room="/"}'] == sum(posted)
    assert last['messages_delivered_total{room="/"}'] == len(webex.messages)
    assert last['requests_total{code="200"}'] == sum(posted) + len(scrapes) - 1


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_has_nothing_to_say_against_the_metrics(tmp_path, webex):
    with Relay(tmp_path, webex.url, **three_rooms(webex)) as relay:
        relay.post({"message": "x"})
        relay.told("0 waiting, 1 delivered")
        text = get(relay, "/metrics")[2]
    command = ["promtool", "check", "metrics"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_readme_names_each_metric_and_its_labels(relay):
    table = README.partition("| `alarmrelay_…` | type | what |")[2].partition("\n\n")[0]
    said = {}
    for names, kind in re.findall(r"^\| (`.+`) \| (\w+) \|", table, re.MULTILINE):
        for name, labels in re.findall(r"`(\w+)\{(.+?)\}`", names):
            said[f"alarmrelay_{name}"] = (kind, set(labels.split(",")))
    found = {}
    for name, kind, sample in re.findall(
        r"# TYPE (\w+) (\w+)\n\w+\{(.*?)\} ", get(relay, "/metrics")[2]
    ):
        found[name] = (kind, set(re.findall(r"(\w+)=", sample)) - {"le"})
    assert found == said


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_the_readmes_rules_and_scrape_configuration_are_right(tmp_path):
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", README, re.MULTILINE)
    (config,) = [block for block in blocks if "scrape_configs:" in block]
    (rules,) = [block for block in blocks if "groups:" in block]
    (tmp_path / "alarmrelay.password").write_text("x")
    files = {
        "prometheus.yml": config + f"    rule_files: ['{tmp_path}/rules.yml']\n",
        "rules.yml": rules,
    }
    for name, text in files.items():
        lines = [line[4:] for line in text.splitlines()]
        text = "\n".join(lines).replace("/etc/prometheus/alarmrelay", f"{tmp_path}/alarmrelay")
        (tmp_path / name).write_text(text + "\n")
    command = ["promtool", "check", "config", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rules found" in done.stdout
