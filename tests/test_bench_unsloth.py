"""The bench of Unsloth's step lets two processes take turns, compares what they computed, and refuses other pythons."""

import json
import sys
from pathlib import Path

import pytest

from rlhf_fast import ops
from rlhf_fast.bench import timing, trainer_step, unsloth_step
from rlhf_fast.integrations.hooks import library_version

# A side that computes nothing: it writes when its turns begin and end, and says what it is told to.
FAKE = """
import json, os, sys, time
name, log, said = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
first = {"loss": 2.0, "gradient_norm": 1.0, "answered": name == "ours", "chunked_loss": True, "labelled": 3, "rows": 4}
print("a library's greeting")
print(json.dumps(first | {"versions": {"trl": "1.0"}} | said), flush=True)
seconds = 1.0
for line in sys.stdin:
    if "dies" in said:
        sys.exit("Traceback\\nMemoryError: " + said["dies"])
    with open(log, "a") as file:
        print(name, line.strip(), file=file, flush=True)
        time.sleep(0.05)
        print(name, "ends", file=file, flush=True)
    seconds += 1 if name == "ours" else 6
    print(json.dumps({"seconds": seconds} if line == "step\\n" else {"bytes": 1 << 20}), flush=True)
"""
# What the bench calls of Unsloth, by transformers itself.
UNSLOTH = """
import os, sys
assert "trl" not in sys.modules and "transformers" not in sys.modules, "imported after what it replaces"
assert os.environ["HF_HUB_OFFLINE"] == "1" and os.environ["UNSLOTH_FORCE_CPU"] == "1"
print("a greeting")
class FastLanguageModel:
    @staticmethod
    def from_pretrained(path, dtype, max_seq_length, load_in_4bit, full_finetuning, use_gradient_checkpointing):
        from transformers import AutoModelForCausalLM
        assert os.path.isdir(path) and full_finetuning and not load_in_4bit and not use_gradient_checkpointing
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        model._unsloth_cpu_chunked_ce = True
        return model, None
"""


