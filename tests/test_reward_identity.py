"""A resumed run knows its reward again: names in run.json, checksums of functions, another function refused."""

import functools
import importlib
import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import toy

from rlhf_fast.cli.main import main
from rlhf_fast.config.fields import LogConfig
from rlhf_fast.config.rewards import short_names, spec_name
from rlhf_fast.errors import UserError
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.function_source import function_checksum
from rlhf_fast.run.identity import contents_of


def words(texts):
    return [float(len(text.split())) for text in texts]


def letters(texts):
    return [float(len(text)) for text in texts]


def scaled(factor):
    def reward(texts):
        return [factor * len(text) for text in texts]

    return reward


class Counter:
    def __init__(self, letter):
        self.letter = letter

    def __call__(self, texts):
        return [float(text.count(self.letter)) for text in texts]

    def method(self, texts):
        return self(texts)


def start(cfg):
    """Take a run's first step; return what run.json holds."""
    with RunFolder(cfg) as run:
        notes = list(run.notes)
        run.start_or_resume(1, (), {})
        run.checkpoint(1, {})
    return json.loads((Path(cfg.out) / "run.json").read_text()), notes


def test_a_function_is_in_run_json_by_its_name_and_source(folder):
    saved, notes = start(toy.ppo(folder, reward=words))
    name = f"{words.__module__}:words"
    assert saved["config"]["reward"] == name and not notes
    assert saved["functions"] == {name: function_checksum(words)}
    assert function_checksum(words) == function_checksum(name)  # the object and its name are one
    RunFolder(toy.ppo(folder, reward=name))
    with pytest.raises(UserError, match=r"was started with reward = .*:words\"?, now .*:letters"):
        RunFolder(toy.ppo(folder, reward=letters))


def test_a_list_is_in_run_json_with_its_weights(folder):
    cfg = toy.ppo(folder, reward=[words, "toy:share_of_a"], reward_weights=[1, 0.5])
    saved, _ = start(cfg)
    assert saved["config"]["reward"] == [spec_name(words), "toy:share_of_a"]
    assert saved["config"]["reward_weights"] == [1, 0.5] and len(saved["functions"]) == 2
    RunFolder(cfg)
    RunFolder(replace(cfg, reward_timeout=9.0, reward_retries=3))  # a run that ended for want of time goes on
    for other, name in (
        (replace(cfg, reward_weights=(1, 2)), "reward_weights"),
        (replace(cfg, reward=("toy:share_of_a", words)), "reward"),
    ):
        with pytest.raises(UserError, match=f"was started with {name} = "):
            RunFolder(other)


def test_a_run_of_an_earlier_version_with_one_name_goes_on(folder):
    cfg = toy.ppo(folder)
    start(cfg)
    saved = json.loads((folder / "ppo/run.json").read_text())
    assert saved["config"]["reward"] == "toy:share_of_a"
    for name in ("reward_weights", "reward_timeout", "reward_retries"):
        del saved["config"][name]
    (folder / "ppo/run.json").write_text(json.dumps(saved))
    RunFolder(replace(cfg, reward=["toy:share_of_a"], log=LogConfig()))


@pytest.mark.parametrize(
    "one, other",
    [
        (scaled(2), scaled(3)),
        (functools.partial(letters), functools.partial(words)),
        (functools.partial(scaled, 1), functools.partial(scaled, 2)),
        (Counter("a"), Counter("b")),
        (Counter("a").method, Counter("b").method),
        (
            lambda texts: [1.0] * len(texts),
            lambda texts: [2.0] * len(texts),
        ),
    ],
    ids=["closure", "partial of a function", "partial of values", "object", "method", "lambda"],
)
def test_functions_without_a_name_of_their_own_differ_by_text_and_values(folder, one, other):
    found = function_checksum(one)
    assert found and found == function_checksum(one) != function_checksum(other)
    cfg = toy.ppo(folder, reward=one)
    start(cfg)
    RunFolder(cfg)
    with pytest.raises(UserError, match=r"has changed since|was started with reward"):
        RunFolder(replace(cfg, reward=other))


@dataclass
class Constant:
    scale: float

    def __call__(self, completions, **kwargs):
        return [self.scale] * len(completions)


