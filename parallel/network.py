"""Which network interface gloo talks through."""

import os
import socket

import psutil

_ELSEWHERE = "192.0.2.1"  # an address that nobody has (RFC 5737): the way to it is the way out


def choose_interface(world_size: int) -> None:
    """Set GLOO_SOCKET_IFNAME, unless the user has, to the interface that leads to the first rank.

    By itself gloo listens at the address that this host's own name stands for. On many systems /etc/hosts makes that
    127.0.1.1, where no other host finds it.
    """
    if "MASTER_ADDR" not in os.environ or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    interfaces = {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)  # torchrun, deepspeed
    address = _address_towards(os.environ["MASTER_ADDR"])
    if address.startswith(("127.", "::1")) and here < world_size:
        address = _address_towards(_ELSEWHERE)  # the first rank's own host, with such a name
    if address in interfaces:
        os.environ["GLOO_SOCKET_IFNAME"] = interfaces[address]


def _address_towards(host: str) -> str:
    """This machine's address on the way to another; empty if there is no way. Nothing is sent."""
    try:
        family, kind, protocol, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(there)
            return probe.getsockname()[0]
    except OSError:
        return ""
