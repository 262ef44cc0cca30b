"""Machines with cables between them that can be pulled: network namespaces of the kernel (network_namespaces(7))."""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class Machine:
    """A network stack of its own. What is started while a thread has entered it runs there."""

    def __init__(self) -> None:
        with _staying_here():
            _succeed(_libc.unshare(CLONE_NEWNET))
            self.descriptor = _here()
            ip("link", "set", "lo", "up")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Have this thread, and what it starts, see this machine's network."""
        with _staying_here():
            _succeed(_libc.setns(self.descriptor, CLONE_NEWNET))
            yield

    def close(self) -> None:
        """Let go of it: it is gone with the last process in it, and its cables with it."""
        os.close(self.descriptor)


class Switch:
    """A network of the machine that this thread is on, and of those that are connected to it by cables."""

    def __init__(self, name: str, prefix: str) -> None:
        """`prefix`: the first three numbers of every address."""
        self.name = name
        self.prefix = prefix
        ip("link", "add", name, "address", "02:00:00:00:00:fe", "type", "bridge")
        ip("address", "add", f"{prefix}.254/24", "dev", name)
        ip("link", "set", name, "up")


class Cable:
    """What connects a machine to a network."""

    def __init__(self, switch: Switch, machine: Machine, number: int) -> None:
        self._switch = switch
        self._port = f"{switch.name}{number}"
        self._others = f"{switch.name}other{number}"
        self._stranger = Machine()
        self.address = f"{switch.prefix}.{number}"
        for port, end in ((self._port, machine), (self._others, self._stranger)):
            there = f"/proc/{os.getpid()}/fd/{end.descriptor}"
            ip("link", "add", port, "type", "veth", "peer", "name", switch.name, "netns", there)
            with end.entered():
                ip("link", "set", switch.name, "address", f"02:00:00:00:00:{number:02x}", "up")
                ip("address", "add", f"{self.address}/24", "dev", switch.name)
            ip("link", "set", port, "up")
        self._plug(self._port)

    @contextlib.contextmanager
    def pulled(self, *, refuses: bool) -> Iterator[None]:
        """Pull the cable: what is sent is lost without a word. With `refuses`, somebody else has the machine's address.

        He knows of none of its connections, and nobody listens there: what comes is answered by a reset.
        """
        ip("link", "set", self._port, "nomaster")
        if refuses:
            self._plug(self._others)
        try:
            yield
        finally:
            if refuses:
                ip("link", "set", self._others, "nomaster")
            self._plug(self._port)

    def _plug(self, port: str) -> None:
        ip("link", "set", port, "master", self._switch.name)

    def close(self) -> None:
        self._stranger.close()


def can_wire() -> bool:
    """Tell whether this user may make machines and cables, and this kernel knows how."""
    try:
        with contextlib.closing(Machine()) as machine, machine.entered():
            Switch("switch", "10.0.0")
            ip("link", "add", "port", "type", "veth")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def ip(*command: str) -> None:
    """Run iproute2's program where this thread is."""
    subprocess.run(["ip", *command], check=True, capture_output=True)


def _here() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


@contextlib.contextmanager
def _staying_here() -> Iterator[None]:
    here = _here()
    try:
        yield
    finally:
        _succeed(_libc.setns(here, CLONE_NEWNET))
        os.close(here)


def _succeed(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), "the network of another machine cannot be entered")
