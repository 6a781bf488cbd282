"""The settings of a server: one checked value."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass

__all__ = ["Settings", "is_loopback", "seconds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server is run.

    Raises:
        ValueError: a setting is not valid, or the settings would let other machines in without a key.
    """

    host: str = "127.0.0.1"
    """The address to listen on."""
    port: int = 8080
    """0 for a free one."""
    keys: tuple[str, ...] = ()
    """Keys, of which a client must send one; empty if no key is needed."""
    no_auth: bool = False
    """Whether requests from other machines are taken without a key."""
    aliases: tuple[str, ...] = ()
    """Further names of the model; replies show the first of them."""
    queue: int = 64
    """How many requests may wait."""
    timeout: float = 3600.0
    """Seconds after which a request is cancelled."""
    ping: float = 5.0
    """Seconds between comments in a stream, which keep the connection alive."""
    keep_alive: float = math.inf
    """Seconds without a request after which experts leave memory."""
    grace: float = 10.0
    """Seconds that running replies have to end when the server stops."""
    origins: tuple[str, ...] = ()
    """Origins of web pages whose scripts may send requests; "*" for all."""
    hosts: tuple[str, ...] = ()
    """Further host names of the server; kept as `takes_host` compares them."""
    is_strict: bool = False
    """Whether fields that have no effect are refused."""
    has_metrics: bool = False
    """Whether there is a route /metrics."""
    has_page: bool = True
    """Whether there is a page at /, with the routes that it needs."""
    reserved: int = 0
    """Bytes of the budget that the server itself takes, for masks and connections."""
    has_grammar: bool = True
    """Whether replies can be constrained by grammars, whose masks take memory."""
    reasoning_budget: int = -1
    """The most tokens of reasoning; -1 for no limit."""
    prefixes: str | None = None
    """The folder where prefixes are saved; None for none."""
    prefix_bytes: int = 8 << 30
    """The most bytes of prefixes in that folder."""
    pool_bytes: int = 0
    """The most bytes of prefixes in memory, apart from the sequences; 0 for none."""

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.keys and not self.no_auth:
            raise ValueError(
                f"host: {self.host} lets other machines in; give --api-key or --api-key-file, "
                "or --no-auth if anyone may use it"
            )
        if self.keys and self.no_auth:
            raise ValueError("--no-auth: expected no key beside it")
        object.__setattr__(self, "hosts", tuple(_one_form(name) for name in self.hosts))
        for name in self.hosts:
            if not _NAME.fullmatch(name) and not is_address(name):
                raise ValueError(
                    f"--allowed-hosts: expected a name or an address without a port, got {name!r:.80}"
                )
        for origin in self.origins:  # in the form in which browsers send them
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"--cors-origins: expected one like http://localhost:3000, or *, got {origin!r:.80}"
                )
        if not all(alias.strip() for alias in self.aliases):
            raise ValueError("--alias: expected a name, got nothing")

    def takes_host(self, header: str) -> bool:
        """Returns whether a Host header names this server.

        Any other name may be one that a web page has made to point here, by DNS rebinding.
        """
        name = header.rsplit(":", 1)[0] if header.count(":") == 1 else header
        if header.startswith("["):
            name = header[1:].partition("]")[0]
        name = _one_form(name)
        return (
            is_loopback(name)
            or name == _one_form(self.host)
            or name in self.hosts
            or self._is_own(name)
        )

    def _is_own(self, name: str) -> bool:
        """Returns whether a name is an IP address and the server listens on all addresses; DNS cannot rebind it."""
        if self.host not in ("0.0.0.0", "::"):
            return False
        return is_address(name)


_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?")
_ORIGIN = re.compile(r"\*|null|[A-Za-z][A-Za-z0-9+.-]*://[^\s/]+")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """Returns a duration such as 5m, 30s or 300 in seconds; infinity for a negative one.

    Raises:
        ValueError: it is not a duration.
    """
    match = _DURATION.fullmatch(text.strip().removeprefix("-"))
    if match is None:
        raise ValueError(f"expected a time like 5m, 30s or -1, got {text!r:.40}")
    if text.strip().startswith("-"):
        return math.inf
    return float(match[1]) * _UNITS[match[2] or "s"]


def _one_form(host: str) -> str:
    """Returns a name or an address in the one form that all its spellings share."""
    return str(ipaddress.ip_address(host)) if is_address(host) else host.lower()


def is_address(host: str) -> bool:
    """Returns whether it is an IP address, and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Returns whether a name or address is that of the loopback interface."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
