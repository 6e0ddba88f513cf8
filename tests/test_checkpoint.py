"""Checkpoints: every value is restored bit for bit, and no crash, flipped bit or full disk fakes one."""

import json
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.run import checkpoint
from rlhf_fast.run.folder import BestModel


def same(a, b) -> bool:
    """Return whether two trees have the same structure, types and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def a_state() -> dict:
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    packed = torch.arange(12.0).view(3, 4)
    return {
        "model": model.state_dict() | {"tied": model.weight},
        "optimizer": optimizer.state_dict(),
        "views": {"whole": packed, "part": packed[1], "transposed": packed.T, "none": torch.zeros(0, 4)},
        "types": [torch.tensor(3), torch.ones(2, dtype=torch.bfloat16), torch.tensor([True]), torch.tensor([2**40])],
        "position": {"step": 7, "epoch": 0.1, "kl": float("inf"), "nan": float("nan"), "name": "é", "flag": True},
        "nested": {"a": (1, [2.5, None], {"b": ()})},
    }


def test_every_kind_of_value_is_restored(tmp_path):
    state = a_state()
    path = checkpoint.save(tmp_path, 7, state)
    assert path == checkpoint.latest(tmp_path)
    assert checkpoint.step_of(path) == 7
    loaded = checkpoint.load(path)
    for name, value in state.items():
        assert same(loaded[name], dict(value) if name == "model" else value), name
    files = {file.name for file in path.iterdir()}
    assert {"manifest.json", "state.json", "model.safetensors", "optimizer.safetensors"} <= files
    assert "position.safetensors" not in files
    assert not any(name.endswith((".pt", ".pkl")) for name in files)


def test_tied_weights_are_stored_once(tmp_path):
    weight = torch.randn(100, 100)
    path = checkpoint.save(tmp_path, 1, {"model": {"embed": weight, "head": weight}})
    assert (path / "model.safetensors").stat().st_size < 1.5 * weight.numel() * 4


def test_what_needs_pickle_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\.a: a set cannot be stored"):
        checkpoint.save(tmp_path, 1, {"x": {"a": {1}}})
    with pytest.raises(ValueError, match=r"key '\$dollar'"):
        checkpoint.save(tmp_path, 1, {"x": {"$dollar": 1}})
    assert checkpoint.latest(tmp_path) is None and not list(tmp_path.iterdir())


def test_random_states_are_restored(tmp_path):
    def draw():
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(2).tolist()

    random.gauss(0, 1)
    path = checkpoint.save(tmp_path, 1, {"random": checkpoint.random_states()})
    first = draw()
    assert draw() != first
    checkpoint.restore_random_states(checkpoint.load(path)["random"])
    assert draw() == first


def test_random_states_of_absent_gpus_are_left_out():
    """A run may go on where there are fewer GPUs than it began with, or none."""
    states = checkpoint.random_states()
    states["cuda"] = [*states.get("cuda", []), torch.zeros(16, dtype=torch.uint8)]
    drawn = torch.randn(3)
    checkpoint.restore_random_states(states)
    assert torch.equal(torch.randn(3), drawn)


def test_only_the_newest_are_kept(tmp_path):
    (tmp_path / "step_3.tmp").mkdir()
    for step in (2, 9, 10, 100):
        checkpoint.save(tmp_path, step, {"a": torch.ones(1)}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_10", "step_100"]
    assert checkpoint.latest(tmp_path).name == "step_100"
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_a_save_removes_its_own_leftovers_only(tmp_path):
    """`best.old.tmp` is the only copy of the best weights if the process died while they were replaced."""
    (tmp_path / "best.old.tmp").mkdir()
    (tmp_path / "best.old.tmp/weights").write_text("best so far")
    (tmp_path / "best.tmp").mkdir()
    (tmp_path / "step_1.tmp").mkdir()
    checkpoint.save(tmp_path, 2, {"a": torch.ones(1)})
    checkpoint.undo_interrupted_write(tmp_path / "best")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step_2"]
    assert (tmp_path / "best/weights").read_text() == "best so far"


def test_the_best_model_survives_a_death_while_it_is_replaced(tmp_path):
    best = BestModel(SimpleNamespace(checkpoints=tmp_path))
    best.update(3, 0.5, lambda folder: (folder / "weights").write_text("step 3"))
    (tmp_path / "best").rename(tmp_path / "best.old.tmp")  # the first of atomic_folder's two renames
    resumed = BestModel(SimpleNamespace(checkpoints=tmp_path))
    resumed.load_state_dict(best.state_dict())
    checkpoint.save(tmp_path, 4, {"a": torch.ones(1)})
    resumed.writer(9, lambda folder: pytest.fail("step 9 is not the best"))(tmp_path / "out")
    assert (tmp_path / "out/weights").read_text() == "step 3"


def truncate(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-1])


def flip_bit(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize("damage", [
    truncate,
    flip_bit,
    lambda path: (path / "manifest.json").unlink(),
    lambda path: (path / "state.json").unlink(),
    lambda path: (path / "manifest.json").write_text('{"step": 2'),
    lambda path: (path / "manifest.json").write_text("[]"),
    lambda path: (path / "state.json").write_text("{}"),
], ids=["truncated", "bit", "no manifest", "no state", "torn manifest", "odd manifest", "other state"])  # fmt: skip
def test_a_damaged_newest_checkpoint_is_skipped(tmp_path, damage):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"model": {"w": torch.full((4,), float(step))}})
    damage(tmp_path / "step_2")
    with pytest.warns(UserWarning, match=r"step_2: skipped"):
        path = checkpoint.latest(tmp_path)
    assert path.name == "step_1" and checkpoint.load(path)["model"]["w"].tolist() == [1.0] * 4
    # The next checkpoint of that step replaces the damaged folder.
    checkpoint.save(tmp_path, 2, {"model": {"w": torch.full((4,), 2.0)}})
    assert checkpoint.latest(tmp_path).name == "step_2"


def test_an_interrupted_save_leaves_no_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"model": {"w": torch.ones(4)}})

    def killed(_path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 2, {"model": {"w": torch.ones(4)}})
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path):
    """The file-size limit of a child process simulates a full disk: the write itself fails, half done."""
    code = f"""
        import resource, signal, torch
        from rlhf_fast.run import checkpoint
        from rlhf_fast.errors import UserError
        checkpoint.save({str(tmp_path)!r}, 1, {{"model": {{"w": torch.ones(100)}}}}, keep=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        for state in ({{"model": {{"w": torch.ones(10000)}}}}, {{"text": "x" * 30000}}):
            try:
                checkpoint.save({str(tmp_path)!r}, 2, state, keep=1)
            except UserError as error:
                print(error)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert run.stdout.count("step_2: could not be written") == 2, run.stderr
    assert "too large" in run.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]
    assert checkpoint.load(checkpoint.latest(tmp_path))["model"]["w"].sum() == 100


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "best"
    with checkpoint.atomic_folder(target) as folder:
        (folder / "weights").write_text("first")
    with pytest.raises(RuntimeError), checkpoint.atomic_folder(target) as folder:
        (folder / "weights").write_text("second")
        raise RuntimeError
    assert (target / "weights").read_text() == "first"
    with checkpoint.atomic_folder(target) as folder:
        (folder / "other").write_text("third")
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    assert [p.name for p in target.iterdir()] == ["other"]


