"""A run that is stopped, in whatever way, and resumed ends with the same weights, to the bit, as an uninterrupted one.

Each attempt is a process of its own, forked from a server that has done the imports. SIGKILL comes at a chosen fsync,
in the middle of a checkpoint or of the last save, and at random moments.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import toy

from rlhf_fast.config.fields import LogConfig, LoraConfig, ModelConfig
from rlhf_fast.run import checkpoint
from rlhf_fast.run import folder as run_folder
from rlhf_fast.stages import ppo, reward, sft

STAGES = {"sft": sft, "reward": reward, "ppo": ppo}
LOG = LogConfig(checkpoint_every=2, samples=2, live=False)
CONFIGS = {
    "sft": lambda folder, out: toy.sft(folder, out, log=LOG, epochs=3),
    "reward": lambda folder, out: toy.reward(folder, out, log=LOG, epochs=2),
    "ppo": lambda folder, out: toy.ppo(folder, out, log=LOG, select="reward"),
}
pytestmark = [pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL"), pytest.mark.usefixtures("one_thread")]


def attempt(stage: str, folder: str, out: str, die_at: int, minutes: float = 0) -> None:
    """Run the stage in a child process, with SIGKILL instead of the `die_at`-th fsync (0: none). minutes: write
    checkpoints by time instead."""
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    count, fsync = [0], os.fsync

    def counted(descriptor):
        count[0] += 1
        if count[0] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = counted
    cfg = CONFIGS[stage](Path(folder), out)
    if minutes:
        cfg = replace(cfg, log=replace(LOG, checkpoint_every=0, checkpoint_minutes=minutes))
    STAGES[stage].run(cfg)
    Path(folder, "fsyncs").write_text(str(count[0]))


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlhf_fast.stages.ppo", "rlhf_fast.stages.sft", "rlhf_fast.stages.reward", "toy"])
    return context


def child(processes, *arguments):
    process = processes.Process(target=attempt, args=arguments)
    process.start()
    return process


@pytest.fixture(scope="module", params=list(STAGES))
def uninterrupted(request, processes, tmp_path_factory):
    """Return (stage, its folder, seconds it took, fsyncs it made) of an uninterrupted run, in `whole`."""
    folder = tmp_path_factory.mktemp(request.param)
    CONFIGS[request.param](folder, "whole")  # writes the model and the data
    process = child(processes, request.param, str(folder), "whole", 0)
    process.join(120)
    assert process.exitcode == 0
    rows = toy.rows(folder / "whole/metrics.jsonl")
    return request.param, folder, sum(row["time/step"] for row in rows), int((folder / "fsyncs").read_text())


def weights(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every weight file."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*/model.safetensors")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def assert_same_run(folder: Path, out: str) -> None:
    """Compare a resumed run with the uninterrupted one."""
    resumed, whole = folder / out, folder / "whole"
    assert weights(resumed)
    assert weights(resumed) == weights(whole)
    assert toy.metrics(resumed) == toy.metrics(whole), "a step is missing, written twice, or different"
    assert (resumed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    finished = [json.loads((run / "run.json").read_text())["finished"] for run in (resumed, whole)]
    assert finished[0] == finished[1]


def test_killed_inside_its_saves(uninterrupted, processes):
    """Killed up to three times, each time at another fsync of the saving: none of them spoils the run."""
    stage, folder, _, fsyncs = uninterrupted
    rng = random.Random(stage)
    kills = 0
    while kills < 3:
        process = child(processes, stage, str(folder), "torn", rng.randrange(1, fsyncs + 1))
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    else:
        process = child(processes, stage, str(folder), "torn", 0)
        process.join(120)
    assert process.exitcode == 0 and kills
    assert_same_run(folder, "torn")


def test_killed_at_random_moments(uninterrupted, processes):
    """Killed twice, some time into an early step, so that the run is not over yet."""
    stage, folder, seconds, _ = uninterrupted
    rng = random.Random()
    metrics, steps = folder / "killed/metrics.jsonl", len(toy.metrics(folder / "whole"))
    for after in (1, steps // 2):
        process = child(processes, stage, str(folder), "killed", 0)
        while process.is_alive() and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= after):
            time.sleep(0.001)
        time.sleep(rng.random() * seconds / steps)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed"
    process = child(processes, stage, str(folder), "killed", 0)
    process.join(120)
    assert process.exitcode == 0
    assert_same_run(folder, "killed")


def stopped_after(monkeypatch, stage: str, folder: Path, out: str, steps: int) -> None:
    """Run the stage in this process and send SIGTERM during step `steps` + 1."""
    from rlhf_fast.training import learner

    monkeypatch.chdir(folder)
    step, count = learner.Learner.step, [0]

    def counted(self, *arguments):
        count[0] += 1
        if count[0] == steps + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(learner.Learner, "step", counted)
        with pytest.raises(SystemExit) as stop:
            STAGES[stage].run(CONFIGS[stage](folder, out))
    assert stop.value.code == 143


@pytest.mark.exhaustive(1)
def test_sigterm_saves_and_exits_with_143(uninterrupted, monkeypatch):
    stage, folder, *_ = uninterrupted
    stopped_after(monkeypatch, stage, folder, "stopped", 4)
    path = checkpoint.latest(folder / "stopped/checkpoints")
    assert path is not None and checkpoint.step_of(path) == len(toy.rows(folder / "stopped/metrics.jsonl"))
    assert "finished" not in json.loads((folder / "stopped/run.json").read_text())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    STAGES[stage].run(CONFIGS[stage](folder, "stopped"))
    assert_same_run(folder, "stopped")


@pytest.mark.exhaustive(1)
def test_a_torn_newest_checkpoint_is_skipped(uninterrupted, monkeypatch):
    stage, folder, *_ = uninterrupted
    stopped_after(monkeypatch, stage, folder, "half", 7)
    newest = checkpoint.latest(folder / "half/checkpoints")
    victim = max(newest.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=rf"{newest.name}: skipped"):
        STAGES[stage].run(CONFIGS[stage](folder, "half"))
    assert_same_run(folder, "half")


@pytest.mark.exhaustive(1)
def test_without_any_checkpoint_it_starts_over(uninterrupted, monkeypatch):
    stage, folder, *_ = uninterrupted
    stopped_after(monkeypatch, stage, folder, "over", 4)
    shutil.rmtree(folder / "over/checkpoints")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        STAGES[stage].run(CONFIGS[stage](folder, "over"))
    assert_same_run(folder, "over")


def test_checkpoints_do_not_change_the_result(uninterrupted, monkeypatch):
    stage, folder, *_ = uninterrupted
    monkeypatch.chdir(folder)
    cfg = CONFIGS[stage](folder, "seldom")
    STAGES[stage].run(replace(cfg, log=replace(LOG, checkpoint_every=0)))
    assert weights(folder / "seldom") == weights(folder / "whole")


@pytest.mark.exhaustive(1)
def test_checkpoints_by_time(uninterrupted, monkeypatch):
    """One is written by the first step that ends checkpoint_minutes after the last one, whatever wrote that."""
    stage, folder, *_ = uninterrupted
    monkeypatch.chdir(folder)
    cfg = CONFIGS[stage](folder, "minutes")
    now, written, steps = [0.0], [], len(toy.metrics(folder / "whole"))
    save, metrics = checkpoint.save, run_folder.Log.metrics

    def at_a_step(self, step, *arguments, **options):
        now[0] += 60.0
        metrics(self, step, *arguments, **options)

    monkeypatch.setattr(run_folder, "clock", lambda: now[0])
    monkeypatch.setattr(run_folder.Log, "metrics", at_a_step)
    monkeypatch.setattr(checkpoint, "save", lambda *a: written.append(a[1]) or save(*a))
    by_time = replace(LOG, checkpoint_every=0, checkpoint_minutes=1.5)
    STAGES[stage].run(replace(cfg, log=by_time))
    assert written == sorted({*range(2, steps + 1, 2), steps})
    assert weights(folder / "minutes") == weights(folder / "whole")
    written.clear()
    both = replace(LOG, checkpoint_every=4, checkpoint_minutes=3)
    STAGES[stage].run(replace(CONFIGS[stage](folder, "both"), log=both))
    expected = {step for step in range(1, steps + 1) if step % 4 in (0, 3)} | {steps}
    assert written == sorted(expected)
    written.clear()
    STAGES[stage].run(
        replace(CONFIGS[stage](folder, "none"), log=replace(both, checkpoint_every=0, checkpoint_minutes=0))
    )
    assert written == [steps]


def test_killed_between_checkpoints_by_time(uninterrupted, processes):
    """A run whose only checkpoints are those by time goes on after SIGKILL from the last one, with the same weights."""
    stage, folder, *_ = uninterrupted
    steps = len(toy.metrics(folder / "whole"))
    metrics = folder / "timed/metrics.jsonl"
    process = processes.Process(target=attempt, args=(stage, str(folder), "timed", 0, 1e-9))
    process.start()
    while process.is_alive() and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= steps // 2):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed"
    path = checkpoint.latest(folder / "timed/checkpoints")
    assert path is not None and checkpoint.step_of(path) >= steps // 2 - 1
    process = processes.Process(target=attempt, args=(stage, str(folder), "timed", 0, 1e-9))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert_same_run(folder, "timed")


@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.exhaustive(1)
def test_bfloat16_with_lora_resumes_too(tmp_path, stage, monkeypatch):
    """The float32 master weights and the adapters, which alone are trained, are restored."""
    pytest.importorskip("peft")
    model = ModelConfig(toy.model_at(tmp_path), dtype="bfloat16", lora=LoraConfig(rank=2, dropout=0.1))
    models = {"policy": model, "value": replace(model, path="")} if stage == "ppo" else {"model": model}
    make = CONFIGS[stage]
    monkeypatch.setitem(CONFIGS, stage, lambda folder, out: replace(make(folder, out), **models))
    monkeypatch.chdir(tmp_path)
    STAGES[stage].run(CONFIGS[stage](tmp_path, "whole"))
    stopped_after(monkeypatch, stage, tmp_path, "stopped", 3)
    STAGES[stage].run(CONFIGS[stage](tmp_path, "stopped"))
    assert_same_run(tmp_path, "stopped")


@pytest.mark.exhaustive(1)
def test_a_full_disk_while_saving_loses_nothing(uninterrupted, monkeypatch):
    """The second checkpoint cannot be written: one sentence, and the run resumes from the first once there is room."""
    from rlhf_fast.errors import UserError

    stage, folder, *_ = uninterrupted
    monkeypatch.chdir(folder)
    saved, save_file = [0], checkpoint.save_file

    def full(tensors, path):
        saved[0] += "random" in str(path)
        if saved[0] == 2:
            Path(path).write_bytes(b"part")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(UserError, match=r"step_4: could not be written .*No space left on device"):
            STAGES[stage].run(CONFIGS[stage](folder, "full"))
    assert checkpoint.latest(folder / "full/checkpoints").name == "step_2"
    STAGES[stage].run(CONFIGS[stage](folder, "full"))
    assert_same_run(folder, "full")
