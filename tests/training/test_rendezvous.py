"""Who can reach the ranks while they meet, and what they take from each other."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.commands import ROOT, environment

from fixres_dist.training import ranks, rendezvous

# Two ranks of one machine; rank 0 prints where its process listens.
MEET = """
import os, sys
from pathlib import Path
import numpy as np
import torch.distributed as dist
def pickled(*_, **__):
    raise AssertionError("a pickled object")
dist.distributed_c10d._tensor_to_object = dist.distributed_c10d._object_to_tensor = pickled
import time
from fixres_dist.training import ranks
ranks.COLLECTIVE_TIMEOUT_S = 0.5
found = ranks.join(Path(sys.argv[1]), watched=True)
assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"  # where the host's own name is another machine's address, all else is there
if not found.is_main:
    time.sleep(1.5)  # suspended
rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
rows += [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
inodes = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}
listening = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
for value in ([None, 1.5, {"a": [1, "b"]}], None, 7):
    assert found.from_main(lambda: value if found.is_main else 1 / 0) == value
array = found.from_main(lambda: np.arange(6.0).reshape(2, 3) if found.is_main else 1 / 0)
assert array.shape == (2, 3) and array[1, 2] == 5 and array.dtype == float
found.stop()
print(found.nodes, found.cpus, "listens:", *listening)
"""


def test_one_machine_listens_on_its_loopback_and_takes_no_pickles(tmp_path: Path) -> None:
    launcher = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, str(tmp_path)],
            env={**environment(), **launcher, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for text in said:
        listening = text.split("listens: ")[1].split()
        assert listening
        assert all(address.startswith("0100007F:") for address in listening), listening  # 127.0.0.1
    (file,) = (tmp_path / "rendezvous").iterdir()
    assert file.stat().st_mode & 0o077 == 0
    assert len(json.loads(file.read_text())["secret"]) == 32


def test_several_nodes_meet_at_the_address_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not know the secret sees none of the ranks' keys."""
    bound: list[socket.socket] = []
    listen = rendezvous.listen
    monkeypatch.setattr(rendezvous, "listen", lambda address: bound.append(listen(address).dup()) or listen(address))
    monkeypatch.setattr(rendezvous, "own_address", lambda: "127.0.0.2")
    store = rendezvous.meet(tmp_path / "r" / "x.json", 0, 2, many_nodes=True)
    other = rendezvous.meet(tmp_path / "r" / "x.json", 1, 2, many_nodes=True)
    other.set("rank 1", "1")
    assert store.get("rank 1") == b"1"
    assert bound[0].getsockname()[0] == "127.0.0.2"
    bound[0].close()
    published = json.loads((tmp_path / "r" / "x.json").read_text())
    stranger = rendezvous.TCPStore("127.0.0.2", published["port"], 2, False, wait_for_workers=False)
    assert not stranger.check(["rank 1"])
    assert stranger.check([f"{published['secret']}/rank 1"])


def published(file: Path, address: str, port: int, secret: str = "0" * 32) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"address": address, "port": port, "secret": secret}))


@pytest.mark.parametrize("left", ["nobody listens", "another run's store", "a program that says nothing", "torn"])
def test_the_file_of_an_earlier_start_is_not_taken(left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun with a fixed port has it: the same key as before."""
    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.3)
    file, taken = tmp_path / "rendezvous" / "torchrun-none-29500-0.json", []
    with rendezvous.listen("127.0.0.1") as other:
        if left == "another run's store":
            taken.append(rendezvous.meet(file, 0, 2, many_nodes=False))
        port = json.loads(file.read_text())["port"] if taken else other.getsockname()[1]
        published(file, "127.0.0.1", port if left != "nobody listens" else 1)
        if left == "torn":
            file.write_text('{"address": "127.')
        assert rendezvous.reach(file, 2) is None
        first = rendezvous.meet(file, 0, 2, many_nodes=False)
        second = rendezvous.meet(file, 1, 2, many_nodes=False)
        first.set("rank 0", "here")
        assert second.get("rank 0") == b"here"


def test_what_starts_before_have_left_is_swept(tmp_path: Path) -> None:
    old, young = tmp_path / "rendezvous" / "slurm-1-0-0.json", tmp_path / "rendezvous" / "slurm-2-0-0.json"
    for file in (old, young):
        published(file, "127.0.0.1", 1)
    os.utime(old, (1, 1))
    rendezvous.meet(tmp_path / "rendezvous" / "slurm-3-0-0.json", 0, 2, many_nodes=False)
    assert sorted(file.name for file in old.parent.iterdir()) == ["slurm-2-0-0.json", "slurm-3-0-0.json"]


def test_an_address_that_is_not_the_nodes_own() -> None:
    with rendezvous.listen("192.0.2.1") as found:  # of documentation: no machine has it
        assert found.getsockname()[0] == "0.0.0.0"


@pytest.mark.parametrize("value", [None, 0, [1, [2.5, "x"]], {"a": None}, np.zeros((0, 3)), np.array([[np.nan, 1.0]])])
def test_what_ranks_send_arrives(value: object) -> None:
    np.testing.assert_equal(ranks.unpacked(ranks.packed(value)), value)


def test_objects_are_not_sent() -> None:
    with pytest.raises(TypeError):
        ranks.packed(os.environ)
    with pytest.raises(ValueError, match="allow_pickle"):
        ranks.packed(np.array([object()]))


def test_a_pickle_that_arrives_is_not_opened() -> None:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        ranks.unpacked(b"A" + file.getvalue())
