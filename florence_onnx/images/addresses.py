"""Rules for URLs from untrusted callers: which IP addresses, ports and hosts may be contacted. Uses no network."""

from __future__ import annotations

import ipaddress
import urllib.parse

# Written out, because `ipaddress.is_global` differs between versions of Python.
_NOT_PUBLIC_V4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",  # this network; 0.0.0.0 reaches the machine itself
            "10.0.0.0/8",
            "100.64.0.0/10",  # carrier-grade NAT; Alibaba Cloud's metadata service
            "127.0.0.0/8",
            "168.63.129.16/32",  # Azure's host agent: a public address, answered privately inside a virtual machine
            "169.254.0.0/16",  # link-local; the metadata service of most clouds
            "172.16.0.0/12",
            "192.0.0.0/24",  # protocol assignments; Oracle Cloud's metadata service
            "192.0.2.0/24",  # documentation
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",
            "198.18.0.0/15",  # benchmarks of network devices
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and broadcast
        ),
    )
)
_GLOBAL_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # protocol assignments, among them Teredo
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4
            "3fff::/20",  # documentation
        ),
    )
)
# IPv4-mapped and NAT64: packets go to the IPv4 address in the last 32 bits, so that is the one to check
_EMBEDDING_V6 = tuple(map(ipaddress.IPv6Network, ("::ffff:0:0/96", "64:ff9b::/96")))

_DEFAULT_PORTS = (80, 443)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet.

    An IPv4-mapped or NAT64 (64:ff9b::/96) address is public if the IPv4 address inside is. Obsolete embeddings of IPv4
    (IPv4-compatible, 6to4, Teredo) are never public, nor is an address with a zone (`%eth0`).

    Args:
        address: An IPv4 or IPv6 address in the usual notation; any other string is not public.
    """
    if "%" in address:
        return False
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if not any(parsed in network for network in _EMBEDDING_V6):
            is_special = any(parsed in network for network in _NOT_PUBLIC_V6)
            return parsed in _GLOBAL_UNICAST_V6 and parsed.is_global and not is_special
        parsed = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
    return parsed.is_global and not any(parsed in network for network in _NOT_PUBLIC_V4)


def is_web_port(port: int) -> bool:
    """Whether images may be fetched from a port: 80, 443, or 1024 and above. Others are for mail, SSH and so on."""
    return port in _DEFAULT_PORTS or 1024 <= port <= 65535


def parse_host(entry: str) -> frozenset[tuple[str, int]]:
    """Parses one entry of `allowed_hosts`.

    Args:
        entry: `HOST:PORT`, or `HOST` alone for its ports 80 and 443. An IPv6 address is put in brackets, an
            internationalized name in its ASCII form (`xn--…`).

    Returns:
        Pairs of host (lower case, without brackets) and port.

    Raises:
        ValueError: The entry is something else, such as a URL.
    """
    message = f"an allowed host is HOST or HOST:PORT (an IPv6 address in brackets), got {entry!r}"
    try:
        parts = urllib.parse.urlsplit(f"//{entry}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(message) from None
    if not host or not entry.isascii() or parts.netloc != entry or "@" in entry or entry.endswith(":"):
        raise ValueError(message)
    return frozenset((host, each) for each in (_DEFAULT_PORTS if port is None else (port,)))
