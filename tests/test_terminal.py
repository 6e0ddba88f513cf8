"""A terminal of 60, 80, 100 and 160 columns: parts of the live line are whole, samples stand beside their score."""

import io
import json
import re
import sys
import threading
import time
from pathlib import Path

import pseudo_terminal
import pytest
import rich.live
import toy
from rich.console import Console
from rich.text import Text

from rlhf_fast.config.fields import BadSetting, DataConfig, LogConfig
from rlhf_fast.data import read_comparisons, read_demonstrations, read_prompts
from rlhf_fast.run import logs
from rlhf_fast.run.identity import MAY_DIFFER_ON_RESUME
from rlhf_fast.run.samples import numbers_text, responses_of, sample_lines
from rlhf_fast.run.terminal import LiveLine, format_speed, printable, quoted, shortened_lines
from rlhf_fast.stages import ppo
from rlhf_fast.stages.validation import prompt_columns

WIDTHS = (60, 80, 100, 160)

# A run of 1200 steps of which 120 are done: long numbers, four metrics, two phases.
DRIVER = """
import sys, time
from rlhf_fast.config.fields import LogConfig
from rlhf_fast.run.logs import Log

metrics = ("objective/scores", "objective/kl", "tokens/length", "valid/rlhf_reward")
log = Log(sys.argv[1], LogConfig(show_samples=0), "ppo", 1200, 117, metrics)
for step in range(118, 121):
    with log.phase("generate"):
        time.sleep(0.2)
    with log.phase("learn"):
        time.sleep(0.2)
    log.metrics(step, dict(zip(metrics, (-0.84123, 12.34567, 123.4567, -1.25))), tokens=700)
    log._live._live.refresh()  # on a busy machine the next step may be done before the line is drawn by itself
log.message("a note above the line")
log.close()
"""


@pytest.mark.parametrize("columns", WIDTHS)
def test_parts_of_the_live_line_are_whole(tmp_path, columns):
    seen = pseudo_terminal.run([sys.executable, "-c", DRIVER, str(tmp_path)], columns)
    assert seen.status == 0, seen.end
    *above, line = seen.end
    assert above == ["ppo: a note above the line"]  # a line that wrapped would leave its parts behind
    parts = re.split(r" {2,}", line.replace("━", ""))
    assert parts[:2] == ["ppo", "120/1200"], line
    assert re.fullmatch(r"ETA 0:\d\d:\d\d", parts[2]), line
    assert parts[3:5] == ["scores -0.8412", "kl 12.35"]
    more = [r"length 123\.5", r"valid rlhf_reward -1\.25", r"[\d.]+k? tok/s", r"generate \d+%", r"learn \d+%"]
    shown = parts[5:]
    assert all(re.fullmatch(pattern, part) for pattern, part in zip(more, shown, strict=False)), line
    assert len(shown) == {60: 0, 80: 1, 100: 2, 160: 5}[columns]
    assert ("━" in line) == (columns == 160)
    for screen in seen.during:
        live = [line for line in screen if line.startswith("ppo ")]
        assert len(live) <= 1 and not any("…" in line for line in screen), screen
        assert all(line.startswith(("ppo ", "ppo:")) for line in screen), screen
    first = [line for screen in seen.during for line in screen if " 117/1200" in line]
    assert first and "ETA -:--:--" in first[0]  # it appears before the first step is done
    assert any(re.search(r" 118/1200 +ETA 0:", line) for screen in seen.during for line in screen)


@pytest.mark.parametrize("columns", (60, 160))
@pytest.mark.exhaustive(0, slow=1)
def test_a_run_in_a_terminal_shows_samples_above_its_line(tmp_path, columns):
    cfg = toy.ppo(tmp_path)
    script = (
        "import sys, toy; from pathlib import Path; from dataclasses import replace; from rlhf_fast.stages import ppo;"
        "from rlhf_fast.config.fields import LogConfig;"
        "ppo.run(toy.ppo(Path(sys.argv[1]), log=LogConfig(samples=2, show_samples=2)))"
    )
    seen = pseudo_terminal.run([sys.executable, "-c", script, str(tmp_path)], columns)
    assert seen.status == 0, seen.end
    heads = [i for i, line in enumerate(seen.end) if "sample at step" in line]
    assert [seen.end[i] for i in heads] == [f"ppo: sample at step {step}" for step in (1, 3, 5, 6)]
    rows = toy.rows(Path(cfg.out) / "samples.jsonl")
    for i, step in zip(heads, (1, 3, 5, 6), strict=True):
        row = next(row for row in rows if row["step"] == step)
        prompt, response, numbers = (line.strip() for line in seen.end[i + 1 : i + 4])
        assert prompt == f"prompt    {row['prompt']}"
        assert response == f"response  {row['response']}".strip()
        assert numbers.startswith(f"score {row['score']:.4g}  kl {row['kl']:.4g}  length {row['length']}")
    line = seen.end[-1]
    assert re.match(r"ppo  (━+  )?6/6  ETA 0:00:00  scores \S+  kl \S+", line), seen.end
    assert sum("ETA" in line for line in seen.end) == 1


