"""Notices a dead peer at once, even while the main thread waits for a device that waits for that peer.

Ranks form a ring of TCP connections on which nothing is sent: the kernel closes the connection of a killed process
immediately and gives up on a vanished machine after KEEPALIVE seconds. A rank that leaves in order says so first.
A rank that leaves because its neighbour died takes the next one with it, so the whole ring empties.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from pylon_trainer.errors import PeerLost
from pylon_trainer.runtime.distributed import World

_FAREWELL = b"."
_SECRET_BYTES = 16
_CONNECT_SECONDS = 60
_KEEPALIVE_IDLE_SECONDS = 5
_KEEPALIVE_INTERVAL_SECONDS = 5
_KEEPALIVE_PROBES = 3


class Peers:
    """This rank's place in the ring."""

    def __init__(self, world: World, lost: Callable[[str], None]) -> None:
        """Connect to the next rank; `lost(message)` is called in a thread when it dies. Collective."""
        self._watcher: socket.socket | None = None
        if world.size == 1:
            return
        secret = secrets.token_bytes(_SECRET_BYTES)
        neighbour = (world.rank + 1) % world.size
        with _listen() as server:
            places = world.gather((_own_address(), server.getsockname()[1], secret))
            host, port, password = places[neighbour]
            try:
                connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
                connection.sendall(password)
                self._watcher = _accept(server, secret)
            except OSError as error:
                raise PeerLost(f"no connection between rank {world.rank} and its neighbours: {error}") from error
        threading.Thread(target=_watch, args=(connection, neighbour, lost), name="peers", daemon=True).start()

    def say_farewell(self) -> None:
        """Tell the rank that watches this one that it leaves in order."""
        if self._watcher is not None:
            with suppress(OSError):  # the watcher may have left already
                self._watcher.sendall(_FAREWELL)


def _watch(connection: socket.socket, neighbour: int, lost: Callable[[str], None]) -> None:
    connection.settimeout(None)
    _keep_alive(connection)
    try:
        heard = connection.recv(1)
    except OSError:
        heard = b""
    if heard != _FAREWELL:
        lost(f"rank {neighbour} died or its machine vanished")


def _accept(server: socket.socket, secret: bytes) -> socket.socket:
    """The watcher's connection: the first that knows our secret, so that a port scan is not taken for it."""
    server.settimeout(_CONNECT_SECONDS)
    while True:
        watcher, _ = server.accept()
        watcher.settimeout(_CONNECT_SECONDS)
        with suppress(OSError):
            if watcher.recv(_SECRET_BYTES, socket.MSG_WAITALL) == secret:
                return watcher
        watcher.close()


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _own_address() -> str:
    """The address that leads from the rendezvous back to this machine; connecting a datagram socket sends nothing."""
    master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, kind, protocol, _, address = socket.getaddrinfo(*master, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", _KEEPALIVE_IDLE_SECONDS),
        ("TCP_KEEPINTVL", _KEEPALIVE_INTERVAL_SECONDS),
        ("TCP_KEEPCNT", _KEEPALIVE_PROBES),
    ):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