def test_two_functions_of_one_name_and_a_dataclass_resume(folder):
    rewards = [scaled(1.0), scaled(2.0), Constant(0.5)]
    saved, _ = start(toy.ppo(folder, reward=rewards))
    assert len(saved["functions"]) == 3 and all(isinstance(name, str) for name in saved["config"]["reward"])
    RunFolder(toy.ppo(folder, reward=[scaled(1.0), scaled(2.0), Constant(0.5)]))
    for others in ([scaled(1.0), scaled(3.0), Constant(0.5)], [scaled(1.0), scaled(2.0), Constant(0.7)]):
        with pytest.raises(UserError, match=r"was started with|has changed since"):
            RunFolder(toy.ppo(folder, reward=others))


def test_what_a_function_holds_counts():
    def make(value):
        def reward(texts, *, factor=value):
            return [factor] * len(texts)

        return reward

    class Slots:
        __slots__ = ("value",)

        def __init__(self, value):
            self.value = value

        def __call__(self, texts):
            return [self.value] * len(texts)

    for kind in (make, Slots, lambda value: scaled(np.float64(value))):
        one, same, other = (function_checksum(kind(value)) for value in (1.0, 1.0, 2.0))
        assert one == same != other


def test_the_file_of_a_function_that_a_package_passes_on_counts(folder, monkeypatch):
    (folder / "pack").mkdir()
    (folder / "pack/__init__.py").write_text("from pack.inner import good\n")
    (folder / "pack/inner.py").write_text("def good(texts): return [0.0] * len(texts)\n")
    monkeypatch.syspath_prepend(str(folder))
    before = function_checksum("pack:good")
    (folder / "pack/inner.py").write_text("def good(texts): return [1.0] * len(texts)\n")
    assert before and function_checksum("pack:good") != before


def test_a_function_without_a_source_is_noted(folder):
    made = {}
    exec("def reward(texts): return [0.0] * len(texts)", made)
    cfg = toy.ppo(folder, reward=made["reward"])
    _, notes = start(cfg)
    assert any("its source cannot be read, so a resumed run cannot tell" in note for note in notes)


