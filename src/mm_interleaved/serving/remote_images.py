"""Images from other servers: only from hosts on a list, and never from a private network.

A name is resolved once; every address that it has must be public; the connection goes to one of those
addresses, not to the name, so that no second answer of the name server counts. Redirects are followed by
hand, each checked like the first. No proxy, no cookies, no compression, no credentials.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore2

from mm_interleaved.errors import escape
from mm_interleaved.serving.errors import ApiError, bad_request
from mm_interleaved.serving.settings import ServerSettings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
_EMBEDDED = (
    ipaddress.ip_network("64:ff9b::/96"),  # NAT64
    ipaddress.ip_network("64:ff9b:1::/48"),
    ipaddress.ip_network("2002::/16"),  # 6to4
    ipaddress.ip_network("2001::/32"),  # Teredo
    ipaddress.ip_network("::/96"),  # IPv4-compatible
)
"""Networks whose addresses stand for IPv4 addresses, which may be private ones."""


class RefusedAddressError(Exception):
    """An address that is not fetched, and why."""


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet at large."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None or any(address in network for network in _EMBEDDED):
            return False
        if address.is_site_local:
            return False
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified or address.is_loopback
    )


async def public_addresses(host: str, port: int) -> list[str]:
    """The addresses of a host, asked for once. Raises RefusedAddressError if any of them is not public."""
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise RefusedAddressError("the host has no address") from error
    found = list(dict.fromkeys(str(info[4][0]) for info in infos))
    if not found or not all(is_public(ipaddress.ip_address(each.partition("%")[0])) for each in found):
        raise RefusedAddressError("the host has an address in a private network")
    return found


class PublicOnly(httpcore2.AsyncNetworkBackend):
    """Connects to public addresses alone, whatever name is asked for."""

    def __init__(self) -> None:
        self._backend = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        [address, *_] = await public_addresses(host, port)
        return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class RemoteImages:
    """Fetches images by address, as far as the server's settings allow.

    Args:
        backend: what makes connections.
    """

    def __init__(self, settings: ServerSettings, backend: httpcore2.AsyncNetworkBackend | None = None):
        self._hosts = frozenset(host.lower() for host in settings.remote_hosts)
        self._ports, self._limits = settings.remote_ports, settings.limits
        self._backend = backend or PublicOnly()

    async def fetch(self, url: str, param: str) -> bytes:
        """The bytes at an address.

        Raises:
            ApiError: 400 where it is refused or gives no image's bytes, 504 where it takes too long.
        """
        try:
            async with asyncio.timeout(self._limits.remote_seconds):
                return await self._follow(url)
        except RefusedAddressError as error:
            raise bad_request(param, f"found the address {escape(url, 60)!r}: {error}") from error
        except (TimeoutError, httpcore2.TimeoutException) as error:
            raise ApiError(
                504,
                f"{param}: the image did not come within {self._limits.remote_seconds:g} seconds",
                param=param,
            ) from error
        except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
            raise bad_request(param, "the image could not be fetched") from error

    async def _follow(self, url: str) -> bytes:
        for _ in range(self._limits.redirects + 1):
            place = self._checked(url)
            found = await self._get(place)
            if isinstance(found, bytes):
                return found
            url = urljoin(place.geturl(), found)
        raise RefusedAddressError(f"more than {self._limits.redirects} redirects")

    def _checked(self, url: str) -> SplitResult:
        """An address that may be asked. Raises RefusedAddressError."""
        if not url.isascii() or any(c.isspace() or not c.isprintable() for c in url) or "\\" in url:
            raise RefusedAddressError("expected plain ASCII without blanks and backslashes")
        try:
            place = urlsplit(url)
            port = place.port
        except ValueError as error:
            raise RefusedAddressError("not an address") from error
        if not self._hosts:
            raise RefusedAddressError("this server fetches nothing, expected a data: URL")
        if place.scheme not in _PORTS:
            raise RefusedAddressError("expected http or https, or a data: URL")
        if place.username is not None or place.password is not None or "@" in place.netloc:
            raise RefusedAddressError("expected no user name")
        host = place.hostname or ""
        if host not in self._hosts:
            raise RefusedAddressError("its host is not among those that this server may ask")
        if (port or _PORTS[place.scheme]) not in self._ports:
            raise RefusedAddressError(f"expected one of the ports {', '.join(map(str, self._ports))}")
        return place

    async def _get(self, place: SplitResult) -> bytes | str:
        """The bytes, or where else to look."""
        target = f"{place.path or '/'}{f'?{place.query}' if place.query else ''}"
        url = httpcore2.URL(scheme=place.scheme, host=place.hostname or "", port=place.port, target=target)
        headers = [
            ("Host", place.netloc),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", "mm-interleaved"),
        ]
        seconds = dict.fromkeys(("connect", "read", "write", "pool"), self._limits.remote_seconds)
        pool = httpcore2.AsyncConnectionPool(
            network_backend=self._backend, max_connections=1, http1=True, http2=False
        )
        async with (
            pool,
            pool.stream("GET", url, headers=headers, extensions={"timeout": seconds}) as response,
        ):
            named = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in named:
                return named[b"location"]
            if response.status != 200:
                raise RefusedAddressError(f"its server answered {response.status}")
            if named.get(b"content-encoding", "identity") != "identity":
                raise RefusedAddressError("its server sent compressed data")
            return await self._read(response)

    async def _read(self, response: httpcore2.Response) -> bytes:
        found = bytearray()
        async for chunk in response.aiter_stream():
            found += chunk
            if len(found) > self._limits.remote_bytes:
                raise RefusedAddressError(f"more than {self._limits.remote_bytes} bytes")
        return bytes(found)


def checked_hosts(hosts: Sequence[str]) -> tuple[str, ...]:
    """Host names for the list of allowed ones, as they are compared. Raises ValueError for what is none."""
    for host in hosts:
        if not host or not host.isascii() or any(c in "/:@\\*? " for c in host):
            raise ValueError(f"{escape(host)!r}: expected the name of a host, such as images.example.org")
    return tuple(host.lower() for host in hosts)