def test_json_is_written_whole(tmp_path):
    checkpoint.write_json(tmp_path / "run.json", {"a": [1]})
    assert json.loads((tmp_path / "run.json").read_text()) == {"a": [1]}
    with pytest.raises(UserError, match=r"nowhere/run.json: could not be written"):
        checkpoint.write_json(tmp_path / "nowhere" / "run.json", {})


def test_a_folder_stays_where_it_is_when_it_cannot_be_replaced(tmp_path, monkeypatch):
    """If the second of two renames fails, the first is undone. After a crash between them, the next write undoes it."""
    target = tmp_path / "best"
    with checkpoint.atomic_folder(target) as folder:
        (folder / "weights").write_text("first")
    rename = Path.rename

    def refused(self, to):
        if self.name == "best.tmp":
            raise OSError(5, "Input/output error")
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(OSError, match="Input/output"), checkpoint.atomic_folder(target) as folder:
            (folder / "weights").write_text("second")
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    assert (target / "weights").read_text() == "first"
    target.rename(tmp_path / "best.old.tmp")
    with pytest.raises(RuntimeError), checkpoint.atomic_folder(target):
        raise RuntimeError
    assert (target / "weights").read_text() == "first"


def test_folders_inside_are_synced_too(tmp_path, monkeypatch):
    synced, fsync = [], checkpoint.fsync
    monkeypatch.setattr(checkpoint, "fsync", lambda path: (synced.append(path.name), fsync(path)))
    with checkpoint.atomic_folder(tmp_path / "best") as folder:
        (folder / "ema").mkdir()
        (folder / "ema/weights").write_text("x")
    assert {"ema", "weights", "best.tmp", tmp_path.name} == set(synced)


def test_json_has_no_infinity(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.write_json(tmp_path / "run.json", {"score": float("-inf")})
    assert not (tmp_path / "run.json").exists()
