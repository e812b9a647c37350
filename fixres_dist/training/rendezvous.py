"""How the ranks of a start find each other: through a file in the run directory, which every node sees.

Rank 0 binds a free port and publishes it under a key unique to this start. So no node name has to resolve, and no two
jobs can clash on a port.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined,unused-ignore]  # torch does not list it in __all__

from fixres_dist.base.errors import UserError
from fixres_dist.base.files import write_text
from fixres_dist.cluster import slurm

MEET_TIMEOUT_S = 300.0  # nodes of one job can start minutes apart


def meet(file: Path, rank: int, world: int, many_nodes: bool) -> Store:
    """Rank 0 opens a store on a free port and publishes its address in `file`; the others connect to it.

    It listens on the loopback of one machine, or at the address that the other nodes connect to. Its keys begin with a
    secret that only this user can read in `file`, so that no other one finds or sets them.
    """
    timeout = datetime.timedelta(seconds=MEET_TIMEOUT_S)
    if rank == 0:
        address, secret = own_address() if many_nodes else "127.0.0.1", secrets.token_hex(16)
        listening = listen(address)
        port = int(listening.getsockname()[1])
        tcp = TCPStore(
            *(address, port, world),
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
        file.parent.mkdir(exist_ok=True)
        write_text(file, json.dumps({"address": address, "port": port, "secret": secret}), private=True)
        return PrefixStore(secret, tcp)
    deadline = time.monotonic() + MEET_TIMEOUT_S
    # The folder is listed because NFS caches that a name was not there.
    while not (file.parent.exists() and file.name in os.listdir(file.parent)):
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"rank {rank} waited {MEET_TIMEOUT_S:.0f} s for rank 0, which has not published {file}: it has not started, it "
                "has ended (its log may say why), or the run directory is not shared by all nodes"
            )
        time.sleep(0.05)
    found = json.loads(file.read_text())
    address, port = found["address"], found["port"]
    tcp = TCPStore(address, port, world, is_master=False, timeout=timeout, wait_for_workers=False)
    return PrefixStore(found["secret"], tcp)


def listen(address: str) -> socket.socket:
    """A socket on a free port of `address`; of all addresses where this one is not the node's own (in some containers)."""
    try:
        return socket.create_server((address, 0), backlog=2048)
    except OSError:
        return socket.create_server(("", 0), backlog=2048)


def wait_for_all(store: Store, rank: int, world: int, told: object) -> list[Any]:
    """What each rank tells the others, once all have reached the store; JSON.

    Raises RuntimeError with the ranks that have not within MEET_TIMEOUT_S.
    """
    names = [f"rank {k}" for k in range(world)]
    store.set(names[rank], json.dumps(told))
    try:
        store.wait(names, datetime.timedelta(seconds=MEET_TIMEOUT_S))
    except RuntimeError:  # a DistStoreError
        missing = [str(k) for k, name in enumerate(names) if not store.check([name])]
        raise RuntimeError(
            f"rank {rank} waited {MEET_TIMEOUT_S:.0f} s for rank(s) {', '.join(missing[:8])} of {world}; "
            "their logs may say why they did not start"
        ) from None
    return [json.loads(text) for text in store.multi_get(names)]


def own_address() -> str:
    """An address at which other nodes reach this one: MASTER_ADDR if set, else Slurm's for this node, else the host name's."""
    if os.environ.get("MASTER_ADDR"):
        return os.environ["MASTER_ADDR"]
    node = os.environ.get("SLURMD_NODENAME", "")
    shown = slurm.call("scontrol", "show", "node", node, "-o") if node else None  # None in a container without scontrol
    items = dict(item.partition("=")[::2] for item in shown.stdout.split()) if shown else {}
    for name in filter(None, (items.get("NodeAddr"), socket.gethostname())):
        with contextlib.suppress(OSError):
            return socket.gethostbyname(name)
    raise UserError(f"no address of {socket.gethostname()} can be found for the other nodes. Next: set MASTER_ADDR.")
