"""How the ranks of a start find each other: through a file in the run directory, which every node sees.

Rank 0 binds a free port and publishes it under a key of this start. So no node name has to resolve, and no two jobs can
clash on a port. The key can be that of an earlier start, whose file is still there (torchrun with a fixed port, a cluster
that counts its jobs from 1 again): the others take an address only from a store that knows the file's secret.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined,unused-ignore]  # torch does not list it in __all__

from fixres_dist.base.errors import UserError
from fixres_dist.base.files import write_text
from fixres_dist.cluster import slurm

MEET_TIMEOUT_S = 300.0  # nodes of one job can start minutes apart
ANSWER_S = 10.0  # for rank 0 to accept a connection; another program at a stale address may accept and say nothing
OLD_S = 3600.0  # nobody looks for a file of that age any more
OPEN = "open"  # the key that rank 0 sets before it publishes its address


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
        store = PrefixStore(secret, tcp)
        store.set(OPEN, "")
        file.parent.mkdir(exist_ok=True)
        sweep(file.parent)
        write_text(file, json.dumps({"address": address, "port": port, "secret": secret}), private=True)
        return store
    deadline = time.monotonic() + MEET_TIMEOUT_S
    while (reached := reach(file, world)) is None:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"rank {rank} waited {MEET_TIMEOUT_S:.0f} s for rank 0, which has not published {file}, or is not at the address "
                "there: it has not started, it has ended (its log may say why), or the run directory is not shared by all nodes"
            )
        time.sleep(0.05)
    reached.set_timeout(timeout)
    return reached


def reach(file: Path, world: int) -> Store | None:
    """The store whose address `file` has; None where there is no such file yet, or one of an earlier start."""
    answer, found = min(ANSWER_S, MEET_TIMEOUT_S), list[Store]()

    def connect() -> None:
        timeout = datetime.timedelta(seconds=answer)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):  # torch raises RuntimeErrors
            os.listdir(file.parent)  # NFS caches that a name was not there
            told = json.loads(file.read_text())
            address, port = told["address"], told["port"]
            socket.create_connection((address, port), answer).close()  # TCPStore would go on trying
            tcp = TCPStore(address, port, world, is_master=False, timeout=timeout, wait_for_workers=False)
            store = PrefixStore(told["secret"], tcp)
            store.wait([OPEN], timeout)
            found.append(store)

    # TCPStore waits for ever for a program that accepts and says nothing.
    thread = threading.Thread(target=connect, name="rendezvous", daemon=True)
    thread.start()
    thread.join(3 * answer)
    return found[0] if found else None


def sweep(folder: Path) -> None:
    """Delete what starts before this one have left."""
    for old in folder.glob("*.json"):
        with contextlib.suppress(OSError):  # another start was faster, or the file is of another user
            if time.time() - old.stat().st_mtime > OLD_S:
                old.unlink()


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
