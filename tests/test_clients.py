"""Clients as they are deliver alarms: curl, Java, Node and Python."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from harness import PASSWORD, USERNAME, alarm, basic
from webex_standin import WebexStandIn

FIRST, AGAIN = '{"status": "accepted"}', '{"status": "duplicate"}'


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Two alarms, a small and a large one."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(alarm())
    large.write_bytes(alarm(500_000))
    return [small, large]


@pytest.fixture
def url(lasting_relay) -> str:
    return f"http://127.0.0.1:{lasting_relay.port}/"


def assert_delivered(webex: WebexStandIn, *bodies: bytes) -> None:
    webex.wait_for_texts(*[json.loads(body)["message"] for body in bodies])


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")


def run(*command: str, **options) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs("curl")
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
def test_curl_delivers(url, lasting_webex, files, options):
    command = ["curl", "-sS", "--fail-with-body", "-u", f"{USERNAME}:{PASSWORD}", url]
    for path in files:
        words = [option.replace("FILE", str(path)) for option in options]
        with path.open("rb") as stream:
            assert run(*command, *words, stdin=stream) == FIRST
        assert_delivered(lasting_webex, path.read_bytes())


@needs("curl")
def test_an_empty_post_by_curl_is_told_what_it_is(url):
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
def test_java_which_sends_credentials_only_when_asked_delivers(
    url, lasting_relay, lasting_webex, tmp_path, files
):
    program = tmp_path / "Client.java"
    program.write_text(JAVA)
    words = [url, USERNAME, PASSWORD, ",".join(map(str, files))]
    lines = run("java", str(program), *words).splitlines()
    assert lines == [f"200 {word}" for word in [FIRST, AGAIN, AGAIN, AGAIN] * 2]
    assert_delivered(lasting_webex, *[path.read_bytes() for path in files])
    assert "refused: 401 no credentials" in lasting_relay.log()


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
def test_nodes_fetch_delivers(url, lasting_webex, tmp_path, files):
    program = tmp_path / "client.js"
    program.write_text(NODE)
    lines = run("node", str(program), url, basic(), *map(str, files)).splitlines()
    assert lines == [f"200 {FIRST}"] * 2
    assert_delivered(lasting_webex, *[path.read_bytes() for path in files])


def test_pythons_http_client_delivers_many_on_one_connection(lasting_relay, lasting_webex):
    bodies = [alarm() for _ in range(20)]
    used = set()
    with contextlib.closing(lasting_relay.connect()) as connection:
        for body in bodies:
            answer = lasting_relay.post(body, connection=connection)
            assert answer == (200, {"status": "accepted"})
            used.add(connection.sock.getsockname())
    assert len(used) == 1
    assert_delivered(lasting_webex, *bodies)
