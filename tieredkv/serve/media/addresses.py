"""Which addresses of the network a server may fetch from: those of the public internet that are not its own."""

from __future__ import annotations

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_REFUSED = tuple(
    map(
        ipaddress.ip_network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",  # shared by customers of a provider; metadata of one cloud
            "127.0.0.0/8",
            "168.63.129.16/32",  # metadata of another, in public space
            "169.254.0.0/16",  # link-local; metadata of most
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",
            "240.0.0.0/4",
            "::/96",  # IPv4 inside IPv6, in all its forms: here, below, and in three more
            "::ffff:0:0/96",
            "::ffff:0:0:0/96",
            "64:ff9b::/96",
            "64:ff9b:1::/48",
            "100::/64",
            "2001::/23",
            "2001:db8::/32",
            "2002::/16",
            "3fff::/20",
            "5f00::/16",
            "fc00::/7",
            "fe80::/10",
            "fec0::/10",
            "ff00::/8",
        ),
    )
)


def is_public(text: str) -> bool:
    """Whether this address is one of the public internet; it may have a zone, as in "fe80::1%eth0"."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if any(address.version == network.version and address in network for network in _REFUSED):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def own_addresses() -> frozenset[str]:
    """Addresses of this machine's interfaces: what listens on them may trust whoever is on the machine."""
    import psutil

    found = {each.address.partition("%")[0] for all in psutil.net_if_addrs().values() for each in all}
    return frozenset(found)
