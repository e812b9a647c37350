"""A run's states: the table of docs/architecture.md is the code's, and state.json of another version is readable."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import NOT_DONE, TRANSITIONS, UNFINISHED, WORKING, Event, RunState, State

DOCS = Path(__file__).parents[2] / "docs" / "architecture.md"
WORDS = {"any": set(State), "any but done": NOT_DONE, "any unfinished": UNFINISHED, "running, stopping": WORKING}


def test_the_table_in_the_docs_is_the_codes() -> None:
    section = DOCS.read_text().partition("## A run's states")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| `([^`]+)` \|", section, re.MULTILINE)
    assert {event: (WORDS[of], to) for event, of, to in rows} == {
        event: (t.of, t.to) for event, t in TRANSITIONS.items()
    }
    for state in State:
        assert f"`{state}`" in section


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("state", State)
def test_an_event_moves_the_states_of_its_row_and_no_other(tmp_path: Path, state: State, event: Event) -> None:
    run = RunDir(tmp_path)
    run.state_file.write_text(json.dumps({"state": state, "step": 7}))
    of, to = TRANSITIONS[event]
    applies = state in of
    assert run.update_state(event, reason="why") is applies
    after = run.state()
    assert (after.state, after.reason, after.step) == ((to, "why", 7) if applies else (state, None, 7))


def test_what_was_cancelled_or_failed_is_not_cancelled_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.update_state(Event.STARTED)
    run.fail("disk full", "make room")
    run.cancel("too late")
    assert (run.state().state, run.state().reason) == (State.FAILED, "disk full. Next: make room")
    assert "cancelled" not in run.events.read_text()


def test_every_field_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.state() == RunState()
    run.update_state(Event.STARTED, nodes=("n1", "n2"), world_size=4, job_id="7_1", eta_s=1.5, last_failure_step=3)
    state = run.state()
    assert (state.nodes, state.world_size, state.job_id, state.slurm_job) == (("n1", "n2"), 4, "7_1", "7_1")
    assert (state.eta_s, state.last_failure_step, state.state) == (1.5, 3, State.RUNNING)
    run.update_state(job_id="local-12")
    assert (run.state().job_id, run.state().slurm_job) == ("local-12", None)


def test_a_file_of_another_version_is_read(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.state_file.write_text(json.dumps({"state": "requeued", "step": 3, "colour": "blue", "reason": None}))
    assert (run.state().state, run.state().step, run.state().total_steps) == (State.REQUEUED, 3, None)
    run.state_file.write_text(json.dumps({"state": "dreaming"}))
    assert run.state().state == State.PENDING


def test_a_misspelt_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="stepp"):
        RunDir(tmp_path).update_state(stepp=3)


def test_a_finished_run_does_not_fail_afterwards(tmp_path: Path) -> None:
    """A rank that breaks while it leaves: state.json, DONE and FAILED must not contradict each other."""
    run = RunDir(tmp_path)
    run.finish()
    run.fail("the connection was closed", "again")
    assert run.state().state == State.DONE
    assert run.done.exists()
    assert not run.failed.exists()


@pytest.mark.parametrize(
    ("folder", "root"), [("r", "."), ("r/jobs", ".."), ("r/jobs/j", "../../../r"), ("", "r"), ("r", "../r")]
)
def test_a_run_has_its_name_however_its_folder_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, root: str
) -> None:
    (tmp_path / "r" / "jobs" / "j").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / folder)
    run = RunDir(Path(root))
    assert run.name == "r"
    *others, option, given = shlex.split(run.command("status"))
    assert others[-2:] == ["status", "r"]
    assert (option, Path(given).resolve()) == ("--runs-dir", tmp_path.resolve())


def test_a_job_has_the_name_of_its_run_in_front_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r" / "jobs" / "j").mkdir(parents=True)
    RunDir(tmp_path / "r").config_file.touch()
    for folder, root in (("r/jobs/j", "."), ("r", "jobs/j"), ("", "r/jobs/j")):
        monkeypatch.chdir(tmp_path / folder)
        assert RunDir(Path(root)).name == "r/jobs/j"
        assert "status r/jobs/j --runs-dir" in RunDir(Path(root)).command("status")


def test_a_link_to_a_run_keeps_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "newest").symlink_to("r")
    assert RunDir(tmp_path / "newest").name == "newest"
