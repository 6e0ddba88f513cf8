"""The bench of the ops times only what is right, refuses what is wrong, and writes a table for programs too."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rlhf_fast import ops
from rlhf_fast.bench import compare, decode_step, device_profile, ppo_step, report
from rlhf_fast.bench.baselines import Baseline
from rlhf_fast.bench.problem import Case, Problem, cases, label, shrunk
from rlhf_fast.bench.targets import TARGETS, Target
from rlhf_fast.bench.timing import Cpu
from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels._op import OPS

ROOT = Path(__file__).resolve().parent.parent
SOURCE = pytest.mark.skipif(not (ROOT / "bench" / "conftest.py").is_file(), reason="not a source checkout")
HEAD = {"N": 6, "D": 8, "V": 33}


@pytest.fixture
def kernel(monkeypatch):
    """Return a function that replaces an op's kernel on the CPU."""

    def put(op, call):
        monkeypatch.setitem(op.implementations, "cpu:test", call)
        monkeypatch.setitem(op.preference, "cpu", ["cpu:test", "reference"])

    return put


def measured(op, size, gradient=False):
    case = Case(op, size, torch.float32, gradient)
    return compare.measure(case, Cpu(), 1e10, seconds=0.01, compile_seconds=0)


def bench(*arguments, select="ops", only=""):
    """Run `pytest bench -k SELECT` in a process of its own, or one of its files."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RLHF_FAST_SIMT", "PYTEST_ADDOPTS")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "bench" / only), "-k", select]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.mark.skipif(ops.gae.chosen("cpu") == "reference", reason="no compiled kernels")
@SOURCE
@pytest.mark.slow
def test_a_report_writes_memory_in_one_unit():
    """The peaks of both sides and of their processes, all in GiB."""
    other = {"seconds": 2.0, "peak_bytes": 3 << 30}
    row = {"row": "update", "seconds": 1.0, "peak_bytes": 3 << 29, "process": {"peak_bytes": 1 << 30}}
    row |= {"ratios": {"b": 2.0}, "others": {"b": other}}
    head, cells = report.whole_cells([row])
    assert cells[head.index("peak, others'")] == "1.50 / 3.00 GiB"
    assert cells[head.index("process's peak, others'")] == "1.00 GiB"


@pytest.mark.slow
def test_a_run_writes_a_table_for_people_and_one_for_programs(tmp_path):
    path = tmp_path / "made" / "table.md"
    done = bench(
        "--op", "gae", "--small", "--seconds", "0.01",
        "--save-table", str(path), "-p", "no:benchmark",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.with_suffix(".json").read_text())
    rows = [row for row in found["rows"] if row["size"] == "B 3, T 17" and row["op"] == "gae"]
    assert len(rows) == 1 and rows[0]["ratios"].keys() == {"reference"} and rows[0]["seconds"] > 0
    assert "torch.compile is left out: --small" in path.read_text()
    assert rows[0]["bytes"] == 17 * 3 * 17 and rows[0]["others"]["reference"]["seconds"] > 0
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["copy_bytes_per_second"] > 1e8
    assert "gae B 3, T 17 float32" in done.stdout
    assert path.read_text().count("\n| ") == len(found["rows"]) + 1


@SOURCE
@pytest.mark.slow
def test_a_side_by_side_bench_prints_and_writes_its_table(tmp_path):
    done = bench("--save-table", str(tmp_path / "table.md"), select="swiglu", only="test_bench_decode.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "baseline" in done.stdout and "F.silu(gate) * up" in done.stdout
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n| ") == 1 + 2 and "measured: copy" in table


@pytest.mark.slow
def test_an_unknown_op_and_a_missing_gpu_are_one_sentence():
    if not (ROOT / "bench" / "conftest.py").is_file():
        pytest.skip("not a source checkout")
    done = bench("--op", "no_such_op")
    assert done.returncode == 4 and "--op: there is no op no_such_op; there are: " in done.stderr
    if importlib.util.find_spec("xdist"):
        done = bench("-n", "2")
        assert done.returncode == 4 and "-n: a bench has the machine to itself" in done.stderr
    if not torch.cuda.is_available():
        done = bench("--device", "cuda")
        assert done.returncode == 4 and "--device cuda: torch sees no CUDA device" in done.stderr


FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *"float("*) exec "$REAL" "$@" ;;
  -c*) printf 'fake-gpu 90 .none.so\\n0\\n' ;;
  *pip*) exit 1 ;;
  *test_ops*) echo "one test failed"; exit 1 ;;
  *) echo "ran: $*" ;;
esac
"""


