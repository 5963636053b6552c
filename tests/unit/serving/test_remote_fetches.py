"""Images from other servers: a canary on this machine must never see a connection."""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
import time

import pytest

from mm_interleaved.serving.errors import ApiError
from mm_interleaved.serving.remote_images import PublicOnly, RemoteImages, checked_hosts, is_public
from mm_interleaved.serving.settings import Limits, ServerSettings
from serving_requests import chat, data_url, error
from stub_serving import running_server

PNG = base64.b64decode(data_url().partition(",")[2])
HOST = "images.example"


class Canary:
    """Counts connections; answers each as it is told, or closes it."""

    def __init__(self):
        self.hits, self.answer = 0, None
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.hits += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection:
            try:
                asked = connection.recv(65536)
                if self.answer is not None:
                    self.answer(connection, asked)
            except OSError:
                pass

    def close(self):
        self._socket.close()


@pytest.fixture
def canary():
    found = Canary()
    yield found
    found.close()


@pytest.fixture
def names(monkeypatch):
    """What names resolve to, each time that they are asked for; literal addresses are themselves."""
    table: dict[str, list[list[str]]] = {}
    asked: list[str] = []
    real = asyncio.base_events.BaseEventLoop.getaddrinfo

    async def getaddrinfo(self, host, port, **more):
        if host not in table:
            return await real(self, host, port, **more)
        asked.append(host)
        answers = table[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", getaddrinfo)
    table["asked"] = asked
    return table


class ToCanary(PublicOnly):
    """As the real one, with one address that counts as public and leads to the canary."""

    PUBLIC = "93.184.216.34"

    def __init__(self, canary):
        super().__init__()
        self.canary, self.connected = canary, []

    async def connect_tcp(self, host, port, *arguments, **named):
        from mm_interleaved.serving.remote_images import public_addresses

        addresses = await public_addresses(host, port)
        self.connected.append(addresses[0])
        return await self._backend.connect_tcp("127.0.0.1", self.canary.port)


def settings(*hosts, ports=(80, 443), **limits):
    return ServerSettings(remote_hosts=checked_hosts(hosts), remote_ports=ports, limits=Limits(**limits))


def fetch(url, found, backend=None):
    return asyncio.run(RemoteImages(found, backend).fetch(url, "here"))


SPELLINGS = [
    "127.0.0.1",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "[::1]",
    "0",
    "0.0.0.0",
    "[::]",
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0177.0.0.1",
    "017700000001",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "[2001:0:7f00:1::]",
    "169.254.169.254",
    "[fd00::1]",
    "[fe80::1]",
    "[fec0::1]",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "100.64.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "\u0661\u0662\u0667.0.0.1",
    "\uff11\uff12\uff17.0.0.1",
    "\u2460\u2461\u2466.0.0.1",
    "127\u30020\u30020\u30021",
    "images.example@127.0.0.1",
    "images.example\\@127.0.0.1",
    "images.example#@127.0.0.1",
    "images.example:80@127.0.0.1",
    "images.example.evil.tld",
    "evilimages.example",
    "images.example%00.evil.tld",
    "images.example\t.evil.tld",
    "images.example.",
    " 127.0.0.1",
    "127.0.0.1%25lo",
    "metadata.google.internal",
    "a.b@images.example",
]
"""Hosts that are not on the list, whatever they look like."""


def test_no_spelling_of_this_machine_is_connected_to(canary):
    """With all of them on the server, remote images on, and the canary's port allowed."""
    found = settings(HOST, ports=(canary.port, 80, 443))
    with running_server(found) as running:
        import httpx2

        with httpx2.Client(base_url=running.url) as client:
            for scheme in ("http", "https"):
                for host in SPELLINGS:
                    url = f"{scheme}://{host}:{canary.port}/x.png"
                    content = [{"type": "image_url", "image_url": {"url": url}}]
                    answer = chat(client, messages=[{"role": "user", "content": content}])
                    assert error(answer)["param"] == "messages.0.content.0.image_url.url", url
    assert canary.hits == 0


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "10.0.0.1"]
)
def test_a_private_address_is_refused_also_where_its_name_is_on_the_list(canary, host):
    with pytest.raises(ApiError, match=r"private network|no address"):
        fetch(f"http://{host}:{canary.port}/x.png", settings(host, ports=(canary.port,)))
    assert canary.hits == 0


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "ftp://images.example/x",
        "gopher://images.example/x",
        "//images.example/x.png",
        "/etc/passwd",
        "images.example/x.png",
        "http:images.example",
        "http:///x.png",
        "javascript:alert(1)",
        "http://images.example:22/x.png",
        "http://images.example:99999/",
        "http://images.example:-1/",
        "https://images.example:8443/",
        "http://[images.example/",
        "http://images.example/\r\nX: y",
        "http://images.example/ x",
        "HTTP://evil.tld/images.example",
    ],
)
def test_addresses_that_are_none_are_not_asked(canary, names, url):
    names[HOST] = [["127.0.0.1"]]
    with pytest.raises(ApiError) as caught:
        fetch(url, settings(HOST), ToCanary(canary))
    assert caught.value.status == 400 and caught.value.param == "here"
    assert canary.hits == 0 and names["asked"] == []


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["10.1.2.3"], ["::1"], ["fd00::1"], [ToCanary.PUBLIC, "127.0.0.1"], ["::ffff:10.0.0.1"]],
)
def test_a_name_with_any_private_address_is_refused(canary, names, addresses):
    names[HOST] = [addresses]
    with pytest.raises(ApiError, match="private network"):
        fetch(f"http://{HOST}/x.png", settings(HOST), ToCanary(canary))
    assert canary.hits == 0


