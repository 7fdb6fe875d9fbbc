"""Background jobs with real processes: waited for, stopped, killed, resumed, watched and damaged."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from conftest import brain, save
from models_for_tests import tiny_model
from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.jobs import (
    JobSpec,
    JobState,
    find_job,
    free_name,
    jobs_folder,
    list_jobs,
    queue,
    read_job,
    remove_job,
    resume_job,
    say_seconds,
    stop_job,
    submit_job,
    training_job,
)
from napari_brainmvp.jobs.job import born_at
from napari_brainmvp.jobs.queue import device_names, freest_gpu, gpu_count
from napari_brainmvp.models import find_model
from napari_brainmvp.training.pretraining.spec import DataSource, PretrainingSpec

COMMAND = [str(Path(sys.executable).parent / "brainmvp")]
QUICK = {"crop": 16, "held_out": 0, "minutes": 0.0, "precision": "32-true", "accelerator": "cpu"}
PATIENCE = 180


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    for seed in range(3):
        for key in ("t1", "flair"):
            save(tmp_path / "studies" / f"sub-{seed}" / f"sub-{seed}_{key}.nii.gz", brain(seed=seed))
    return tmp_path / "studies"


@pytest.fixture
def submit(home, studies, tmp_path):
    """Submit a job; whatever still runs at the end of the test is killed."""

    def start(name: str, **changes):
        settings = {"data": (DataSource(path=str(studies)),), "max_steps": 12, **QUICK, **changes}
        return submit_job(training_job("pretrain", PretrainingSpec(**settings), name, cache=tmp_path / "cache"))

    yield start
    for job in list_jobs():
        if job.state.active and job.beat is not None:
            os.kill(job.beat.pid, signal.SIGKILL)


def wait_for(condition, seconds: float = PATIENCE):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError([(j.name, j.state, j.reason, j.log.read_text()[-2000:]) for j in list_jobs()])


def wait_for_end(name: str):
    wait_for(lambda: not find_job(name).state.active)
    return find_job(name)


def steps(job) -> list[int]:
    path = job.run / "metrics.csv"
    return [int(row["step"]) for row in csv.DictReader(path.open())] if path.exists() else []


def brainmvp(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=PATIENCE)


def test_a_job_from_the_command_line_makes_a_model_while_two_watch(home, studies, tmp_path):
    options = [f"--set={k}={v}" for k, v in QUICK.items()] + ["--max-steps=4", "--cache", str(tmp_path / "cache")]
    started = time.monotonic()
    done = brainmvp("pretrain", "--background", "--name", "mine", "--data", str(studies), *options)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 15  # it submits and returns
    seen: list[set[str]] = [set(), set()]

    def watch(states: set[str]) -> None:
        while "done" not in states and "failed" not in states:
            states.add(read_job(jobs_folder() / "mine").state.value)

    watchers = [threading.Thread(target=watch, args=(states,)) for states in seen]
    for watcher in watchers:
        watcher.start()
    followed = brainmvp("jobs", "logs", "-f", "mine")
    for watcher in watchers:
        watcher.join(PATIENCE)
    assert "Pre-training" in followed.stdout
    assert followed.stdout.strip().endswith("mine is done.")
    assert all(states <= {"queued", "running", "done"} and "running" in states for states in seen)
    assert find_model("mine").card.task == "pretraining"
    job = find_job("mine")
    assert (job.state, job.model, job.fraction, steps(job)) == (JobState.done, "mine", 1.0, [1, 2, 3, 4])
    assert re.search(r"mine\W+pretrain\W+done\W+model mine", brainmvp("jobs", "list").stdout)
    assert str(job.folder) in brainmvp("jobs", "show", "mine").stdout
    again = brainmvp("pretrain", "--background", "--name", "mine", "--data", str(studies))
    assert again.returncode == 2
    assert "already is a job" in again.stderr
    assert brainmvp("jobs", "resume", "mine").returncode == 2
    assert brainmvp("jobs", "remove", "mine").returncode == 0
    assert list_jobs() == []
    assert find_model("mine").weights.exists()  # the model stays


def test_a_killed_job_has_failed_and_goes_on_from_its_checkpoint(submit, home):
    submit("killed")
    wait_for(lambda: len(steps(find_job("killed"))) >= 3)
    running = find_job("killed")
    assert running.state is JobState.running
    with pytest.raises(BrainMVPError, match="stop it before"):
        remove_job("killed")
    with pytest.raises(BrainMVPError, match="only a stopped or failed"):
        resume_job("killed")
    os.kill(running.beat.pid, signal.SIGKILL)
    wait_for(lambda: find_job("killed").state is JobState.failed, 10)
    assert "ended without a word" in find_job("killed").reason
    tiny_model(home / "models", "killed")  # somebody took the name meanwhile
    resume_job("killed")
    ended = wait_for_end("killed")
    assert ended.state is JobState.done, ended.log.read_text()
    assert ended.model == "killed-2"
    assert steps(ended) == list(range(1, 13))


def test_jobs_take_turns_on_a_device_whether_stopped_or_killed(submit):
    submit("first", max_steps=5000)
    wait_for(lambda: find_job("first").state is JobState.running)
    submit("second", max_steps=2)
    submit("third", max_steps=2)
    wait_for(lambda: (beat := find_job("third").beat) is not None and beat.step == "Waiting for cpu")
    time.sleep(1.5)
    assert [job.state.value for job in list_jobs()] == ["queued", "queued", "running"]
    stop_job("third")
    assert wait_for_end("third").reason == "Stopped while it waited."
    wait_for(lambda: len(steps(find_job("first"))) >= 2)
    assert stop_job("first").state is JobState.stopping
    first, second = wait_for_end("first"), wait_for_end("second")
    assert (first.state, second.state) == (JobState.stopped, JobState.done)
    assert "Resume" in first.reason
    last = steps(first)[-1]
    assert (first.run / f"checkpoint-{last:08d}.pt").exists()
    assert second.file.started >= first.beat.at - 1.5  # not before the device was free
    resume_job("first")
    wait_for(lambda: len(steps(find_job("first"))) > last)
    submit("fourth", max_steps=2)
    wait_for(lambda: (beat := find_job("fourth").beat) is not None and beat.step == "Waiting for cpu")
    os.kill(find_job("first").beat.pid, signal.SIGKILL)  # its device is free all the same
    assert wait_for_end("fourth").state is JobState.done
    once = steps(find_job("first"))
    assert once == list(range(1, len(once) + 1))


def test_a_job_outlives_whoever_started_it(submit, home, studies, tmp_path):
    spec = PretrainingSpec(data=(DataSource(path=str(studies)),), max_steps=3, **QUICK)
    path = tmp_path / "job.json"
    path.write_text(training_job("pretrain", spec, "orphan", cache=tmp_path / "cache").model_dump_json())
    code = (
        "import sys, time; from pathlib import Path; from napari_brainmvp.jobs import JobSpec, submit_job\n"
        "submit_job(JobSpec.model_validate_json(Path(sys.argv[1]).read_text())); time.sleep(600)\n"
    )
    window = subprocess.Popen([sys.executable, "-c", code, str(path)], start_new_session=True)
    wait_for(lambda: any(job.beat for job in list_jobs()))
    os.killpg(window.pid, signal.SIGKILL)
    window.wait()
    tiny_model(home / "models", "orphan")  # somebody takes the name meanwhile: nothing is lost
    ended = wait_for_end("orphan")
    assert (ended.state, ended.model) == (JobState.done, "orphan-2")


def test_a_users_mistake_is_the_reason(submit, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    submit("empty", data=(DataSource(path=str(empty)),))
    job = wait_for_end("empty")
    assert job.state is JobState.failed
    assert "no study to train on" in job.reason
    assert str(empty) in job.reason


def fabricate(name: str, queued: float = 5000, **beat) -> Path:
    """Write the files of a job that claims to run."""
    folder = jobs_folder() / name
    folder.mkdir(parents=True)
    settings = PretrainingSpec(data=(DataSource(path="synthetic:1"),)).model_dump(mode="json")
    (folder / "spec.json").write_text(JobSpec(kind="pretrain", name=name, settings=settings).model_dump_json())
    (folder / "state.json").write_text(json.dumps({"state": "running", "queued": time.time() - queued}))
    said = {"pid": os.getpid(), "host": socket.gethostname(), "born": 0.0, "at": time.time(), **beat}
    (folder / "heartbeat.json").write_text(json.dumps(said))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a start does not move with the clock")
def test_when_a_process_started_does_not_move_with_the_clock(monkeypatch):
    process = psutil.Process()
    before, real = born_at(process), psutil._pslinux.boot_time
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: real() + 30)  # what the system says once it was set
    assert born_at(psutil.Process()) == pytest.approx(before, abs=0.1)


def test_the_dead_are_known_by_more_than_their_number(home):
    born = born_at(psutil.Process())
    ghost = subprocess.Popen([sys.executable, "-c", "pass"])
    wait_for(lambda: psutil.Process(ghost.pid).status() == psutil.STATUS_ZOMBIE, 30)
    cases = {
        "lives": ({"born": born}, JobState.running),
        "sleeps": ({"born": born, "at": time.time() - 4000}, JobState.running),  # the lid was shut; it goes on
        "another-of-that-number": ({"born": born - 900}, JobState.failed),
        "nobody": ({"pid": 2**22 + 1}, JobState.failed),
        "zombie": ({"pid": ghost.pid, "born": born_at(psutil.Process(ghost.pid))}, JobState.failed),
        "elsewhere": ({"host": "another"}, JobState.running),
        "elsewhere-silent": ({"host": "another", "at": time.time() - 100}, JobState.failed),
        "begins": ({"queued": 5, "at": time.time() - 600}, JobState.running),  # resumed; it has not spoken yet
        "never-began": ({"queued": 500, "at": time.time() - 600}, JobState.failed),
    }
    for name, (beat, _) in cases.items():
        fabricate(name, **beat)
    found = {job.name: job.state for job in list_jobs()}
    ghost.wait()
    assert found == {name: state for name, (_, state) in cases.items()}


@pytest.mark.parametrize("damage", ["no spec", "half a spec", "no state", "another kind", "binary"])
def test_a_damaged_job_is_listed_and_can_be_removed(home, damage):
    good, bad = fabricate("good", born=0.0), fabricate("bad")
    match damage:
        case "no spec":
            (bad / "spec.json").unlink()
        case "half a spec":
            (bad / "spec.json").write_text((bad / "spec.json").read_text()[:50])
        case "no state":
            (bad / "state.json").unlink()
        case "another kind":
            (bad / "spec.json").write_text((bad / "spec.json").read_text().replace("pretrain", "paint"))
        case "binary":
            (bad / "spec.json").write_bytes(b"\xff\x00\xfe" * 40)
    (jobs_folder() / "a file").write_text("not a job")
    jobs = {job.name: job for job in list_jobs()}
    assert set(jobs) == {"good", "bad"}
    assert jobs["bad"].state is JobState.failed
    assert "damaged" in jobs["bad"].reason
    with pytest.raises(BrainMVPError, match="damaged"):
        resume_job("bad")
    assert "damaged" in brainmvp("jobs", "list").stdout
    remove_job("bad")
    assert not bad.exists()
    assert good.exists()


def test_names_and_numbers(home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "relative").mkdir()
    spec = PretrainingSpec(data=(DataSource(path="relative"), DataSource(path="synthetic:2")))
    made = training_job("pretrain", spec, "a-name")
    assert made.settings["data"][0]["path"] == str(tmp_path / "relative")
    assert made.settings["data"][1]["path"] == "synthetic:2"
    for name in ("", "../up", "Upper", "a/b", ".hidden"):
        with pytest.raises(BrainMVPError, match="not a name"):
            training_job("pretrain", spec, name)
    with pytest.raises(BrainMVPError, match="gone is neither a folder"):
        training_job("pretrain", PretrainingSpec(data=(DataSource(path="gone"),)), "a-name")
    with pytest.raises(BrainMVPError, match="one machine"):
        training_job("pretrain", spec.model_copy(update={"nodes": 2}), "a-name")
    with pytest.raises(BrainMVPError, match="already is a model"):
        submit_job(training_job("pretrain", spec, "tiny"))
    with pytest.raises(BrainMVPError, match="There is no job 'x'"):
        find_job("x")
    assert free_name("tiny") == "tiny-1"
    fabricate("tiny-1")
    assert free_name("tiny") == "tiny-2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert device_names("cuda:0", 2) == ("cuda:2", "cuda:3")
    assert device_names("cpu", 1) == ("cpu",)


def test_a_job_takes_the_gpu_with_the_fewest_jobs_or_the_one_it_names(home, monkeypatch, tmp_path):
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(queue, "_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_count() == 0
    for number in range(4):
        (tmp_path / f"nvidia{number}").touch()
    assert gpu_count() == 4
    born, mine = born_at(psutil.Process()), jobs_folder() / "mine"
    assert freest_gpu(mine, 1) == 0
    takes = {"a": ["cuda:0"], "b": ["cuda:1", "cuda:2"], "c": ["cuda:3"], "d": ["cuda:3"]}
    for name, devices in takes.items():
        folder = fabricate(name, born=born)
        state = json.loads((folder / "state.json").read_text()) | {"devices": devices}
        (folder / "state.json").write_text(json.dumps(state))
    assert freest_gpu(mine, 1) == 0
    assert freest_gpu(jobs_folder() / "a", 1) == 0, "a job does not count itself"
    assert freest_gpu(mine, 2) == 0
    ended = json.loads((jobs_folder() / "b" / "state.json").read_text()) | {"state": "done"}
    (jobs_folder() / "b" / "state.json").write_text(json.dumps(ended))
    assert (freest_gpu(mine, 1), freest_gpu(mine, 2)) == (1, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert (gpu_count(), freest_gpu(mine, 1)) == (2, 1)
    spec = PretrainingSpec(data=(DataSource(path="synthetic:1"),), accelerator="cuda:3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_count() == 0, "they are hidden on purpose"
    job = training_job("pretrain", spec, "third")
    assert (job.device, job.settings["accelerator"]) == ("cuda:3", "cuda")
    with pytest.raises(BrainMVPError, match="cuda:1,2: name one GPU"):
        training_job("pretrain", spec.model_copy(update={"accelerator": "cuda:1,2"}), "fourth")
    said = {5: "5 s", 89: "89 s", 600: "10 min", 2 * 3600 + 1260: "2 h 20 min", 3600 * 50: "2 days 2 h"}
    assert {k: say_seconds(k) for k in said} == said
