"""Ranks that start together and give up together: they compare what they were given, and hear of each other's failure.

This needs neither process groups nor a device, only a key-value store (``TCPStore``), because what goes wrong goes
wrong early: a path that one host does not have, a config that was edited on one host only. The keys of the store:

- ``facts``: what the first rank was given; null if it gave up before;
- ``agreed``: how many ranks hold the same;
- ``end``: null when all do; else why somebody gave up. The first to write it has written it for all;
- ``spoken``: the first rank has printed it;
- ``heard``: how many of the others need the store no more.
"""

import atexit
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from backends.errors import UserError
from parallel.topology import attempt_from_environment, world_size_from_environment

_JOIN = timedelta(minutes=30)  # for the first rank to appear, as in torch's own rendezvous
_PATIENCE = 10.0  # seconds that a rank gives another to speak or to listen before it leaves
_ECHO = 2.0  # seconds between the end of one rank and the exception that it causes in another, at most


class _Room:
    """The ranks' store, and this rank in it. Every agreement has keys of its own."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ["RANK"]), world_size_from_environment()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
        try:
            # Process groups will share the server, hence multi_tenant.
            self._base = dist.TCPStore(
                address,
                port,
                is_master=serves,
                timeout=_JOIN,
                wait_for_workers=False,
                multi_tenant=True,
            )
        except dist.DistNetworkError as error:
            if not serves:
                raise
            problem = "in use" if "EADDRINUSE" in str(error) else f"not to be had ({error})"
            raise UserError(
                f"port {port} of {address}, where the ranks meet, is {problem}; give the launcher another --master_port"
            ) from error
        self.gave_up = False
        self._round = 0
        self.next_round()

    def next_round(self) -> None:
        self._round += 1
        self._store = dist.PrefixStore(f"agreement/{attempt_from_environment()}/{self._round}", self._base)

    def put(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def add(self, key: str, number: int = 1) -> int:
        return self._store.add(key, number)

    def appears(self, key: str, patience: float) -> bool:
        """Wait for a key; False if it does not come. The store's own wait would hear no Ctrl-C."""
        end, pause = time.monotonic() + patience, 0.01
        while not self._store.check([key]):
            if time.monotonic() >= end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        return True

    def get(self, key: str) -> Any:
        """A value, waiting for it as long as it takes: another host may be tokenizing its corpus."""
        self.appears(key, float("inf"))
        return json.loads(self._store.get(key))

    def end(self, why: dict[str, Any] | None) -> dict[str, Any] | None:
        """Write the end, unless somebody has; returns the one that holds."""
        return json.loads(self._store.compare_set("end", "", json.dumps(why)))

    def leave(self, error: Exception) -> None:
        """End with an exception and tell the others; returns if the exception is still the one to raise."""
        if self.gave_up:
            return
        if self.rank == 0:
            self.put("facts", None)  # somebody may be waiting for them
        here = f"rank {self.rank} on {socket.gethostname()}"
        if isinstance(error, UserError):
            line = str(error) if self.rank == 0 else f"{here}: {error}"
            mine = {"line": line, "rank": self.rank}
            why = self.end(mine)
            self.give_up(mine if self.rank == 0 or why is None else why)
        # Collectives break when a rank has left: then its reason is the reason.
        why = self.get("end") if self.appears("end", _ECHO) else self.end({"line": None, "rank": self.rank})
        if why and why["line"]:
            self.give_up(why)
        self.add("heard")

    def give_up(self, why: dict[str, Any]) -> None:
        """Raise what an end means for this rank."""
        self.gave_up = True
        mine = why["rank"] == self.rank != 0
        if self.rank == 0:
            atexit.register(self._farewell)  # when the line is out: a launcher stops all ranks once one has ended
        else:
            with suppress(dist.DistError):  # the server is gone, and so is the first rank
                mine = not self.appears("spoken", _PATIENCE) and mine
                self.add("heard")
        if not why["line"]:
            raise SystemExit(1)  # the rank that failed shows its traceback
        error = UserError(why["line"])
        error.unheard = mine
        raise error

    def _farewell(self) -> None:
        """Keep the server of the store alive until all have heard."""
        with suppress(dist.DistError):
            self.put("spoken", True)
            end = time.monotonic() + _PATIENCE
            while self.add("heard", 0) < self.world - 1 and time.monotonic() < end:
                time.sleep(0.02)


_room: _Room | None = None


def _enter() -> _Room | None:
    """The room of this process's ranks; None for a process that is alone."""
    global _room
    if _room is None and "RANK" in os.environ and world_size_from_environment() > 1:
        _room = _Room()
    return _room


def agree(facts: dict[str, Any]) -> None:
    """Wait until every rank holds the same facts as the first; a process that is alone agrees with itself.

    Args:
        facts: what has to be the same, as JSON values; the keys are for the message.

    Raises:
        UserError: on every rank, if one holds another value or has given up, with its number and host.
    """
    room = _enter()
    if room is None:
        return
    if room.rank == 0:
        room.put("facts", facts)
    first = room.get("facts")
    if first is not None:
        mine = json.loads(json.dumps(facts))
        for key in dict.fromkeys([*first, *mine]):
            if mine.get(key) != first.get(key):
                room.leave(
                    UserError(
                        f"{key}: is {json.dumps(mine.get(key))}, but {json.dumps(first.get(key))} on rank 0; start "
                        "every rank with the same config and the same software"
                    )
                )
        if room.add("agreed") == room.world:
            room.end(None)
    why = room.get("end")
    if why is not None:
        room.give_up(why)
    room.next_round()


@contextmanager
def together() -> Iterator[None]:
    """Around all that a rank does: one rank's :class:`UserError` becomes that of all, and the first rank prints it.

    A collective that breaks because another rank has given up ends with that rank's reason. Any other exception
    stays what it is; ranks that wait in :func:`agree` for one that has died of it exit with code 1, quietly.
    """
    room = _enter()
    try:
        yield
    except Exception as error:
        try:
            if room is not None:
                room.leave(error)
        except dist.DistError:  # nobody can be told any more
            if isinstance(error, UserError):
                error.unheard = True
        raise
