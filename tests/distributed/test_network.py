"""Which interface gloo is told to use; test_hosts.py has two hosts that do not meet without it."""

import os

import psutil
import pytest

from parallel.network import choose_interface


def chosen(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str | None:
    for name in ("GLOO_SOCKET_IFNAME", "MASTER_ADDR", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "")  # also where it was not set: what the code sets is undone
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    choose_interface(4)
    return os.environ.get("GLOO_SOCKET_IFNAME")


def loopback() -> str:
    return next(
        name for name, entries in psutil.net_if_addrs().items() if "127.0.0.1" in [entry.address for entry in entries]
    )


def test_it_leads_to_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, MASTER_ADDR="127.0.0.1") == loopback()
    assert chosen(monkeypatch, MASTER_ADDR="localhost", LOCAL_WORLD_SIZE="4") == loopback()


def test_several_hosts_never_meet_on_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, MASTER_ADDR="127.0.0.1", LOCAL_SIZE="2") != loopback()


def test_the_users_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="eth7") == "eth7"


@pytest.mark.parametrize("variables", [{}, {"MASTER_ADDR": "no.such.host.invalid"}])
def test_without_a_way_nothing_is_set(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    assert chosen(monkeypatch, **variables) is None