@pytest.mark.skipif(not (ROOT / "bench" / "gpu.sh").is_file(), reason="not a source checkout")
def test_gpu_sh(tmp_path):
    """Without a GPU gpu.sh prints one sentence; with one (faked here) the benches run although a test has failed."""
    script, env = str(ROOT / "bench" / "gpu.sh"), os.environ | {"OUT": str(tmp_path)}
    if not torch.cuda.is_available():
        done = subprocess.run([script], capture_output=True, text=True, env=env | {"PYTHON": sys.executable})
        assert done.returncode == 2 and not done.stdout and "sees no CUDA device" in done.stderr, done
        assert done.stderr.count("\n") == 1
    done = subprocess.run([script, "--help"], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.startswith("Build, test and bench") and "PYTHON" in done.stdout, done
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    env |= {"PYTHON": str(python), "REAL": sys.executable}
    done = subprocess.run([script, "full"], capture_output=True, text=True, env=env)
    log = (tmp_path / "fake-gpu.log").read_text()
    assert done.returncode == 1 and "tests: ops on CUDA tensors: FAILED (1)" in done.stdout, done
    assert "setup.py build_ext --inplace" in log and "bench/test_bench_ops.py --targets --device cuda" in log
    assert "bench: every op's large sizes: ok" in done.stdout.splitlines()[-1]
    done = subprocess.run([script, "all"], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "dry-run, not 'all'" in done.stderr


def test_a_wrong_kernel_is_refused_before_it_is_timed(kernel, monkeypatch):
    def wrong(*args):
        advantages, returns = ops.gae.reference(*args)
        return advantages, returns + 1e-2

    monkeypatch.setattr(Cpu, "timer", lambda *_: pytest.fail("it was timed"))
    kernel(ops.gae, wrong)
    found = measured(ops.gae, {"B": 3, "T": 17})
    assert not found.rows and len(found.faults) == 1
    assert "gae B 3, T 17 float32 forward: cpu:test not timed: output 1 is 0.0" in found.faults[0]


def test_a_wrong_gradient_or_argument_written_is_refused(kernel):
    def no_gradient(grad_logprobs, grad_entropy, logits, *rest):
        return torch.zeros_like(logits)

    kernel(ops.token_logprobs, ops.token_logprobs.reference)
    kernel(OPS["token_logprobs_backward"], no_gradient)
    size = {"shape": (4,), "V": 9}
    assert measured(ops.token_logprobs, size).rows
    assert "output 2 is 1 of its size" in measured(ops.token_logprobs, size, gradient=True).faults[0]

    kernel(ops.rms_norm, lambda x, weight, eps, residual, offset: ops.rms_norm.reference(x + residual, weight, eps))
    assert "output 1 is" in measured(ops.rms_norm, {"shape": (4, 9), "residual": True}).faults[0]


def test_an_unsupported_call_is_no_fault_and_the_reference_is_not_timed_in_its_place(kernel):
    def unsupported(*args):
        raise Unsupported("not today")

    kernel(ops.gae, unsupported)
    found = measured(ops.gae, {"B": 3, "T": 17})
    assert not found.rows and not found.faults
    assert "no kernel answers: not today" in found.notes[0] and "no kernel to time" in found.notes[1]


@pytest.mark.skipif(ops.gae.chosen("cpu") == "reference", reason="no compiled kernels")
@pytest.mark.parametrize("name", list(OPS))
def test_every_op_can_be_measured_and_its_kernel_is_right(name):
    result = compare.Result([], [], [])
    for case in cases("cpu", [name], [torch.float32, torch.bfloat16], small=True):
        providers = compare.verified(Problem(case, "cpu"), Cpu(), 0, result)
        assert list(providers) == [OPS[name].chosen("cpu"), "reference"], result
    assert not result.faults and not result.notes


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.op} {label(t.size)} {t.gradient}")
def test_targets_can_be_made_and_their_reference_in_chunks_is_the_reference(target):
    """A chunk takes two rows; the last may be shorter."""
    op, few = OPS[target.op], shrunk(target)._replace(chunk=2 if {"hidden", "logits"} & {*OPS[target.op].names} else 0)
    problem = Problem(Case(op, few.size, torch.float32, target.gradient, few), "cpu")
    found = problem.run_once(op.reference, problem.args)
    assert not problem.error(found, 1e-5)
    assert len(found) == len(problem.expected) and problem.expected[0] is not None
    if target.gradient:
        assert all(x is not None for x in problem.expected[-len(problem.wrt) :])
    wrong = [x + 0.01 * x.abs().max() if x.is_floating_point() else x for x in found]
    assert problem.error(wrong, 1e-3)


def test_on_a_gpu_the_targets_come_first_and_large_inputs_follow():
    found = list(cases("cuda", ["ppo_loss"], [torch.bfloat16]))
    assert [case.size for case in found[:4:2]] == [t.size for t in TARGETS if t.op == "ppo_loss"]
    assert [case.dtype for case in found[:2]] == [torch.float32, torch.bfloat16]
    assert [case.size for case in found[4::2]] == ops.ppo_loss.large_sizes
    everything = {case.op.name for case in cases("cpu", [], [torch.float32])}
    assert everything == {op.name for op in OPS.values() if op.large_sizes}


def test_a_target_is_met_or_missed_by_the_number_it_names():
    row = {"seconds": 2e-3, "device_seconds": 1e-3, "share": 0.72}
    assert Target("x", {}, of="share", goal=0.7, cuda=0.75).met("triton", row) is True
    assert Target("x", {}, of="share", goal=0.7, cuda=0.75).met("cuda", row) is False
    assert Target("x", {}, of="seconds", goal=1.5e-3).met("triton", row) is False
    assert Target("x", {}, of="device", goal=1.5e-3).met("triton", row) is True
    assert Target("x", {}, of="device", goal=1.5e-3).met("triton", row | {"device_seconds": None}) is None
    assert Target("x", {}).met("triton", row) is None
    assert str(Target("x", {}, of="device", goal=12e-6, cuda=8e-6)) == "12.0 us / CUDA 8.0 us on the device"


def test_baselines_and_bare_products_stand_beside_a_head(monkeypatch):
    def torchs(hidden, weight, targets, *rest):
        return F.cross_entropy(hidden @ weight.T, targets)

    baselines = [
        Baseline("torch's", "torch", "linear_cross_entropy", torchs, 1e-4),
        Baseline("a wrong one", "torch", "linear_cross_entropy", lambda *a: 2 * torchs(*a), 0.1),
    ]
    monkeypatch.setattr(compare, "baselines_of", lambda *_: baselines)
    op = ops.linear_cross_entropy
    if op.chosen("cpu") == "reference":
        pytest.skip("no compiled kernels")
    found = measured(op, HEAD, gradient=True)
    (row,) = found.rows
    assert row["pass"] == "forward+backward"
    bare = {"bare products", "bare products, padded"}
    assert row["ratios"].keys() == {"reference", "torch's", *bare} and row["flops"] == 6.0 * 6 * 8 * 33
    fastest = min(row["others"][name]["seconds"] for name in bare)
    assert row["floor_seconds"] == pytest.approx(max(fastest, row["bytes"] / 1e10), rel=0.01)
    assert "a wrong one not timed: output 0 is" in found.notes[0] and not found.faults
    assert "torch's" in "".join(report.op_cells(found.rows)[1])


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.cost_function], ids=lambda op: op.name)
def test_the_cost_of_an_op_is_at_most_its_tensors(op):
    """Each tensor counts at most three times: read, read again for the gradient, which is written."""
    for size in op.small_sizes:
        args = op.normalized(*op.make_inputs(device="cpu", dtype=torch.float32, **size))
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        outputs = op.reference(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        updated = [args[i] for i in op.mutates if args[i] is not None]  # read and written
        (moved, flops), with_gradient = op.cost_function(False, *args), op.cost_function(True, *args)
        assert 0 <= moved <= sum(x.nbytes for x in [*tensors, *outputs, *updated]) and flops >= 0
        assert moved <= with_gradient[0] <= 3 * moved + sum(x.nbytes for x in tensors)
        assert with_gradient[1] <= 3 * flops


WITHOUT = """
import sys
sys.modules |= dict.fromkeys(["tyro", "peft", "liger_kernel", "cut_cross_entropy", "vllm"])
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@SOURCE
@pytest.mark.slow
def test_the_targets_run_where_nothing_but_the_needed_packages_is_installed(tmp_path):
    """The bench of the ops is named by file, so that no other bench's imports stop it."""
    path = tmp_path / "targets.md"
    done = subprocess.run(
        [
            sys.executable, "-c", WITHOUT, "-o", "addopts=-q", "-p", "no:cacheprovider", "-p", "no:benchmark",
            "bench/test_bench_ops.py", "--targets", "--small", "--seconds", "0.01", "--compile-seconds", "0",
            "--save-table", str(path), "--op", "ppo_loss", "--op", "linear_ppo_loss",
        ],
        capture_output=True, text=True, cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RLHF_FAST_SIMT", "PYTEST_ADDOPTS")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.with_suffix(".json").read_text())
    wanted = [t for t in TARGETS if t.op in ("ppo_loss", "linear_ppo_loss")]
    if ops.ppo_loss.chosen("cpu") != "reference":
        assert len(found["rows"]) == sum(len(t.dtypes) for t in wanted)
        assert ["reference" in row["others"] for row in found["rows"]].count(False) == sum(t.chunk > 0 for t in wanted)


def test_only_what_is_known_not_to_wait_is_captured(kernel, monkeypatch):
    """torch before 2.12 is spoilt by a failed capture, and a reference may wait for the device."""
    kernel(ops.gae, ops.gae.reference)
    captured = []
    monkeypatch.setattr(compare, "MAX_CAPTURED", float("inf"))  # else a busy machine's calls are too long
    monkeypatch.setattr(Cpu, "graph_timer", lambda self, call: captured.append(call))
    assert measured(ops.gae, {"B": 3, "T": 17}).rows and len(captured) == 1


@pytest.fixture(scope="module")
def decode_step_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "decode_step.json"
    status = decode_step.main(["--device", "cpu", "--tiny", "--save", str(path)])
    return status, json.loads(path.read_text()), path


@pytest.mark.skipif(ops.decode_attention.chosen("cpu") == "reference", reason="no compiled kernels")
def test_the_decode_step_runs_dry(decode_step_run):
    status, found, _ = decode_step_run
    assert status == 0 and not found["notes"], found["notes"]
    names = [row["row"] for row in found["rows"]]
    assert [sum(name.startswith(kind) for name in names) for kind in ("decode step", "rollout", "prefill")] == [2, 2, 1]
    for row in found["rows"]:
        assert row["seconds"] > 0 and row["tokens_per_second"] > 0
        if row["row"].startswith("decode step"):
            assert row["decode_path"] == "fused" and row["launches"] > 0 and row["kernels"] and row["busy_seconds"] > 0
            assert row["floor_seconds"] == row["bytes"] / found["machine"]["copy_bytes_per_second"]
        if row["row"].startswith("rollout"):
            assert row["ratios"].keys() == {"transformers generate"}


@pytest.mark.skipif(ops.linear_ppo_loss.chosen("cpu") == "reference", reason="no compiled kernels")
@pytest.mark.slow
def test_the_ppo_step_runs_dry_and_both_sides_agree(tmp_path, decode_step_run, capsys, monkeypatch):
    path = tmp_path / "ppo_step.json"
    assert ppo_step.main(["--device", "cpu", "--tiny", "--save", str(path), "--dtype", "float32"]) == 0
    found = json.loads(path.read_text())
    assert not found["notes"], found["notes"]
    rollout, experience, update, total = found["rows"]
    assert rollout["ratios"].keys() == {"transformers generate"}
    assert total["seconds"] == pytest.approx(sum(row["seconds"] for row in (rollout, experience, update)))
    plain = total["phases"]["plain torch"]
    assert plain["rollout"] == rollout["others"]["transformers generate"]["seconds"] and len(plain) == 3
    assert total["ratios"]["plain torch"] == pytest.approx(sum(plain.values()) / total["seconds"])
    for row in (experience, update):
        assert row["checked"].startswith("agree") and max(row["errors"].values()) < 1e-4
        assert row["ratios"]["plain torch"] > 0 and row["peak_bytes"] > 0 and row["others"]["plain torch"]["kernels"]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["report", str(path), str(decode_step_run[2])])
    report.main()
    printed = capsys.readouterr().out
    assert all(row["row"] in printed for row in [*found["rows"], *decode_step_run[1]["rows"]]), printed
    monkeypatch.setattr(sys, "argv", ["report", "--markdown", str(path)])
    report.main()
    assert capsys.readouterr().out.count("\n| PPO update") == 1 + len(update["kernels"])


def test_a_row_that_fails_and_a_deadline_leave_notes_and_the_other_rows(tmp_path, monkeypatch):
    def fails(*args):
        assert json.loads(path.read_text())["rows"] == [], "the file is there before the first row"
        raise RuntimeError("no such luck")

    monkeypatch.setattr(decode_step, "step_row", fails)
    monkeypatch.setattr(decode_step.Bench, "rollout", lambda bench, name: bench.run.add({"row": name, "seconds": 1.0}))
    path, arguments = tmp_path / "made" / "x.json", ["--device", "cpu", "--tiny"]
    assert decode_step.main([*arguments, "--save", str(path)]) == 1
    found = json.loads(path.read_text())
    assert [row["row"] for row in found["rows"]] == ["prefill 1B, 3 prompts of 9 tokens", "135M", "1B"]
    assert found["notes"][0] == "decode step 135M, B = 2: not measured: RuntimeError: no such luck"
    assert decode_step.main([*arguments, "--save", str(path), "--deadline", "1e-9"]) == 0
    found = json.loads(path.read_text())
    assert not found["rows"] and len(found["notes"]) == 6 and "--deadline 1e-09 is over" in found["notes"][0]


def test_time_that_kernels_share_is_busy_once():
    spans = [(0.0, 4.0, "a"), (1.0, 2.0, "b"), (3.0, 6.0, "a"), (8.0, 9.0, "b")]
    found = device_profile.summary(spans, host_launches=6, steps=2)
    assert (found.launches, found.host_launches, found.busy_seconds) == (2, 3, 3.5e-6)
    assert found.kernels[0] == {"name": "a", "calls": 1, "us": 3.5}