@pytest.mark.slow
def test_generate_in_a_terminal_and_in_a_dumb_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts, model = toy.prompt_file(tmp_path / "p.jsonl"), toy.model(tmp_path / "model")
    command = [sys.executable, "-m", "rlhf_fast.cli.main", "generate", "--model", model, "--prompts", prompts]
    command += ["--template", "plain", "--max-new-tokens", "6"]
    seen = pseudo_terminal.run([*command, "--out", "a.jsonl"], 60)
    assert seen.status == 0, seen.end
    (line,) = (line for line in seen.end if "ETA" in line)
    assert re.fullmatch(r"generate  (━+  )?40/40  ETA 0:00:00  [\d.]+[kM]? tok/s", line), seen.end
    seen = pseudo_terminal.run([*command, "--out", "b.jsonl"], 60, env={"TERM": "dumb"})
    assert re.fullmatch(r"generate: 40/40  [\d.]+[kM]? tok/s", seen.end[-2]), seen.end


@pytest.mark.parametrize(("value", "text"), [
    (0, "0 tok/s"), (85.24, "85.2 tok/s"), (850, "850 tok/s"), (999.4, "999 tok/s"), (999.6, "1k tok/s"),
    (1773, "1.77k tok/s"), (17_730, "17.7k tok/s"), (999_900, "1M tok/s"), (1_200_000, "1.2M tok/s"),
    (3.4e12, "3400G tok/s"), (float("nan"), "nan tok/s"),
])  # fmt: skip
def test_speeds_are_written_as_people_do(value, text):
    assert format_speed(value) == text


def test_printable_text_moves_no_cursor_and_turns_no_direction():
    bad = ["\x1b", "\r", "\x07", "\x7f", "\x85", "\x9b", "\u2028", "\u2029"]
    bad += [chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))]
    for char in bad:
        assert printable(f"a{char}b") == "a\ufffdb"
        assert quoted(f'"{char}') != json.dumps(f'"{char}', ensure_ascii=False) or char < " "
        assert quoted(f'"{char}').isprintable() and json.loads(quoted(f'"{char}')) == f'"{char}'
    assert printable("a\r\nb\tc \u2027\u202f\u2065\u206a\u05d0") == "a\nb   c \u2027\u202f\u2065\u206a\u05d0"
    assert quoted("\u05d0\U0001f600\t") == '"\u05d0\U0001f600\\t"'