@pytest.fixture
def bench(monkeypatch, tmp_path, one_thread):
    """Return a function that runs the bench with fake sides: what each says, by its name."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(unsloth_step, "check_python", lambda python: None)
    for rate in ("copy_bandwidth", "product_rate"):  # of the machine, which takes a second
        monkeypatch.setattr(timing.Cpu, rate, lambda clock: 1e9)

    def run(*options: str, **said: dict) -> tuple[int, dict]:
        def command(python: str, side: str, folder: Path, tiny: bool) -> list[str]:
            return [python, "-c", FAKE, side, str(tmp_path / "log"), json.dumps(said.get(side, {}))]

        monkeypatch.setattr(unsloth_step, "command_of", command)
        path = tmp_path / "found.json"
        given = ["--device", "cpu", "--only", "unsloth", "--unsloth", sys.executable, "--save", str(path)]
        return trainer_step.main([*given, *options]), json.loads(path.read_text())

    return run


def test_the_sides_take_turns(bench, tmp_path, capsys):
    status, found = bench("--rounds", "3")
    assert status == 0 and not found["notes"]
    lines = (tmp_path / "log").read_text().splitlines()
    peaks = [line for side in ("unsloth", "ours") for line in (f"{side} peak", f"{side} ends")]
    steps = [line for side in ("unsloth", "ours") for line in (f"{side} step", f"{side} ends")]
    assert lines == peaks + 3 * steps  # an answer comes before the other side's question
    (row,) = found["rows"]
    # Seconds are the sides' own: 8 14 20 and 3 4 5 without the peaks' 7 and 2 before.
    assert row["rounds"] == {"Unsloth": [13, 19, 25], "ours": [3, 4, 5]}
    assert row["seconds"] == 4 and row["others"]["Unsloth"]["seconds"] == 19
    assert row["ratios"]["Unsloth"] == pytest.approx(19 / 4)
    assert row["row"] == "Unsloth, TRL SFTTrainer, 75% of 4 rows have a label"
    assert row["checked"] == "agree: loss by 0"
    shown = capsys.readouterr().out
    assert "peak: 1 MiB, 1 MiB with Unsloth; its chunked cross-entropy is in use\n  trl 1.0\n" in shown


@pytest.mark.parametrize(
    "said, sentence",
    [
        (
            {"unsloth": {"loss": 2.001}},
            "the loss is 2.001 with Unsloth and 2 with our ops: they do not",
        ),
        (
            {"ours": {"gradient_norm": 1.0002}},
            "the gradient norm is 1 with Unsloth and 1.0002 with our ops",
        ),
        ({"unsloth": {"gradient_norm": float("nan")}}, "the gradient norm is nan with Unsloth and 1 with our ops"),
        ({"ours": {"answered": False}}, "our ops answered no call of TRL 1.0"),
    ],
)
def test_sides_that_differ_are_told(bench, capsys, said, sentence):
    status, found = bench("--rounds", "1", **said)
    assert status == 1
    assert found["rows"][0]["checked"].startswith("DIFFER")
    assert len(found["notes"]) == 1 and sentence in found["notes"][0] and sentence in capsys.readouterr().out


def test_a_small_difference_agrees(bench):
    status, found = bench("--rounds", "1", unsloth={"loss": 2.00001, "gradient_norm": 1.00005})
    assert status == 0 and found["rows"][0]["checked"] == "agree: gradient norm by 5e-05"


def test_a_side_that_ends_is_a_note(bench):
    status, found = bench("--rounds", "1", ours={"dies": "no more of it"})
    assert status == 1 and not found["rows"]
    assert found["notes"][0].endswith("the process of ours ended: MemoryError: no more of it")


def refused(capsys, python: str, *options: str) -> str:
    """Return the sentence by which the bench refuses, after its usage."""
    with pytest.raises(SystemExit) as caught:
        trainer_step.main(["--device", "cpu", "--tiny", *options, *(["--unsloth", python] if python else [])])
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1].partition("error: ")[2]


@pytest.fixture
def module(monkeypatch, tmp_path):
    """Return a function that puts a module before all others on the path of new processes."""
    roots = [str(tmp_path), str(Path(__file__).resolve().parent.parent)]
    monkeypatch.setenv("PYTHONPATH", ":".join(roots))

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    return write


def test_a_python_that_is_none_is_refused(capsys, tmp_path):
    assert refused(capsys, str(tmp_path / "bin" / "python")).startswith(
        f"--unsloth: there is no program {tmp_path}/bin/python: name the python of an environment that has Unsloth"
    )
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\necho a script >&2\n")
    script.chmod(0o755)
    assert refused(capsys, str(script)) == f"--unsloth: {script} does not run Python: a script"
    sentence = refused(capsys, "", "--only", "sft,unsloth")
    assert sentence == "--only unsloth: add --unsloth PYTHON, the python of an environment that has Unsloth"


def test_a_python_that_lacks_something_is_refused(capsys, module):
    module("unsloth", "import a_module_that_it_needs\n")
    assert refused(capsys, sys.executable).startswith(
        f"--unsloth: {sys.executable} cannot import unsloth: ModuleNotFoundError: No module named"
        " 'a_module_that_it_needs' (docs/integrations.md"
    )
    module("unsloth", "raise NotImplementedError('Unsloth: no accelerator.\\nA second line.')\n")
    assert "cannot import unsloth: NotImplementedError: Unsloth: no accelerator. (docs" in refused(
        capsys, sys.executable
    )
    module("unsloth", "print('a greeting')\n")
    module("trl", "raise SystemExit('TRL: no.')\n")
    assert "cannot import trl: SystemExit: TRL: no. (docs" in refused(capsys, sys.executable)


@pytest.mark.slow
def test_a_python_without_compiled_kernels_is_refused(capsys, module):
    module("unsloth", "import sys\nsys.modules['rlhf_fast._cpu'] = None  # as where it is not built\n")
    module("trl", "")
    module("datasets", "")
    assert "has no compiled CPU kernels of rlhf_fast: install rlhf-fast in its environment (docs" in refused(
        capsys, sys.executable
    )


@pytest.mark.slow
@pytest.mark.skipif(library_version("trl") is None, reason="trl is not installed")
@pytest.mark.skipif(ops.linear_logprobs.chosen("cpu") == "reference", reason="no compiled kernels")
def test_a_model_that_unsloth_loads_takes_the_same_step(module, monkeypatch, tmp_path, one_thread):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    module("unsloth", UNSLOTH)
    path = tmp_path / "found.json"
    given = ["--device", "cpu", "--tiny", "--only", "unsloth", "--unsloth", sys.executable, "--save", str(path)]
    assert trainer_step.main(given) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["checked"].startswith("agree") and max(row["errors"].values()) < 1e-5
    ours, theirs = row["first"]["ours"], row["first"]["Unsloth"]
    assert ours["answered"] and not theirs["answered"]
    assert theirs["chunked_loss"] and not ours["chunked_loss"]
    assert ours["labelled"] == theirs["labelled"] > 300
    # Without our ops the stand-in is TRL as it is, which holds the logits.
    assert row["peak_bytes"] < row["others"]["Unsloth"]["peak_bytes"]
    assert not (tmp_path / "compiled").exists()