@pytest.mark.slow
def test_a_script_may_change_its_settings_and_not_its_reward(folder):
    """A function of the script that runs is compared by its own text, not by its file."""
    script = """
        import sys
        sys.path.insert(0, {support!r})
        import toy
        from pathlib import Path
        from rlhf_fast.run.folder import RunFolder

        def reward(texts):
            return [{number} for _ in texts]

        with RunFolder(toy.ppo(Path({folder!r}), reward=reward)) as run:  # {remark}
            run.start_or_resume(1, (), {{}})
            run.checkpoint(1, {{}})
    """
    support = str(Path(toy.__file__).parent)
    toy.model_at(folder)
    for number, remark, status in ((1.0, "first", 0), (1.0, "second", 0), (2.0, "third", 1)):
        text = textwrap.dedent(script).format(support=support, folder=str(folder), number=number, remark=remark)
        (folder / "train.py").write_text(text)
        done = subprocess.run([sys.executable, "train.py"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
    assert "__main__:reward: has changed since" in done.stderr


MODULE = """
import functools

import os

SCALE = 2.0
OTHER = 1


def helper(text):
    return SCALE * len(text)


class Box:
    def __call__(self, texts):
        return [0.0 for text in texts]


def reward(texts):
    # a remark
    return [helper(text) for text in texts]


box = Box()
"""


@pytest.mark.parametrize(
    "old, new, counts",
    [
        ("    # a remark\n", "\n", False),
        ("OTHER = 1", "OTHER = 2", False),
        ("import os\n", "import os\nimport sys\n\n\ndef more(texts):\n    return SCALE, OTHER\n", False),
        ("helper(text) for", "-helper(text) for", True),
        ("SCALE = 2.0", "SCALE = 3.0", True),
        ("SCALE * len", "SCALE + len", True),
    ],
)
def test_of_a_module_the_lines_that_the_function_uses_count(folder, monkeypatch, old, new, counts):
    """Any edit in the module's file refused the resume. An object of the module still has the checksum of the file."""
    monkeypatch.syspath_prepend(str(folder))
    assert MODULE.count(old) == 1
    sums = []
    for text in (MODULE, MODULE.replace(old, new)):
        (folder / "own_text.py").write_text(text)
        sys.modules.pop("own_text", None)
        importlib.invalidate_caches()
        sums.append((function_checksum("own_text:reward"), function_checksum("own_text:box")))
        assert sums[-1][0] == function_checksum(sys.modules["own_text"].reward)
    (was, was_box), (now, now_box) = sums
    assert was and (was != now) == counts and was_box != now_box


FAULTY = """
calls = 0


def score(texts):
    global calls
    calls += 1
    if calls == FAILS_AT:
        raise ValueError("no")
    return [1.0] * len(texts)
"""


def command(capsys, *more):
    """Run the command in this process, which imports the function anew as a new process would."""
    args = ["--policy.path", "model", "--data.path", "prompts.jsonl", "--reward", "faulty:score", "--out", "run"]
    args += ["--episodes", "24", "--batch", "8", "--minibatch", "8", "--sampling.max-new-tokens", "4"]
    args += ["--log.checkpoint-every", "1"]
    sys.modules.pop("faulty", None)
    importlib.invalidate_caches()
    capsys.readouterr()
    status = main(["ppo", *args, *more])
    return status, " ".join(capsys.readouterr().err.split())


def test_a_function_that_raises_is_mended_and_the_run_goes_on(folder, capsys, monkeypatch, one_thread):
    """The error said "mend the function", and the mended function was refused."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # files of one second and size have the same
    toy.ppo(folder)  # its model and prompts
    flag = "--resume-with-changed-reward"
    file = folder / "faulty.py"
    file.write_text(FAULTY.replace("FAILS_AT", "1"))
    status, said = command(capsys)
    assert (
        status == 2
        and "raised ValueError: no" in said
        and said.endswith("with the function mended, the same command starts again")
    )
    file.write_text(FAULTY.replace("FAILS_AT", "3"))  # no step was taken: a changed function is no question
    status, said = command(capsys)
    recipe_flag = "--ppo.resume-with-changed-reward"
    assert status == 2
    assert said.endswith(f"the same command and {flag} (in a recipe {recipe_flag}) goes on from step 2")
    first = json.loads((folder / "run/run.json").read_text())
    assert "earlier_functions" not in first
    file.write_text(FAULTY.replace("FAILS_AT", "9"))
    status, said = command(capsys)
    assert status == 2 and "faulty:score: has changed since run was started with it; to go on from step 2" in said
    assert flag in said
    status, said = command(capsys, flag)
    assert status == 0, said
    assert "from step 2 on this is no longer a run of a single reward" in said and "goes on after step 2 of 3" in said
    saved = json.loads((folder / "run/run.json").read_text())
    assert saved["earlier_functions"] == [{"until_step": 2, "functions": first["functions"]}]
    assert saved["functions"] != first["functions"] and "finished" in saved
    assert command(capsys)[0] == 0  # finished already
    file.write_text(FAULTY.replace("FAILS_AT", "8"))
    status, said = command(capsys, flag)
    assert status == 2 and "has changed since run was finished with it; choose another `out`" in said


def test_a_setting_stands_for_the_contents_of_its_inputs():
    """Each reward of a list counts, and all files of a path together; two functions of one file are two."""
    sums = {"rm": "1", "moved/rm": "1", "other": "2", "m:f": "3", "m:g": "3", "a.jsonl": "4", "a.jsonl, b.jsonl": "5"}
    sums |= {"x/*.jsonl": "5"}
    files = ("a.jsonl", "b.jsonl")

    def same(one, other):
        return contents_of(one, sums) == contents_of(other, sums)

    assert same("rm", "moved/rm") and same(("rm", "m:f"), ["moved/rm", "m:f"]) and same(files, "x/*.jsonl")
    assert not same("rm", "other") and not same("m:f", "m:g") and not same(("rm", "m:f"), ("m:f", "rm"))
    assert not same(("rm", "m:f"), ("rm",)) and not same("org/a", "org/b")
    assert not same(("rm", "org/a"), ("rm", "org/b")) and not same(files, ("b.jsonl", "a.jsonl"))
    assert not same(1, 2) and not same((0.9, 0.95), (0.9, 0.99)) and same((0.9, "rm"), (0.9, "rm"))
    assert contents_of(("rm", "m:f", "org/a"), sums).checksums == ("1", "3", "")


def test_metrics_have_short_names_and_no_two_are_alike():
    specs = ["runs/a/reward", "runs/b/reward", "my.module:f", lambda texts: texts, Counter("a"), words]
    assert short_names(specs) == ["reward", "reward-2", "f", "<lambda>", "Counter", "words"]