def test_samples_on_plain_output(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    log = logs.Log(tmp_path, LogConfig(show_samples=3), "sft", total=8)
    for step in range(1, 9):
        log.samples(step, [{"prompt": "<|user|>[b]2+2?", "raw_prompt": f"{step}+2?", "response": "[/b] 4\n5",
                            "length": 3, "eos": False}, {"prompt": "other", "response": "x"}])  # fmt: skip
    log.close()
    printed = capsys.readouterr().err.splitlines()
    expected = []
    for step in (1, 4, 7, 8):  # every 3 steps, and the last
        expected += [f"sft: sample at step {step}", f"  prompt    {step}+2?", "  response  [/b] 4", "            5",
                     "            length 3, cut off"]  # fmt: skip
    assert printed == expected
    assert len(toy.rows(tmp_path / "samples.jsonl")) == 16

    for quiet in (LogConfig(show_samples=0), LogConfig(live=False)):
        log = logs.Log(tmp_path / "quiet", quiet, "sft", total=1) if (tmp_path / "quiet").mkdir(exist_ok=True) else None
        log = log or logs.Log(tmp_path / "quiet", quiet, "sft", total=1)
        log.samples(1, [{"prompt": "p", "response": "r"}])
        log.close()
    assert capsys.readouterr().err == ""
    assert "log.show_samples" in MAY_DIFFER_ON_RESUME
    with pytest.raises(BadSetting):
        LogConfig(show_samples=-1)


def test_long_texts_are_shortened_and_cannot_move_the_cursor():
    text = "word " * 200
    lines = shortened_lines(text, 30, 3)
    assert len(lines) == 3 and all(Text(line).cell_len <= 30 for line in lines)
    assert lines[0] == "word word word word word word" and lines[-1].endswith(" …")
    assert shortened_lines("one\n\ntwo", 30, 3) == ["one", "", "two"]
    assert shortened_lines("", 30, 3) == [""] and shortened_lines("\n" * 999 + "x\n", 30, 3) == ["x"]
    (accents,) = shortened_lines("e" + "\u0301" * 999, 30, 3)  # no column wide, and cut all the same
    assert accents.startswith("e\u0301") and accents.endswith(" …")
    chinese = shortened_lines("漢字" * 100, 31, 2)
    assert len(chinese) == 2 and all(Text(line).cell_len <= 31 for line in chinese)
    assert shortened_lines("a\x1b[2Jb\rc\x07", 30, 1) == ["a\ufffd[2Jb\ufffdc\ufffd"]
    shown = sample_lines(3, {"prompt": "x " * 500, "response": text}, 60, "ppo")
    assert len(shown) == 1 + 3 + 6 and all(line.cell_len <= 60 for line in shown)


def test_of_a_ranking_the_best_and_the_worst_are_shown():
    row = {"prompt": "p", "responses": ["mid", "best", "worst"], "ranks": [2, 1, 3], "scores": [0.5, 1.25, -3]}
    assert [text for text, _ in responses_of(row)] == ["best", "mid", "worst"]
    lines = [line.plain.strip() for line in sample_lines(4, row, 80)]
    assert lines == ["sample at step 4", "prompt    p", "response  best", "rank 1  score 1.25", "response  worst",
                     "rank 3  score -3"]  # fmt: skip
    assert numbers_text({"score": None, "length": 4, "eos": True}) == "length 4"


def test_prompts_of_samples_are_those_of_the_data_not_the_template(tmp_path, one_thread):
    data = DataConfig(toy.prompt_file(tmp_path / "prompts.jsonl"), valid_fraction=0.1, template="dialog")
    cfg = toy.ppo(tmp_path, data=data, episodes=3 * 16, log=LogConfig(samples=3, live=False))
    ppo.run(cfg)
    words = toy.tokenizer()
    read = read_prompts(data, words, cfg.seed).train
    given = {row["prompt"] for row in toy.rows(tmp_path / "prompts.jsonl")}
    rows = toy.rows(tmp_path / "ppo/samples.jsonl")
    for step in (1, 2, 3):
        asked = read.batch((step - 1) * 16, 3)
        shown = [row for row in rows if row["step"] == step]
        assert [row["prompt"] for row in shown] == asked.texts
        assert [row["prompt"] for row in shown] == [f"Human: {row['raw_prompt']}\n\nAssistant:" for row in shown]
        assert all(row["raw_prompt"] in given for row in shown)

    demonstrations = DataConfig(toy.demonstrations(tmp_path / "demonstrations.jsonl"), template="dialog")
    plain = DataConfig(demonstrations.path, template="plain")
    first = toy.rows(tmp_path / "demonstrations.jsonl")[0]["prompt"]
    assert prompt_columns(read_demonstrations(demonstrations, words).train[0])["raw_prompt"] == first
    assert prompt_columns(read_demonstrations(plain, words).train[0]) == {"prompt": first}

    turns = [{"role": "user", "content": "a ."}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": "c ."}, {"role": "assistant", "content": "d"}]  # fmt: skip
    words.chat_template = (
        "{% for m in messages %}{{ m.role + ' ' + m.content }}{{ eos_token if m.role == 'assistant' else ' . ' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    path = toy.jsonl(tmp_path / "talk.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    last = read_demonstrations(DataConfig(path), words).train
    assert [row.raw_prompt for row in last.rows] == ["user: a .\nassistant: b\nuser: c .", "a ."]
    every = read_demonstrations(DataConfig(path, turns="all"), words).train
    assert [row.raw_prompt for row in every.rows] == ["a .", "a ."]
    ranked = toy.jsonl(tmp_path / "ranked.jsonl", [{"prompt": turns[:1], "responses": ["b", "c"], "ranks": [1, 2]}])
    (row,) = read_comparisons(DataConfig(ranked), words).train.rows
    assert row.raw_prompt == "a ." and row.text == "user a . . assistant "


def test_the_thread_of_a_live_line_ends_with_it(monkeypatch):
    """rich does not wait for it, and Python may shut down while it wakes."""

    class Slow(rich.live._RefreshThread):
        def run(self) -> None:
            super().run()
            time.sleep(0.3)

    monkeypatch.setattr(rich.live, "_RefreshThread", Slow)
    line = LiveLine(Console(file=io.StringIO(), force_terminal=True), "ppo", 3)
    assert any(isinstance(thread, Slow) for thread in threading.enumerate())
    line.stop()
    assert not any(isinstance(thread, Slow) for thread in threading.enumerate())
    line.stop()  # twice does no harm
