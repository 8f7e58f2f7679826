"""What Prometheus is told: the text format, every label from the start, numbers that are right."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from typing import Any

import pytest
from harness import FAST, PROGRAM, README, Relay, basic, later
from page import Page, get
from webex_standin import PAUSED, Fault, three_rooms

from alarmrelay import __version__

NAME, LABEL = "[a-zA-Z_:][a-zA-Z0-9_:]*", r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\[\\"n])*)"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? ([0-9.e+-]+)")
STEPS = ("0.5", 1, 2, 5, 10, 30, 60, 300, 900, 3600, 14_400, "+Inf")


def parse_metrics(text: str) -> dict[str, float]:
    """Return the samples of Prometheus's text format 0.0.4; they stand as they should."""
    samples, kinds, steps, family = dict[str, float](), dict[str, str](), dict[str, Any](), ""
    assert text.endswith("\n")
    for block in re.split("^(?=# HELP )", text[:-1], flags=re.MULTILINE)[1:]:
        first, second, *lines = block.rstrip("\n").split("\n")
        family = re.fullmatch(rf"# HELP ({NAME}) (?:[^\\]|\\\\|\\n)+", first)[1]
        kind = re.fullmatch(rf"# TYPE {family} (counter|gauge|histogram)", second)[1]
        assert family not in kinds, f"{family} is there twice"
        assert family.endswith("_total") == (kind == "counter")
        assert lines, f"{family} has no sample"
        kinds[family] = kind
        ends = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        for line in lines:
            match = SAMPLE.fullmatch(line)
            assert match, f"no sample: {line!r}"
            assert match[1] in [family + end for end in ends], f"{line} stands below {family}"
            labels, key = dict(re.findall(LABEL, match[2] or "")), line.rpartition(" ")[0]
            assert len(labels) == (match[2] or "").count("=")
            assert key not in samples, f"{key} is there twice"
            samples[key] = float(match[7])
            if limit := labels.pop("le", ""):
                series = ",".join(f'{label}="{value}"' for label, value in labels.items())
                found = steps.setdefault(f"{family}_%s{{{series}}}", [])
                found.append((float(limit), samples[key]))
    for series, found in steps.items():
        assert found == sorted(set(found))
        assert [count for _, count in found] == sorted(count for _, count in found)
        assert found[-1] == (float("inf"), samples[series % "count"])
        assert samples[series % "sum"] >= 0
    assert len(steps) == text.count("_sum{") > 0
    assert text.startswith("# HELP ")
    assert min(samples.values()) >= 0
    return samples


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
    with Relay(tmp_path, webex.url, **later(tmp_path, 13)) as relay:
        relay.told("limits the bot")
        assert 13 <= metrics(relay)['oldest_waiting_seconds{room="/"}'] / 3600 < 14
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


LATE_LOOK = """
import time
def look(spool, *given, look=alarmrelay.Spool.oldest_waiting):
    while spool.rooms["/"]["waiting"] and not os.path.exists(os.environ["GO"]): time.sleep(0.01)
    return look(spool, *given)
alarmrelay.Spool.oldest_waiting = look
"""


def test_an_alarm_is_not_old_before_the_first_look_at_it(tmp_path, webex):
    go = tmp_path / "go"
    with Relay(tmp_path, webex.url, limits=FAST, fault=LATE_LOOK, GO=str(go)) as relay:
        relay.post({"message": "x"})
        age_s = metrics(relay)['oldest_waiting_seconds{room="/"}']
        go.touch()
        relay.told("0 waiting, 1 delivered")
    assert 0 <= age_s < 60


def test_every_metric_is_there_from_the_start_at_zero(tmp_path, webex):
    before = time.time()
    with Relay(tmp_path, webex.url, **three_rooms(webex)) as relay:
        found = metrics(relay)
    assert before <= found.pop("process_start_time_seconds") <= time.time()
    assert found.pop(f'build_info{{version="{__version__}"}}') == 1
    codes = {*re.findall(r"Refused\(\s*(\d{3})\b", PROGRAM.read_text()), "200"}
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


def test_the_numbers_of_a_story_are_right(tmp_path, webex):
    limits, release = {**FAST, "HOLD_S": 0.1}, threading.Event()
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
        webex.faults.extend([Fault(status=400), Fault(status=400), Fault(reset_before=True)])
        relay.post({"message": "h"}, "/noc")
        relay.told("0 waiting, 19 delivered")
        found = metrics(relay)
    assert found['delivery_seconds_sum{room="/"}'] >= 0.1  # one was held so long
    expected = dict.fromkeys(found, 0.0)
    for name in ("alarms_accepted_total", "alarms_delivered_total", "delivery_seconds_count"):
        numbers = {"/": 6, "/ops": 12, "/noc": 1}
        expected.update({f'{name}{{room="{room}"}}': n for room, n in numbers.items()})
    numbers = {"/": 6, "/ops": 1, "/noc": 1}
    expected.update({f'messages_delivered_total{{room="{r}"}}': n for r, n in numbers.items()})
    for reason in ('/",reason="held', '/ops",reason="paused', '/noc",reason="refused'):
        expected[f'delivery_failures_total{{room="{reason}"}}'] = 1
    expected['delivery_failures_total{room="/noc",reason="failed"}'] = 1
    expected['duplicates_total{room="/"}'] = 1
    expected.update({f'requests_total{{code="{c}"}}': n for c, n in ((200, 8), (400, 1), (401, 1))})
    other = ("build_info", "process_start", "delivery_seconds_bucket", "delivery_seconds_sum")
    found = {key: n for key, n in found.items() if not key.startswith(other)}
    assert found == {key: n for key, n in expected.items() if not key.startswith(other)}


def test_no_count_goes_back_while_alarms_come_in(relay, webex):
    done, posted, scrapes = threading.Event(), [0] * 8, list[dict[str, float]]()
    accepted = 'alarms_accepted_total{room="/"}'

    def post(client: int) -> None:
        connection = relay.connect()
        while not done.is_set():
            body = {"message": f"number {client} {posted[client]}"}
            posted[client] += relay.post(body, connection=connection)[0] == 200
        connection.close()

    threads = [threading.Thread(target=post, args=[client]) for client in range(8)]
    for thread in threads:
        thread.start()
    while len(scrapes) < 100 or len({scrape[accepted] for scrape in scrapes}) < 10:
        scrapes.append(metrics(relay))
    done.set()
    for thread in threads:
        thread.join()
    relay.told(f"0 waiting, {sum(posted)} delivered")
    scrapes.append(last := metrics(relay))
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
        text, command = get(relay, "/metrics")[2], ["promtool", "check", "metrics"]
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
