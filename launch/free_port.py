"""Prints a free port of this machine for the rendezvous of a job; needs the standard library only.

The script of a job runs this file by its path: `python free_port.py JOB_ID`.
"""

from __future__ import annotations

import socket
import sys
import zlib

# Below the ports that the kernel gives to clients.
_FIRST, _PORTS = 24_500, 8_000


def first_port(job: str) -> int:
    """Return the port with which a job begins its search: another one for each job."""
    return _FIRST + zlib.crc32(job.encode()) % _PORTS


def free_port(job: str) -> int:
    """Return the first free port at or after `first_port`, or that one where none is free."""
    begin = first_port(job)
    for i in range(_PORTS):
        port = _FIRST + (begin - _FIRST + i) % _PORTS
        with socket.socket() as probe:
            # As torch binds it: a port whose connections have just ended is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    return begin


if __name__ == "__main__":
    print(free_port(sys.argv[1] if len(sys.argv) > 1 else ""))
