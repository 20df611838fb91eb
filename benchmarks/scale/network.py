"""Hosts on one machine: network namespaces on a bridge, each with one interface of a given bandwidth. Needs root."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

INTERFACE = "eth0"
PREFIX = "apoptosis-"  # of the namespaces, then the id of the process that made them
_NETNS = Path("/etc/netns")  # where `ip netns exec` looks for a namespace's own /etc/hosts


@contextmanager
def network(number: int, bits: float | None) -> Iterator[list[str]]:
    """Names of the namespaces of `number` hosts, which know each other as host0, host1, ...

    Args:
        bits: per second, what each host may send and be sent; None: as fast as the machine does it.

    Raises:
        PermissionError: this process may not make namespaces.
        subprocess.CalledProcessError: the kernel lacks what is needed.
    """
    if os.geteuid() != 0:
        raise PermissionError("hosts as network namespaces need root. Run as root.")
    remove_stale()
    switch, names = _name("switch"), [_name(f"host{i}") for i in range(number)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for i, name in enumerate(names):
            _connect(switch, name, i, bits)
            _name_hosts(name, i, number)
        yield names
    finally:
        _remove(name for name in (switch, *names) if name in namespaces())


def namespaces() -> list[str]:
    """All that are there."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines()]


def remove_stale() -> None:
    """Removes the namespaces of processes that are no more (killed before they could)."""
    own = [name for name in namespaces() if name.startswith(PREFIX)]
    _remove(name for name in own if not Path("/proc", name.removeprefix(PREFIX).split("-")[0]).exists())


def within(namespace: str, command: Sequence[str]) -> list[str]:
    """The command that runs `command` on that host."""
    return ["ip", "netns", "exec", namespace, *command]


def end_processes(namespace: str) -> None:
    """Kills all that runs on that host: torchrun's workers outlive it."""
    running = subprocess.run(["ip", "netns", "pids", namespace], check=True, capture_output=True, text=True).stdout
    for process in running.split():
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


def sent() -> int:
    """Bytes that this host has sent, from its interface's counter; 0 where it has none."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == INTERFACE:
            return int(counters.split()[8])
    return 0


def _connect(switch: str, name: str, i: int, bits: float | None) -> None:
    port = f"port{i}"
    _ip("netns", "add", name)
    _ip("link", "add", port, "netns", switch, "type", "veth", "peer", "name", INTERFACE, "netns", name)
    _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
    _ip("-n", name, "address", "add", f"{_address(i)}/24", "dev", INTERFACE)
    for device in ("lo", INTERFACE):
        _ip("-n", name, "link", "set", device, "up")
    if bits is not None:
        burst = max(128 * 1024, int(bits / 8 * 0.005))  # bytes: 5 ms, but no less than two of the largest segments
        shape = ["root", "tbf", "rate", f"{int(bits)}bit", "burst", str(burst), "latency", "50ms"]
        for namespace, device in ((name, INTERFACE), (switch, port)):
            _run("tc", "-n", namespace, "qdisc", "add", "dev", device, *shape)


def _name_hosts(name: str, i: int, number: int) -> None:
    """torchrun looks for its own address under the machine's name, which is that of all hosts here."""
    own = {i: f" {socket.gethostname()}"}
    lines = ["127.0.0.1 localhost", *(f"{_address(j)} host{j}{own.get(j, '')}" for j in range(number))]
    (_NETNS / name).mkdir(parents=True)
    (_NETNS / name / "hosts").write_text("\n".join(lines) + "\n")


def _remove(names: Iterator[str]) -> None:
    for name in names:
        end_processes(name)
        _ip("netns", "del", name)
        shutil.rmtree(_NETNS / name, ignore_errors=True)


def _name(part: str) -> str:
    return f"{PREFIX}{os.getpid()}-{part}"


def _address(i: int) -> str:
    return f"10.201.0.{i + 1}"


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