def test_a_name_is_resolved_once_and_the_checked_address_connected_to(canary, names):
    names[HOST] = [[ToCanary.PUBLIC], ["127.0.0.1"]]
    canary.answer = lambda connection, asked: connection.sendall(
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG
    )
    backend = ToCanary(canary)
    assert fetch(f"http://{HOST}/x.png", settings(HOST), backend) == PNG
    assert names["asked"] == [HOST] and backend.connected == [ToCanary.PUBLIC]


def test_the_real_backend_connects_to_an_address_not_to_a_name(names, monkeypatch):
    """The joint: httpcore2 hands our backend the name, and we hand the next one the address."""
    names[HOST] = [[ToCanary.PUBLIC]]
    seen = []

    class Recorder:
        async def connect_tcp(self, host, port, *arguments, **named):
            seen.append((host, port))
            raise OSError

    backend = PublicOnly()
    backend._backend = Recorder()
    for scheme, port in (("http", 80), ("https", 443)):
        with pytest.raises(ApiError, match="could not be fetched"):
            fetch(f"{scheme}://{HOST}/x.png", settings(HOST), backend)
        assert seen[-1] == (ToCanary.PUBLIC, port)


def redirecting(*targets):
    left = list(targets)

    def answer(connection, asked):
        target = left.pop(0) if left else "/more"
        connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode())

    return answer


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1/x.png",
        "http://localhost/x.png",
        "file:///etc/passwd",
        "http://evil.tld/x.png",
        "//evil.tld/x.png",
        "https://[::1]/x.png",
        "http://images.example:22/x.png",
        "http://user@images.example/x.png",
        "data:image/png;base64,AAAA",
    ],
)
def test_each_redirect_is_checked_again(canary, names, target):
    names[HOST] = [[ToCanary.PUBLIC]]
    canary.answer = redirecting(target)
    with pytest.raises(ApiError) as caught:
        fetch(f"http://{HOST}/x.png", settings(HOST), ToCanary(canary))
    assert caught.value.status == 400 and canary.hits == 1


def test_a_redirect_to_a_name_that_became_private_is_refused(canary, names):
    names[HOST] = [[ToCanary.PUBLIC], ["127.0.0.1"]]
    canary.answer = redirecting("/y.png")
    with pytest.raises(ApiError, match="private network"):
        fetch(f"http://{HOST}/x.png", settings(HOST), ToCanary(canary))
    assert canary.hits == 1


