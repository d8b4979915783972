"""Runs a command in a network namespace of its own and records what it sends to other machines.

    python outgoing.py FILE COMMAND…

In the namespace every address is reached and refuses connections. FILE gets a line for each packet that would leave the
machine, or asks for a name: destination, port, and what can be printed of its content. For Linux, with `ip` and
`unshare`; a user who is not root needs namespaces for users.
"""

from __future__ import annotations

import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

NETWORK = ("link set lo up", "route add local 0.0.0.0/0 dev lo", "-6 route add local ::/0 dev lo")
"""Every address is one of this machine's own, where nobody listens."""
DNS = 53
IPV4, IPV6, EVERY = 0x0800, 0x86DD, 3
TCP, UDP = 6, 17


def command(file: Path) -> list[str]:
    """The words before a command that is to be recorded."""
    return ["unshare", "--net", "--map-root-user", sys.executable, str(Path(__file__).absolute()), str(file)]


def lacks() -> str:
    """What is missing to record what is sent, in a line."""
    if not all(map(shutil.which, ("ip", "unshare"))):
        return "it needs Linux with `ip` and `unshare` (apt install iproute2)"
    tried = subprocess.run([*command(Path("/dev/null")), "true"], capture_output=True, text=True, check=False)
    return tried.stderr.strip().rpartition("\n")[2] if tried.returncode else ""


def leaves(kind: int, packet: bytes) -> str:
    """What a packet of IP is, if it goes to another machine or to a name server, else nothing."""
    if kind == IPV4:
        protocol, start, family, address = packet[9], (packet[0] & 15) * 4, socket.AF_INET, packet[16:20]
    elif kind == IPV6:
        protocol, start, family, address = packet[6], 40, socket.AF_INET6, packet[24:40]
    else:
        return ""
    if protocol not in (TCP, UDP):  # the kernel itself looks for neighbors
        return ""
    (port,) = struct.unpack("!H", packet[start + 2 : start + 4])
    to = socket.inet_ntop(family, address)
    if port != DNS and (to.startswith("127.") or to == "::1"):
        return ""
    return f"{to} {port} {re.sub(rb'[^ -~]+', b' ', packet[start:]).decode()}"


def listen(file: Path) -> Callable[[], None]:
    """Record what is sent from now on; returns what ends that."""
    listener = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(EVERY))
    listener.settimeout(0.1)
    over = threading.Event()

    def record() -> None:
        with file.open("w", encoding="utf-8") as lines:
            while True:
                try:
                    packet, (_, kind, *_) = listener.recvfrom(2048)
                except TimeoutError:
                    if over.is_set():
                        return
                    continue
                if told := leaves(kind, packet):
                    lines.write(f"{told}\n")

    thread = threading.Thread(target=record)
    thread.start()

    def end() -> None:
        over.set()
        thread.join()

    return end


def main(file: str, *words: str) -> int:
    for each in NETWORK:
        subprocess.run(["ip", *each.split()], check=True)
    end = listen(Path(file))
    try:
        return subprocess.run(words, check=False).returncode
    finally:
        end()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
