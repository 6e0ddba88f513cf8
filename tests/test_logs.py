"""Logs: rows survive a crash exactly once, an alarm is raised when it should be and only then, run.json is complete."""

import ast
import hashlib
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import toy

from rlhf_fast.config.fields import DataConfig, LogConfig, ModelConfig
from rlhf_fast.config.stages import SFTConfig
from rlhf_fast.errors import UserError
from rlhf_fast.run import logs
from rlhf_fast.run.alarms import Alarms
from rlhf_fast.run.identity import input_checksums
from rlhf_fast.run.info import run_info


def test_a_message_is_printed_as_it_is(tmp_path, capfd):
    """No part of it is markup, or the name of a picture, as `:boom:` of a module:function is to rich."""
    log = logs.Log(tmp_path, LogConfig(live=False), "ppo", total=1)
    log.message("reward my:boom: [bold]raised")
    log.close()
    assert "ppo: reward my:boom: [bold]raised" in capfd.readouterr().err


def test_rows_hold_metrics_phases_and_speed(tmp_path):
    log = logs.Log(tmp_path, LogConfig(samples=2), "ppo", total=3, progress_metrics=("objective/kl",))
    with log.phase("generate"):
        pass
    log.metrics(1, {"objective/kl": torch.tensor(0.5), "episode": 8, "bad": math.inf}, tokens=100)
    log.metrics(2, {"objective/kl": 0.25}, tokens=50)
    log.samples(2, [{"response": "é", "score": math.nan, "scores": [1.0, math.inf]}] * 5)
    log.close()
    first, second = toy.rows(tmp_path / "metrics.jsonl")
    expected = {"step": 1, "objective/kl": 0.5, "episode": 8, "bad": None}
    assert {name: first[name] for name in expected} == expected
    assert 0 <= first["time/generate"] <= first["time/step"]
    assert "time/generate" not in second
    assert first["perf/tokens_per_second"] * first["time/step"] == pytest.approx(100)
    assert (
        toy.rows(tmp_path / "samples.jsonl") == [{"step": 2, "response": "é", "score": None, "scores": [1.0, None]}] * 2
    )


def test_rows_are_written_every_so_many_steps_and_at_the_end(tmp_path):
    log = logs.Log(tmp_path, LogConfig(every=2), "sft", total=5)
    for step in range(1, 6):
        log.metrics(step, {"loss": 1.0}, tokens=10)
    log.close()
    written = toy.rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in written] == [2, 4, 5]
    assert written[0]["perf/tokens_per_second"] * written[0]["time/step"] == pytest.approx(20)


def test_resuming_drops_later_and_torn_rows(tmp_path):
    log = logs.Log(tmp_path, LogConfig(), "sft", total=9)
    for step in range(1, 6):
        log.metrics(step, {"loss": step})
        log.samples(step, [{"text": str(step)}])
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    log = logs.Log(tmp_path, LogConfig(), "sft", total=9, start=3)
    for step in range(4, 7):
        log.metrics(step, {"loss": -step})
    log.close()
    written = toy.rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in written] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in written] == [1, 2, 3, -4, -5, -6]
    assert [row["step"] for row in toy.rows(tmp_path / "samples.jsonl")] == [1, 2, 3]


def test_plain_lines_without_a_terminal(tmp_path, capsys):
    log = logs.Log(tmp_path, LogConfig(), "ppo", total=2, progress_metrics=("objective/scores", "absent"))
    for step in (1, 2):
        with log.phase("generate"):
            sum(range(200_000))
        log.metrics(step, {"objective/scores": 0.125}, tokens=7)
    log.close()
    printed = capsys.readouterr().err
    assert re.search(r"ppo 1/2  ETA 0:\d\d:\d\d  scores 0.125  \S+ tok/s  generate \d+%", printed), printed
    log = logs.Log(tmp_path, LogConfig(live=False), "ppo", total=1)
    log.metrics(1, {})
    log.close()
    assert "ppo" not in capsys.readouterr().err


