"""The status page in a browser: what is seen of it, and that alarm text stays text."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any, Callable

import pytest
from harness import PASSWORD, PAYLOADS, USERNAME, Relay
from page import sentence
from webex_standin import OPS, PAUSED, WebexStandIn, three_rooms

CHROMIUM = shutil.which("chromium") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
SCREENSHOTS = Path(__file__).resolve().parent / "screenshots"
SIZES = {1280: 900, 390: 844}  # widths and heights, of a desk and of a phone
HOSTILE = """<script>document.title="x"</script><img src=x onerror='document.title="y"'>"""
ALARMS = [json.loads(path.read_bytes()) for path in sorted(PAYLOADS.glob("*.json"))]
ALARMS.append({**ALARMS[-1], "message": HOSTILE, "rule_name_display": HOSTILE})
LOOK = """(() => {
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.backgroundColor = "Canvas";
  const CANVAS = getComputedStyle(probe).backgroundColor;
  probe.remove();
  const look = element => {
    const styles = [];
    for (let at = element; at; at = at.parentElement) styles.push(getComputedStyle(at));
    const grounds = styles.map(style => style.backgroundColor);
    const opacities = styles.map(style => style.opacity);
    return {kind: element.className, text: element.innerText, color: styles[0].color,
            grounds: [...grounds, CANVAS], opacities};
  };
  const all = selector => [...document.querySelectorAll(selector)];
  return {
    title: document.title, width: document.documentElement.scrollWidth,
    active: all("script, img, link, iframe, object").length,
    h1: all("h1").map(look), cells: all("td").map(look),
    messages: all(".alarms tr").map(row => row.cells[3].innerText),
  };
})()"""


class Browser:
    """Headless Chromium, which takes commands from a pipe; chromedevtools.github.io."""

    def __init__(self, profile: Path) -> None:
        flags = ["--headless", "--no-sandbox", "--remote-debugging-pipe", "--hide-scrollbars"]
        command = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >&2', "sh", CHROMIUM, *flags]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.numbers = itertools.count(1)
        self.left = b""  # of what it has said, not looked at yet
        self.events: list[dict[str, Any]] = []
        self.session: dict[str, Any] = {}
        target = self.call("Target.createTarget", url="about:blank")
        self.session = self.call("Target.attachToTarget", **target, flatten=True)
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self.session = {}
        self.call("Browser.close")
        self.process.communicate(timeout=30)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Give a command and return its result."""
        number = next(self.numbers)
        command = {"id": number, "method": method, "params": parameters, **self.session}
        os.write(self.process.stdin.fileno(), json.dumps(command).encode() + b"\0")
        answer = self.wait_for(lambda message: message.get("id") == number)
        assert "result" in answer, f"{method}: {answer}"
        return answer["result"]

    def wait_for(self, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the first message that is it; those before it are events."""
        while True:
            while b"\0" not in self.left:
                assert select.select([self.process.stdout], [], [], 60)[0], "chromium is silent"
                block = os.read(self.process.stdout.fileno(), 2**20)
                assert block, "chromium has ended"
                self.left += block
            text, _, self.left = self.left.partition(b"\0")
            if is_it(message := json.loads(text)):
                return message
            self.events.append(message)

    def load(self, url: str) -> None:
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait_for(lambda message: message.get("method") == "Page.loadEventFired")
        self.call("Page.stopLoading")  # it is not to refresh itself meanwhile

    def look(self, width: int, scheme: str, picture: Path) -> dict[str, Any]:
        """Return what LOOK finds at this width in light or dark, and take a picture."""
        size = {"width": width, "height": SIZES[width], "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", **size, mobile=width < 600)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        picture.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
        found = self.call("Runtime.evaluate", expression=LOOK, returnByValue=True)
        return found["result"]["value"]


@dataclasses.dataclass
class View:
    """A state's page as the browser showed it."""

    state: str
    url: str
    said: str  # to systemd
    looks: dict[tuple[int, str], dict[str, Any]]  # by width and colour scheme
    events: list[dict[str, Any]]

    def of(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]


def healthy(relay: Relay, webex: WebexStandIn) -> str:
    relay.post(ALARMS)
    relay.post(ALARMS[:4], "/ops")
    relay.wait_for_log(" delivered: ", len(ALARMS) + 4)
    return relay.told(f"0 waiting, {len(ALARMS) + 4} delivered")


def held(relay: Relay, webex: WebexStandIn) -> str:
    relay.post(ALARMS[:-3])
    relay.wait_for_log(" delivered: ", len(ALARMS) - 3)
    webex.token = "another"
    relay.post(ALARMS[-3:])
    return relay.told("refuses the token (401 ")


def storm(relay: Relay, webex: WebexStandIn) -> str:
    webex.fault_for = lambda request: PAUSED if request["content"]["roomId"] != OPS else None
    for number in range(12):
        relay.post([{**alarm, "uuid": f"storm {number}"} for alarm in ALARMS])
    return relay.told(f"{12 * len(ALARMS)} alarms wait for room /: Webex limits the bot (429 ")


STATES = {"healthy": healthy, "held": held, "storm": storm}
KINDS = {"healthy": "good", "held": "bad", "storm": "late"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module", params=STATES)
def view(request, browser, tmp_path_factory):
    SCREENSHOTS.mkdir(exist_ok=True)
    state = request.param
    looks = {}
    folder = tmp_path_factory.mktemp(state)
    with WebexStandIn() as webex, Relay(folder, webex.url, **three_rooms(webex)) as relay:
        said = STATES[state](relay, webex)
        url = f"127.0.0.1:{relay.port}/"
        browser.load(f"http://{USERNAME}:{urllib.parse.quote(PASSWORD)}@{url}")
        for width, scheme in itertools.product(SIZES, ("light", "dark")):
            picture = SCREENSHOTS / f"{state}-{width}-{scheme}.png"
            looks[width, scheme] = browser.look(width, scheme, picture)
    return View(state, f"http://{url}", said, looks, [*browser.events])


def parse_color(text: str) -> list[float]:
    """Return red, green and blue, from 0 to 1, of a colour that covers what is behind it."""
    match = re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", text)
    assert match, text
    return [int(number) / 255 for number in match.groups()]


def ground_of(element: dict[str, Any]) -> list[float]:
    """Return the colour behind the text of an element: the first that is not transparent."""
    assert set(element["opacities"]) == {"1"}
    return parse_color(next(text for text in element["grounds"] if text != "rgba(0, 0, 0, 0)"))


def luminance(color: list[float]) -> float:
    """Return it as in WCAG 2, from 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return sum(c * weight for c, weight in zip(linear, (0.2126, 0.7152, 0.0722)))


def text_and_ground(element: dict[str, Any]) -> tuple[float, float]:
    """Return how bright an element's text is, and what is behind it."""
    return luminance(parse_color(element["color"])), luminance(ground_of(element))


def test_the_verdict_is_at_the_top_in_words_and_colour(view):
    for look in view.looks.values():
        (h1,) = look["h1"]
        assert h1["kind"] == KINDS[view.state]
        assert sentence(h1["text"]) == sentence(view.said)
        red, green, _ = ground_of(h1)
        looks_like = {
            "good": green > 2 * red,
            "bad": red > 2 * green,
            "late": 2 * green > red > green,
        }
        assert looks_like[h1["kind"]]


def test_nothing_has_to_be_scrolled_sideways(view):
    for (width, _), look in view.looks.items():
        assert look["width"] <= width


def test_all_text_can_be_read_in_light_and_dark(view):
    for look in view.looks.values():
        for element in look["h1"] + look["cells"]:
            bright, dark = sorted(text_and_ground(element), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, element


def test_the_page_is_dark_where_that_is_preferred(view):
    for width in SIZES:
        light = view.looks[width, "light"]["cells"]
        dark = view.looks[width, "dark"]["cells"]
        for one, other in zip(light, dark):
            text, ground = text_and_ground(one)
            dark_text, dark_ground = text_and_ground(other)
            assert text < dark_text
            assert ground > 0.5 > dark_ground


def test_alarm_text_is_shown_and_does_nothing(view):
    for look in view.looks.values():
        assert look["active"] == 0
        assert look["title"] not in ("x", "y")
        shown = next(text for text in look["messages"] if text.startswith("<script>"))
        assert HOSTILE.startswith(shown)
        assert "<img src=x" in shown


def test_no_request_leaves_but_for_the_page(view):
    urls = [event["request"]["url"] for event in view.of("Network.requestWillBeSent")]
    asked = {re.sub("//.*@", "//", url) for url in urls}
    assert asked - {f"{view.url}favicon.ico"} == {view.url}


def test_the_browser_has_nothing_to_complain_of(view):
    kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for kind in kinds for event in view.of(kind)] == []
