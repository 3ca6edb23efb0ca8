"""Notices a dead peer at once, even while the main thread waits for a device that waits for that peer.

Ranks form a ring of TCP connections on which nothing is sent: the kernel closes the connection of a killed process
immediately and gives up on a vanished machine after KEEPALIVE seconds. A rank that leaves in order says so first.
A rank that leaves because its neighbour died takes the next one with it, so the whole ring empties.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

from pylon_trainer.runtime.distributed import World

_FAREWELL = b"."
_KEEPALIVE_IDLE_SECONDS = 5
_KEEPALIVE_INTERVAL_SECONDS = 5
_KEEPALIVE_PROBES = 3


class Peers:
    """This rank's place in the ring."""

    def __init__(self, world: World, lost: Callable[[str], None]) -> None:
        """Connect to the next rank; `lost(message)` is called in a thread when it dies. Collective."""
        self._lost = lost
        self._watchers: list[socket.socket] = []
        if world.size == 1:
            return
        self._server = _listen()
        addresses = world.gather((_own_address(), self._server.getsockname()[1]))
        neighbour = (world.rank + 1) % world.size
        threading.Thread(target=self._accept, name="peers-accept", daemon=True).start()
        connection = socket.create_connection(addresses[neighbour], timeout=30)
        connection.settimeout(None)
        _keep_alive(connection)
        threading.Thread(
            target=self._watch, args=(connection, neighbour), name="peers-watch", daemon=True
        ).start()

    def say_farewell(self) -> None:
        """Tell whoever watches this rank that it leaves in order."""
        for watcher in self._watchers:
            try:
                watcher.sendall(_FAREWELL)
            except OSError:
                continue  # the watcher has left already

    def _accept(self) -> None:
        while True:
            watcher, _ = self._server.accept()
            _keep_alive(watcher)
            self._watchers.append(watcher)

    def _watch(self, connection: socket.socket, neighbour: int) -> None:
        try:
            heard = connection.recv(1)
        except OSError:
            heard = b""
        if heard != _FAREWELL:
            self._lost(f"rank {neighbour} died or its machine vanished")


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
