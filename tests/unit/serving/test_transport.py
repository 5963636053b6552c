"""Below the requests: sizes, smuggling, keys on every route, names of hosts, origins of pages."""

from __future__ import annotations

import json
import socket

import httpx2
import pytest

from mm_interleaved.serving.http_server import listening_socket
from mm_interleaved.serving.settings import Limits, ServerSettings
from serving_requests import chat, error
from stub_serving import StubAdmission, StubEngine, raw, running_server

PATH = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def small():
    """A server whose bodies may have 10,000 bytes."""
    with running_server(ServerSettings(limits=Limits(body_bytes=10_000))) as running:
        yield running


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def is_closed(answer: bytes) -> bool:
    return not answer.endswith(b"<still open>")


def test_a_body_that_says_to_be_too_long_is_refused_before_it_comes(small):
    answer = raw(small.port, HEAD + b"Expect: 100-continue\r\nContent-Length: 10001\r\n\r\n")
    assert status(answer) == 413 and is_closed(answer) and b"100 Continue" not in answer
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "request_too_large"


def test_a_body_without_length_is_refused_when_it_grows_too_long(small):
    chunk = b"%x\r\n" % 4096 + b" " * 4096 + b"\r\n"
    answer = raw(small.port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 4)
    assert status(answer) == 413 and is_closed(answer)
    # Also where it is still coming, and never ends.
    answer = raw(small.port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3)
    assert status(answer) == 413 and is_closed(answer)


def test_a_whole_body_that_is_too_long_gets_an_answer_not_a_broken_connection(small):
    found = httpx2.post(
        f"{small.url}{PATH}", content=b" " * 500_000, headers={"Content-Type": "application/json"}
    )
    assert error(found, 413)["code"] == "request_too_large" and found.headers["connection"] == "close"


def test_a_body_of_just_the_limit_is_read(small):
    padded = BODY + b" " * (10_000 - len(BODY))
    headers = {"Content-Type": "application/json"}
    assert httpx2.post(f"{small.url}{PATH}", content=padded, headers=headers).status_code == 200
    assert httpx2.post(f"{small.url}{PATH}", content=iter([padded]), headers=headers).status_code == 200


LENGTH = b"Content-Length: %d\r\n" % len(BODY)
SMUGGLED = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + SMUGGLED,
        HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + SMUGGLED,
        HEAD + LENGTH + b"Content-Length: 5\r\n\r\n" + BODY,
        HEAD + b"Content-Length: 5, 6\r\n\r\n" + BODY,
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: +5\r\n\r\n",
        HEAD + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + SMUGGLED,
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n" + SMUGGLED,
        HEAD + b"Transfer-Encoding : chunked\r\n\r\n" + SMUGGLED,
        HEAD + b"X-Long: " + b"a" * 65_536 + b"\r\n\r\n",
        HEAD + b"X: y\r\n" * 10_000 + b"\r\n",
        HEAD + b"Bad Name: x\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",
    ],
)
def test_requests_that_two_servers_could_read_differently_end_the_connection(small, data):
    answer = raw(small.port, data)
    assert status(answer) in (400, 413, 431, 501), answer[:200]
    assert is_closed(answer) and answer.count(b"HTTP/1.1 ") == 1 and b"smuggled" not in answer
    assert httpx2.get(f"{small.url}/health").status_code == 200


def test_expect_100_continue_is_answered(small):
    with socket.create_connection(("127.0.0.1", small.port), 5) as connection:
        connection.sendall(HEAD + LENGTH + b"Expect: 100-continue\r\n\r\n")
        assert b"100 Continue" in connection.recv(1000)
        connection.sendall(BODY)
        assert b"200 OK" in connection.recv(1000)


@pytest.fixture(scope="module")
def locked():
    with running_server(ServerSettings(api_keys=("right-key", "other-key"))) as running:
        yield running


def routes() -> list[tuple[str, str]]:
    """Every route that the application has, whatever it is for."""
    from mm_interleaved.serving.app import create_app

    app = create_app(StubEngine(), ServerSettings(), admission=StubAdmission())
    found = [(method, path) for path, methods in app.openapi()["paths"].items() for method in methods]
    found += [("get", getattr(route, "path", "")) for route in app.routes]
    return sorted({(method.upper(), path) for method, path in found if path})


def test_the_table_of_routes_is_the_documented_one():
    assert {path for _, path in routes()} >= {
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/images/generations",
        "/v1/models",
        "/v1/models/{name}",
        "/metrics",
        "/files/{name}.png",
        "/openapi.json",
        "/health",
        "/ready",
    }


KEYS = (
    None,
    "Bearer wrong",
    "Bearer",
    "Bearer right-key-and-more",
    "Basic right-key",
    "right-key",
    "Bearer \xff",
)


