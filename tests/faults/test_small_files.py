"""Damage to every small file of a finished and of a half-finished run: each command ends with words, and none takes a
damaged number for a right one. FIXRES_FUZZ=N tries N damages instead of the few of the gate."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.in_process import SETTINGS, called

from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER
from fixres_dist.base.small_files import Damaged, append, lines_of, read_json, read_lines, read_text, write_json
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import RunState, State

COUNT = int(os.environ.get("FIXRES_FUZZ", "8"))
FILES = (
    *("state.json", "choices.json", "metrics.jsonl", "events.jsonl", "config.yaml", "class_index.json"),
    *("results.json", "environment.json", "command.txt", "skipped/rank_0.jsonl", "samples/rank_0.jsonl"),
    *("evaluations/val-72.json", "FAILED", "submission.sh"),
)


def a_byte(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def a_value(data: bytes, rng: random.Random) -> bytes:
    """Another value, often of another type, in the place of one in right JSON or YAML."""
    odd = ("null", "-1", "1e999", "[]", "{}", '"x"', "true", "9" * 30, '"../../x"', "[[1]]", "NaN", '"\\u001b[2J"')
    places = [k for k, byte in enumerate(data) if byte in b":,["]
    if not places:
        return data
    at = rng.choice(places) + 1
    end = next((k for k in range(at, len(data)) if data[k] in b",]}\n"), len(data))
    return data[:at] + b" " + rng.choice(odd).encode() + data[end:]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "torn": lambda data, rng: data[: rng.randrange(len(data))],
    "a bit": a_byte,
    "a value": a_value,
    "empty": lambda data, rng: b"",
    "zeros at its end": lambda data, rng: data[: (k := rng.randrange(len(data)))] + bytes(len(data) - k),
    "UTF-16": lambda data, rng: data.decode().encode("utf-16"),
    "Latin-1": lambda data, rng: data.replace(b"a", "\u00e4".encode("latin-1"), 1),
    "a byte order mark": lambda data, rng: b"\xef\xbb\xbf" + data,
    "another value": lambda data, rng: rng.choice((b"[1]", b"7", b"null", b'"x"', b"{}", b"[{}]", b"- a\n- b\n")),
    "nested": lambda data, rng: b"[" * 100_000,
    "a newer key": lambda data, rng: (
        data.replace(b"{", b'{"colour": "blue", ', 1) if b"{" in data else b"colour: {a: 1}\n" + data
    ),
    "noise": lambda data, rng: rng.randbytes(300),
    "a part twice": lambda data, rng: data + data[rng.randrange(len(data)) :],
}
PLACES = ("a folder", "nothing", "a pipe", "a link to nothing")  # in the place of the file


def damage(path: Path, how: str, rng: random.Random) -> None:
    data = path.read_bytes()
    path.unlink()
    if how in DAMAGES:
        path.write_bytes(DAMAGES[how](data, rng))
    elif how == "a folder":
        (path / "x").mkdir(parents=True)
    elif how == "a pipe":
        os.mkfifo(path)
    elif how == "a link to nothing":
        path.symlink_to("nowhere")


def in_words(case: str, *words: object) -> tuple[int, str]:
    """A command's exit code and text, which has words and no traceback."""
    code, text = called(*words)
    assert code in (EXIT_DONE, EXIT_FAILED, EXIT_USER), case
    assert "Traceback" not in text, (case, text)
    assert text.strip() or code == EXIT_DONE, case
    assert "\x1b" not in text, case
    return code, text