HEALTHY = {
    "val/ratio_first": 1.0001, "objective/kl_token": 0.1, "objective/entropy_token": 2.0,
    "tokens/length": 20.0, "tokens/eos_rate": 0.9, "rollout/ratio_outside": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("change, words", [
    ({"val/ratio_first": 1.05}, "sampling and training disagree"),
    ({"val/ratio_first": 0.9}, "sampling and training disagree"),
    ({"rollout/ratio_outside": 0.05}, "5.0% of the tokens have another probability in training"),
    ({"objective/kl_token": 1.5}, "KL runs away"),
    ({"objective/kl_token": -1.5}, "KL runs away"),
    ({"tokens/eos_rate": 0.0}, "end by themselves; raise sampling.max_new_tokens"),
    ({"tokens/length": 90.0}, "grown from 20 to 90"),
    ({"objective/entropy_token": 0.01}, "entropy fell from 2.000 to 0.010"),
    ({"loss/policy_avg": math.nan}, "loss/policy_avg is nan"),
])  # fmt: skip
def test_an_alarm_is_raised_once_until_its_fault_clears(change, words):
    alarms = Alarms()
    assert alarms(HEALTHY) == []
    faulty = HEALTHY | change
    (text,) = alarms(faulty)
    assert words in text
    assert alarms(faulty) == []
    assert alarms(HEALTHY) == []
    assert alarms(faulty) == [text]


def test_brackets_in_a_message_are_not_markup(tmp_path, capsys):
    log = logs.Log(tmp_path, LogConfig(), "ppo", total=1)
    log.message("data[1].jsonl: 3 rows [/no]")
    log.close()
    assert capsys.readouterr().err == "ppo: data[1].jsonl: 3 rows [/no]\n"


def test_alarms_keep_their_baseline_over_a_resume(tmp_path, capsys):
    log = logs.Log(tmp_path, LogConfig(), "ppo", total=3)
    log.metrics(1, HEALTHY)
    log.close()
    log = logs.Log(tmp_path, LogConfig(), "ppo", total=3, start=1)
    log.metrics(2, HEALTHY | {"tokens/length": 90.0})
    log.close()
    assert "alarm at step 2" in capsys.readouterr().err
    assert "grown" in toy.rows(tmp_path / "metrics.jsonl")[1]["alarms"][0]


def test_run_json_names_config_versions_and_data(tmp_path):
    data = toy.demonstrations(tmp_path / "data.jsonl")
    cfg = SFTConfig(model=ModelConfig(toy.model_at(tmp_path)), data=DataConfig(data), log=LogConfig())
    info = json.loads(json.dumps(run_info("sft", cfg.log) | input_checksums(cfg)))
    assert info["stage"] == "sft"
    assert info["config"]["every"] == 1
    assert info["config"]["sinks"] == []
    assert info["versions"]["torch"] == torch.__version__
    assert "python" in info["versions"]
    assert info["data"] == {data: hashlib.sha256(Path(data).read_bytes()).hexdigest()}
    assert info["models"].keys() == {str(tmp_path / "model")}


def test_sinks_are_named_and_optional(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no sink is called 'wanbd'"):
        logs.Log(tmp_path, LogConfig(sinks=("wanbd",)), "ppo", total=1)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="pip install trackio"):
        logs.Log(tmp_path, LogConfig(sinks=("trackio",)), "ppo", total=1)


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    log = logs.Log(tmp_path, LogConfig(), "ppo", total=1)

    class Full:
        name = str(tmp_path / "metrics.jsonl")

        def write(self, _text):
            raise OSError(28, "No space left on device")

    log._metrics.close()
    monkeypatch.setattr(log, "_metrics", Full())
    with pytest.raises(UserError, match=r"metrics.jsonl: could not be written .*No space left"):
        log.metrics(1, {})


def test_only_a_newline_ends_a_row(tmp_path):
    """A response may contain U+2028, U+0085 or a form feed; the rows after it must survive."""
    text = "a\u2028b\u2029c\x85d\x0ce\x1ef"
    log = logs.Log(tmp_path, LogConfig(), "ppo", total=4)
    for step in (1, 2, 3):
        log.metrics(step, {"loss": step})
        log.samples(step, [{"response": text}])
    log.close()
    logs.Log(tmp_path, LogConfig(), "ppo", total=4, start=3).close()
    assert [row["response"] for _, row in logs.read_rows(tmp_path / "samples.jsonl")] == [text] * 3
    assert [row["step"] for _, row in logs.read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_damaged_row_before_the_last_is_a_sentence(tmp_path):
    """A crash can cut only the last line short. For any other line the rows after it are not thrown away."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not JSON"):
        logs.Log(tmp_path, LogConfig(), "ppo", total=4, start=3)
    assert file.read_bytes() == before
    file.write_text('{"step": 1}\n{"st\n')
    assert [row for _, row in logs.read_rows(file)] == [{"step": 1}]


def test_text_files_do_not_depend_on_the_locale():
    """Every file that is opened for text is opened as UTF-8."""
    files = [
        file
        for file in Path(logs.__file__).parents[1].rglob("*.py")
        if file.parent.name != "demo"  # it reads and writes its own ASCII files only
    ]
    missing = [
        f"{file.name}:{node.lineno}: {ast.unparse(node.func)} without encoding"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text(node) and "encoding" not in {k.arg for k in node.keywords}
    ]
    assert not missing


def opens_text(call):
    """Return whether a call is open(...) or path.open(...) in text mode, read_text or write_text."""
    function = ast.unparse(call.func)
    name = function.rpartition(".")[2]
    modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    opened = name == "open" and function not in ("os.open", "gzip.open") and not any("b" in mode for mode in modes)
    return opened or name in ("read_text", "write_text")
