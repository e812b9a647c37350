"""torch.compile's results: on the node's disk, seeded from the cache folder and copied back, never read where others write."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from fixres_dist.training import compiled_code


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The disk of a node on which torch has been imported."""
    folder = tmp_path / "node"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{folder}/torchinductor_someone")
    return folder


def used() -> Path:
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def move_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another job, on another node."""
    folder.mkdir()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("SLURM_TMPDIR", str(folder))


def test_it_works_on_the_nodes_disk_and_is_kept_for_the_next_start(
    tmp_path: Path, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    compiled_code.use_node_folder(str(cache))
    assert used() == node / f"fixres_dist-compiled-{os.getuid()}"
    assert os.environ["TRITON_CACHE_DIR"] == f"{used()}/triton"
    assert stat.S_IMODE(used().stat().st_mode) == 0o700
    assert not cache.exists()
    for name in ("ab/cab.py", "triton/0/XYZ/kernel.cubin", "locks/x.lock"):
        (used() / name).parent.mkdir(parents=True, exist_ok=True)
        (used() / name).write_text(name)
    compiled_code.use_node_folder(str(cache))  # the next session of the process, and the next rank of the node
    compiled_code.keep(str(cache))
    kept = cache / f"compiled-{os.getuid()}"
    assert sorted(str(p.relative_to(kept)) for p in kept.rglob("*") if p.is_file()) == [
        "ab/cab.py",
        "triton/0/XYZ/kernel.cubin",
    ]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    move_to(tmp_path / "job", monkeypatch)
    compiled_code.use_node_folder(str(cache))
    assert used().parent == tmp_path / "job"
    assert (used() / "triton/0/XYZ/kernel.cubin").read_text() == "triton/0/XYZ/kernel.cubin"
    (used() / "new.py").touch()
    compiled_code.keep(str(cache))
    assert (kept / "new.py").exists()


def test_it_is_never_read_from_where_others_can_write(
    tmp_path: Path, node: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "cache" / f"compiled-{os.getuid()}"
    kept.mkdir(parents=True)
    (kept / "evil.py").touch()
    kept.chmod(0o775)
    ours = node / f"fixres_dist-compiled-{os.getuid()}"
    ours.mkdir()
    ours.chmod(0o777)  # somebody else has made it before
    compiled_code.use_node_folder(str(tmp_path / "cache"))
    assert used() != ours
    assert used().parent == node
    assert not (used() / "evil.py").exists()
    assert f"Next: chmod -R go-w {kept}" in capsys.readouterr().out
    (used() / "mine.py").touch()
    compiled_code.keep(str(tmp_path / "cache"))
    assert not (kept / "mine.py").exists()
    kept.chmod(0o700)
    move_to(tmp_path / "job", monkeypatch)
    (tmp_path / "job" / ours.name).symlink_to(tmp_path / "elsewhere")
    compiled_code.use_node_folder(str(tmp_path / "cache"))
    assert used().name != ours.name, "a link is somebody else's choice"
    assert (used() / "evil.py").exists(), "now it is this user's alone"


@pytest.mark.parametrize("name", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"])
def test_a_persons_setting_stands(tmp_path: Path, node: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "/fast/disk")
    before = dict(os.environ)
    compiled_code.use_node_folder(str(tmp_path / "cache"))
    compiled_code.keep(str(tmp_path / "cache"))
    assert dict(os.environ) == before
    assert not (tmp_path / "cache").exists()