def test_relative_redirects_are_followed_a_few_times_and_no_more(canary, names):
    names[HOST] = [[ToCanary.PUBLIC]]
    canary.answer = redirecting()
    with pytest.raises(ApiError, match="more than 3 redirects"):
        fetch(f"http://{HOST}/x.png", settings(HOST), ToCanary(canary))
    assert canary.hits == 4


def drip(connection, asked):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(100):
        connection.sendall(b"x")
        time.sleep(0.05)


def endless(connection, asked):
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"x" * 65536)


def says(head, body=b""):
    return lambda connection, asked: connection.sendall(b"HTTP/1.1 " + head + b"\r\n\r\n" + body)


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (drip, 504, "did not come within"),
        (lambda connection, asked: time.sleep(2), 504, "did not come within"),
        (endless, 400, "more than 100000 bytes"),
        (says(b"200 OK\r\nContent-Length: 999", PNG), 400, "could not be fetched"),
        (says(b"200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3", b"abc"), 400, "compressed"),
        (says(b"404 Not Found\r\nContent-Length: 0"), 400, "answered 404"),
        (says(b"500 Oops\r\nContent-Length: 0"), 400, "answered 500"),
        (says(b"302 Found\r\nContent-Length: 0"), 400, "answered 302"),
        (lambda connection, asked: connection.sendall(b"SSH-2.0-OpenSSH\r\n"), 400, "could not be fetched"),
        (lambda connection, asked: None, 400, "could not be fetched"),
    ],
)
def test_servers_that_misbehave_cost_a_bounded_time_and_memory(canary, names, answer, status, words):
    names[HOST] = [[ToCanary.PUBLIC]]
    canary.answer = answer
    began = time.monotonic()
    with pytest.raises(ApiError, match=words) as caught:
        fetch(
            f"http://{HOST}/x.png", settings(HOST, remote_seconds=0.5, remote_bytes=100_000), ToCanary(canary)
        )
    assert caught.value.status == status and time.monotonic() - began < 2


def test_what_was_fetched_is_an_image_or_refused(canary, names):
    names[HOST] = [[ToCanary.PUBLIC]]
    body = b"<html>secret</html>"
    canary.answer = says(b"200 OK\r\nContent-Type: image/png\r\nContent-Length: %d" % len(body), body)
    from mm_interleaved.serving.content import Content, GivenImage
    from mm_interleaved.serving.files_store import FilesStore

    found = settings(HOST)
    content = Content(found, FilesStore(found.limits), RemoteImages(found, ToCanary(canary)))
    given = [GivenImage(f"http://{HOST}/x.png", "user", "here")]
    with pytest.raises(ApiError, match="HTML page") as caught:
        asyncio.run(content.document("x", given, roles=True, param="messages"))
    assert "secret" not in str(caught.value)
    canary.answer = says(b"200 OK\r\nContent-Length: %d" % len(PNG), PNG)
    document = asyncio.run(content.document("x", given, roles=True, param="messages"))
    assert document.images[0].load().size == (20, 10)


def test_a_request_carries_nothing_of_ours(canary, names):
    names[HOST] = [[ToCanary.PUBLIC]]
    seen = []

    def answer(connection, asked):
        seen.append(asked)
        says(b"200 OK\r\nContent-Length: 1", b"x")(connection, asked)

    canary.answer = answer
    fetch(f"http://{HOST}/a%20b?c=d#e", settings(HOST), ToCanary(canary))
    lines = seen[0].decode().split("\r\n")
    assert lines[0] == "GET /a%20b?c=d HTTP/1.1" and f"Host: {HOST}" in lines
    assert not [line for line in lines if line.lower().startswith(("cookie", "authorization", "referer"))]


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111"])
def test_the_internet_at_large_is_public(address):
    import ipaddress

    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host", ["", "a b", "http://a", "a/b", "*.example", "user@a", "a:80", "\u00e9.example"]
)
def test_the_list_holds_names_of_hosts(host):
    with pytest.raises(ValueError, match="expected the name of a host"):
        checked_hosts([host])