def head(run: RunDir) -> dict[str, bytes]:
    """The bytes of the run's weights; of equal ones the file's header may have its keys in another order."""
    tensors = load_file(run.root / "export" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def look(run: RunDir, known: Results | None, case: str) -> None:
    """The commands that look: a number is the right one, or the run's row says that a file is damaged."""
    _, text = in_words(case, "status", "--runs-dir", run.root.parent, "--json")
    if text.startswith("[") and (found := json.loads(text)):
        (row,) = found
        told = "read" in row["reason"] or "damaged" in row["reason"]
        assert told or known is None or (row["top1"], row["state"]) == (known.after.top1, "done"), (case, row)
    code, text = in_words(case, "report", run.root, "--json")
    if code == EXIT_DONE:
        found = json.loads(text)
        assert len(found["runs"]) + len(found["unfinished"]) == 1, case
        assert not found["runs"] or found["runs"][0]["after"]["top1"] == (known and known.after.top1), case
    in_words(case, "logs", "r", "--runs-dir", run.root.parent)


def start(run: RunDir, undisturbed: RunDir, case: str, by: str) -> None:
    """The next start: the same bits as the undisturbed run's, or a word that says why not."""
    data = undisturbed.root.parents[1] / "data"
    submit = ("submit", "--data", data, "--runs-dir", run.root.parent, *SETTINGS)
    resume = ("resume", "r", "--runs-dir", run.root.parent, "--cluster", "inline")
    code, text = in_words(case, *(submit if by == "submit" else resume))
    if code == EXIT_DONE:
        assert head(run) == head(undisturbed) or "decided again" in text, (case, text)
        assert Results.read(run).after == Results.read(undisturbed).after or "decided again" in text, case
        assert run.state().state == State.DONE, case
    look(run, None if code else Results.read(run), case)


def test_each_command_on_a_damaged_run_says_so(runs: Path, tmp_path: Path) -> None:
    """A seeded sample of file and damage. Every fourth one also starts, or evaluates, the run."""
    done, half = (RunDir(runs / name / "r") for name in ("runs", "half"))
    known = Results.read(done)
    for k in range(COUNT):
        rng = random.Random(k)
        name, how = rng.choice(FILES), rng.choice((*DAMAGES, *PLACES))
        case = f"seed {k}: {name}, {how}"
        for run, result in ((done, known), (half, None)):
            copy = RunDir(tmp_path / f"{k}-{run.root.parent.name}" / "r")
            shutil.copytree(run.root, copy.root, ignore=shutil.ignore_patterns("code", "tb"))
            if not (copy.root / name).is_file():
                continue
            damage(copy.root / name, how, rng)
            look(copy, result, case)
            if k % 4 == 0 and run is half:
                start(copy, done, case, "submit" if k % 8 else "resume")
            elif k % 4 == 2 and run is done:
                in_words(
                    case,
                    *rng.choice((("evaluate", "--run"), ("export", "--run"), ("sweep", "--res", "64", "--run"))),
                    copy.root,
                )
            shutil.rmtree(copy.root.parent)


def test_a_line_after_a_torn_one_is_not_lost(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(b'{"event": "a"}\n{"event": "b", "ti')
    append(file, {"event": "c"})
    assert [line["event"] for line in read_lines(file)] == ["a", "c"]
    assert lines_of(file, event=str).damaged == 1  # the torn one, now that others follow it


def test_files_of_another_kind_are_named_with_the_next_command(tmp_path: Path) -> None:
    for data, why in (
        (b"", "it is empty"),
        (bytes(40), "it holds zero bytes only"),
        ('{"step": 1}'.encode("utf-16"), "it is no UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"step": "1"}', "it: step is '1', which is no whole number"),
        (b'{"restarts": {"failure": 1.5}}', "it: restarts: failure is '1.5', which is no whole number"),
        (b'{"state": "dreaming"}', "which this version does not know"),
        (b"{} x", "Extra data"),
    ):
        (tmp_path / "a.json").write_bytes(data)
        with pytest.raises(Damaged, match=r"a\.json cannot be read") as caught:
            read_json(tmp_path / "a.json", RunState, "mend it")
        assert why in str(caught.value)
        assert str(caught.value).endswith("Next: mend it")
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"step": 1, "colour": "blue"}')
    assert read_json(tmp_path / "a.json", RunState, "").step == 1
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(Damaged):
            read_text(place, "")
    write_json(tmp_path / "sealed.json", {"top1": 71.5}, sealed=True)
    assert read_json(tmp_path / "sealed.json", dict, "") == {"top1": 71.5}
    (tmp_path / "sealed.json").write_text((tmp_path / "sealed.json").read_text().replace("71", "77"))
    with pytest.raises(Damaged, match="its checksum is wrong"):
        read_json(tmp_path / "sealed.json", dict, "")