def test_every_route_wants_a_key(locked):
    with httpx2.Client(base_url=locked.url) as client:
        for method, path in [*routes(), ("GET", "/nowhere"), ("GET", "/docs"), ("POST", "/")]:
            path = path.replace("{name:path}", "x").replace("{name}", "x")
            for key in KEYS:
                headers = {} if key is None else {"Authorization": key.encode("latin-1")}
                found = client.request(method, path, headers=headers)
                if path in ("/health", "/ready"):
                    assert found.status_code == 200
                    continue
                assert error(found, 401)["code"] == "invalid_api_key", (method, path, key)
                assert found.headers["www-authenticate"] == "Bearer" and "right-key" not in found.text


@pytest.mark.parametrize("key", ["right-key", "other-key"])
def test_any_of_the_keys_opens(locked, key):
    with httpx2.Client(base_url=locked.url, headers={"Authorization": f"Bearer {key}"}) as client:
        assert chat(client).status_code == 200
        assert client.get("/metrics").status_code == 200
        # Browsers send no key for images: their addresses are keys.
        asked = {"prompt": "a cat", "response_format": "url"}
        address = client.post("/v1/images/generations", json=asked).json()["data"][0]["url"]
    assert httpx2.get(address).status_code == 200
    assert httpx2.get(address.replace(address[-36:-4], "0" * 32)).status_code == 401


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "%2e%2e%2fetc%2fpasswd", "x", "a/b", "\x00", "0" * 32, "ID%0d%0a"]
)
def test_forged_names_of_files_find_nothing(served, name):
    found = raw(
        served.port, f"GET /files/{name}.png HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    )
    assert status(found) in (400, 404) and b"root:" not in found


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST:1", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
        ("", 403),
        ("evil.example:localhost", 403),
    ],
)
def test_a_local_server_answers_to_local_names_only(host, expected):
    from mm_interleaved.serving.auth import LOCAL_NAMES

    with running_server(ServerSettings(allowed_hosts=LOCAL_NAMES)) as running:
        data = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        assert status(raw(running.port, data)) == expected


@pytest.mark.parametrize("origin", ["null", "https://evil.example", "http://127.0.0.1:3000"])
def test_pages_may_read_nothing_unless_they_are_allowed(served, origin):
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    for found in (
        httpx2.options(f"{served.url}{PATH}", headers=asked),
        httpx2.get(f"{served.url}/v1/models", headers={"Origin": origin}),
    ):
        assert not [name for name in found.headers if name.startswith("access-control")]
    with running_server(ServerSettings(cors_origins=("https://good.example",))) as running:
        found = httpx2.get(f"{running.url}/health", headers={"Origin": origin})
        assert "access-control-allow-origin" not in found.headers
        found = httpx2.options(f"{running.url}{PATH}", headers=asked | {"Origin": "https://good.example"})
        assert found.headers["access-control-allow-origin"] == "https://good.example"
        assert "access-control-allow-credentials" not in found.headers
        # What OpenAI's client for browsers adds.
        named = {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang"}
        good = asked | named | {"Origin": "https://good.example"}
        found = httpx2.options(f"{running.url}{PATH}", headers=good)
        assert found.status_code == 200
        assert "x-stainless-lang" in found.headers["access-control-allow-headers"]
        evil = httpx2.options(f"{running.url}{PATH}", headers=asked | named)
        assert evil.status_code == 400 and "access-control-allow-origin" not in evil.headers
        # A page that may read answers may read why there is none, too.
        for refused in (
            httpx2.post(f"{running.url}{PATH}", json={}, headers={"Origin": "https://good.example"}),
            httpx2.get(f"{running.url}/nowhere", headers={"Origin": "https://good.example"}),
        ):
            assert refused.status_code in (400, 404) and refused.json()["error"]["message"]
            assert refused.headers["access-control-allow-origin"] == "https://good.example"


def test_the_address_of_files_is_not_what_a_header_invents(client):
    found = chat(client, answer_format="markdown")
    assert found.status_code == 200
    asked = {"messages": [{"role": "user", "content": "hello"}], "answer_format": "markdown"}
    forged = client.post(PATH, json=asked, headers={"Host": "evil/)<b>", "X-Forwarded-Host": "evil"})
    assert "evil" not in forged.text and "http://127.0.0.1" in forged.text


def test_connections_beyond_the_limit_are_told_so():
    with running_server(ServerSettings(limits=Limits(connections=2))) as running:
        held = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(2)]
        answer = raw(running.port, b"")
        assert status(answer) == 503 and b"Retry-After" in answer and is_closed(answer)
        for each in held:
            each.close()


def test_a_port_that_is_taken_is_told():
    from mm_interleaved.errors import UsageError

    with listening_socket("127.0.0.1", 0) as first, pytest.raises(UsageError, match="cannot listen there"):
        listening_socket("127.0.0.1", first.getsockname()[1])
    with pytest.raises(UsageError, match="cannot listen there"):
        listening_socket("no.such.host.invalid", 0)


def test_uvicorn_still_has_what_we_build_on():
    """The joint: names of uvicorn's protocol and server that ours overrides or reads."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    for name in ("connection_made", "connection_lost", "data_received", "send_400_response"):
        assert callable(vars(H11Protocol)[name])
    assert callable(vars(uvicorn.Server)["handle_exit"])
