"""The bench of other trainers' steps compares what agrees, and counts the memory of both heads."""

import json

import pytest

from rlhf_fast import ops
from rlhf_fast.bench import trainer_step
from rlhf_fast.integrations.hooks import library_version

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ops.linear_logprobs.chosen("cpu") == "reference", reason="no compiled kernels"),
    pytest.mark.skipif(library_version("trl") is None, reason="trl is not installed"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of TRL's own defaults
]


def test_each_trainer_has_a_row(tmp_path, one_thread, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "trainers.json"
    assert trainer_step.main(["--device", "cpu", "--tiny", "--save", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [row["row"].partition(",")[0] for row in found["rows"]] == [*trainer_step.TITLES.values()]
    assert not found["notes"]
    for row in found["rows"]:
        assert row["checked"].startswith("agree") and max(row["errors"].values()) < 1e-5
        weight = 1031 * 32 * 4
        assert weight <= row["head_bytes"] < row["others"]["as it is"]["head_bytes"] / 2
        assert row["peak_bytes"] < row["others"]["as it is"]["peak_bytes"]
    assert "head alone: " in capsys.readouterr().out


def test_a_step_that_differs_is_told(monkeypatch, one_thread, capsys):
    make, scale = trainer_step.STEPS["trainer"], [2.0, 1.0]

    def wrong(tiny, folder):
        """Return a step whose loss is twice as large in the first side that is asked."""
        step = make(tiny, folder)
        return step._replace(loss=lambda: step.loss() * (scale.pop(0) if scale else 1))

    monkeypatch.setitem(trainer_step.STEPS, "trainer", wrong)
    assert trainer_step.main(["--device", "cpu", "--tiny", "--only", "trainer"]) == 1
    assert "DIFFER" in capsys.readouterr().out


def test_another_device_and_name_are_refused(capsys):
    for options in (["--device", "cuda"], ["--device", "cpu", "--only", "sft,ppo"]):
        with pytest.raises(SystemExit):
            trainer_step.main(options)
    shown = capsys.readouterr().err
    assert "--device: the steps are measured on a CPU alone" in shown and "--only: there is no ppo" in shown
