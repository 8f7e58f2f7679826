"""Clients as they are: curl, Java, Node and Python."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import time

import pytest
from harness import PASSWORD, USERNAME, Relay, basic
from webex_standin import WebexStandIn


@pytest.fixture(scope="module")
def webex():
    with WebexStandIn() as standin:
        yield standin


@pytest.fixture(scope="module")
def relay(tmp_path_factory, webex):
    with Relay(tmp_path_factory.mktemp("clients"), webex.url) as running:
        yield running


def alarm(size: int = 0) -> bytes:
    """Return an alarm like no other, and larger than this."""
    alarm = {"message": f"number {time.monotonic_ns()}", "consumed_events": ["x" * size]}
    return json.dumps(alarm).encode()


def is_delivered(webex: WebexStandIn, body: bytes) -> bool:
    return any(json.loads(body)["message"] in text for text in webex.texts())


BIG = 500_000


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")


def run(*command: str, **options) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs("curl")
@pytest.mark.parametrize("size", [0, BIG])
@pytest.mark.parametrize(
    "options",
    [
        ["--data-binary", "@FILE"],
        ["--data-binary", "@FILE", "--anyauth"],
        ["--data-binary", "@FILE", "--http1.0"],
        ["--data-binary", "@FILE", "--http2"],
        ["-X", "POST", "-T", "-"],  # chunked
        # Java and curl ask for "100 Continue" first; here even for a small body, and for long.
        ["--data-binary", "@FILE", "-H", "Expect: 100-continue", "--expect100-timeout", "60"],
    ],
    ids=lambda options: " ".join(options),
)
def test_curl_delivers(relay, webex, tmp_path, options, size):
    path, body = tmp_path / "alarm.json", alarm(size)
    path.write_bytes(body)
    url = f"http://127.0.0.1:{relay.port}/"
    command = ["curl", "-sS", "--fail-with-body", "-u", f"{USERNAME}:{PASSWORD}"]
    options = [option.replace("FILE", str(path)) for option in options]
    with path.open("rb") as stream:
        assert run(*command, *options, url, stdin=stream) == '{"status": "accepted"}'
    webex.wait_for(lambda: is_delivered(webex, body))


@needs("curl")
def test_an_empty_post_by_curl_is_told_what_it_is(relay):
    url = f"http://127.0.0.1:{relay.port}/"
    answer = run("curl", "-sS", "-u", f"{USERNAME}:{PASSWORD}", "-X", "POST", url)
    assert answer.startswith('{"error": "the relay is reached, but ')
    assert run("curl", "-sS", "-X", "POST", url) == '{"error": "no credentials"}'


JAVA = """
import java.io.ByteArrayInputStream;
import java.net.*;
import java.net.http.*;
import java.net.http.HttpRequest.*;
import java.nio.file.*;

class Client {
    public static void main(String[] words) throws Exception {
        var credentials = new PasswordAuthentication(words[1], words[2].toCharArray());
        var client = HttpClient.newBuilder().authenticator(new Authenticator() {
            protected PasswordAuthentication getPasswordAuthentication() { return credentials; }
        }).build();
        for (var name : words[3].split(",")) {
            var body = Files.readAllBytes(Path.of(name));
            for (var publisher : new BodyPublisher[] {
                BodyPublishers.ofByteArray(body),
                BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(body)),  // chunked
            }) {
                for (var expect : new boolean[] {false, true}) {
                    var request = HttpRequest.newBuilder(URI.create(words[0]))
                        .POST(publisher).expectContinue(expect).build();
                    var answer = client.send(request, HttpResponse.BodyHandlers.ofString());
                    System.out.println(answer.statusCode() + " " + answer.body());
                }
            }
        }
    }
}
"""


@needs("java")
def test_java_which_sends_credentials_only_when_asked_delivers(relay, webex, tmp_path):
    program, small, big = (tmp_path / name for name in ("Client.java", "small", "big"))
    program.write_text(JAVA)
    small.write_bytes(alarm())
    big.write_bytes(alarm(BIG))
    url = f"http://127.0.0.1:{relay.port}/"
    lines = run("java", str(program), url, USERNAME, PASSWORD, f"{small},{big}").splitlines()
    first, again = '200 {"status": "accepted"}', '200 {"status": "duplicate"}'
    assert lines == [first, again, again, again] * 2
    webex.wait_for(lambda: is_delivered(webex, small.read_bytes()))
    webex.wait_for(lambda: is_delivered(webex, big.read_bytes()))
    assert "refused: 401 no credentials" in relay.log()


NODE = """
const [url, authorization, ...names] = process.argv.slice(2);
(async () => {
  for (const name of names) {
    const body = require('fs').readFileSync(name);
    const answer = await fetch(url, {method: 'POST', headers: {authorization}, body});
    console.log(answer.status + ' ' + await answer.text());
  }
})();
"""


@needs("node")
def test_nodes_fetch_delivers(relay, webex, tmp_path):
    program, small, big = (tmp_path / name for name in ("client.js", "small", "big"))
    program.write_text(NODE)
    small.write_bytes(alarm())
    big.write_bytes(alarm(BIG))
    url = f"http://127.0.0.1:{relay.port}/"
    lines = run("node", str(program), url, basic(), str(small), str(big)).splitlines()
    assert lines == ['200 {"status": "accepted"}'] * 2
    webex.wait_for(lambda: is_delivered(webex, small.read_bytes()))
    webex.wait_for(lambda: is_delivered(webex, big.read_bytes()))


def test_pythons_http_client_delivers_many_on_one_connection(relay: Relay, webex):
    connection = http.client.HTTPConnection("127.0.0.1", relay.port, timeout=20)
    used = set()
    bodies = [alarm() for _ in range(20)]
    for body in bodies:
        connection.request("POST", "/", body, {"Authorization": basic()})
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b'{"status": "accepted"}')
        used.add(connection.sock.getsockname())
    connection.close()
    assert len(used) == 1
    webex.wait_for(lambda: all(is_delivered(webex, body) for body in bodies))
