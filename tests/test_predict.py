"""The model of an H100 on paper: what it counts, the committed table, and the tool itself where nvcc is."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast.bench import card
from rlhf_fast.bench.checks import loops, runtime_stub, sass
from rlhf_fast.bench.problem import label
from rlhf_fast.bench.targets import TARGETS

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "h100-predicted.md"
WITHIN = 1.35
NOT_WITHIN = {  # docs/gpu.md says why
    "sample_tokens B 256, V 128256, top_p 0.9 bfloat16 forward, triton": 1.9,
    "sample_tokens B 256, V 128256 bfloat16 forward, cuda": 1.45,
}
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def seconds(cell: str) -> float:
    number, unit = cell.split()
    return float(number) * UNITS[unit]


def read_rows(path: Path) -> dict[str, dict[str, str]]:
    """The first table of a file: "case, backend" -> column -> cell."""
    lines = path.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| case"))
    last = lines.index("", first)
    header, _, *cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:last]]
    return {f"{row[0]}, {row[1]}": dict(zip(header, row, strict=True)) for row in cells}


def check_rows(rows: dict[str, dict[str, str]]) -> None:
    """A prediction is a number, not below the floor, and near what was measured."""
    for name, row in rows.items():
        predicted, floor = seconds(row["predicted"]), seconds(row["floor"])
        assert 0 < predicted < 1 and "nan" not in " ".join(row.values()), name
        assert predicted >= 0.999 * floor, name
        assert float(row["moved, MB"]) >= 0.999 * float(row["least, MB"]) - 0.1, name
        assert int(row["launches"]) >= 1, name
        if row["measured"]:
            ratio = predicted / seconds(row["measured"])
            assert abs(math.log(ratio)) <= math.log(NOT_WITHIN.get(name, WITHIN)), f"{name}: {ratio:.2f} of measured"


def names_of_targets() -> set[str]:
    return {
        f"{target.op} {label(target.size)} {str(dtype)[6:]} {'forward+backward' if target.gradient else 'forward'}"
        for target in TARGETS
        for dtype in target.dtypes
    }


def test_the_committed_table_has_every_target_and_agrees_with_what_was_measured():
    rows = read_rows(TABLE)
    check_rows(rows)
    for target in names_of_targets():
        assert f"{target}, triton" in rows, target
        assert f"{target}, cuda" in rows or target.startswith("linear_"), target
    assert sum(bool(row["measured"]) for row in rows.values()) >= 40


SIZES = [
    ("ppo_loss 512 x 1024 float32 forward+backward", "ppo_loss 8192 x 2048 float32 forward+backward"),
    ("ppo_advantages B 512, T 1024 bfloat16 forward", "ppo_advantages B 8192, T 2048 bfloat16 forward"),
    (
        "decode_attention lengths 64 x 512, H 32, Hkv 8, d 64, P 64 bfloat16 forward",
        "decode_attention lengths 64 x 2048, H 32, Hkv 8, d 64, P 64 bfloat16 forward",
        "decode_attention lengths 64 x 2048, H 32, Hkv 8, d 128, P 64 bfloat16 forward",
    ),
    (
        "sample_tokens B 256, V 128256 bfloat16 forward",
        "sample_tokens B 256, V 128256, top_p 0.9 bfloat16 forward",
    ),
]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("names", SIZES, ids=lambda names: names[0].split()[0])
def test_more_work_takes_longer(names, backend):
    rows = read_rows(TABLE)
    found = [seconds(rows[f"{name}, {backend}"]["predicted"]) for name in names]
    assert found == sorted(set(found))


def test_a_table_with_a_missing_or_absurd_number_is_refused():
    rows = read_rows(TABLE)
    name = "token_logprobs 8192, V 151936 bfloat16 forward, cuda"
    for column, cell in (("predicted", "1.0 us"), ("predicted", "90.00 ms"), ("launches", "0"), ("waves", "nan")):
        with pytest.raises(AssertionError):
            check_rows({name: rows[name] | {column: cell}})


def test_blocks_of_an_sm():
    """By hand, for registers, shared memory, threads and blocks in turn."""
    cases = {(256, 64, 0): 4, (1024, 64, 0): 1, (256, 128, 0): 2, (256, 32, 100 << 10): 2, (1024, 32, 0): 2}
    cases |= {(32, 16, 0): 32, (256, 80, 16 << 10): 3, (128, 168, 72 << 10): 3, (1024, 64, 225 << 10): 1}
    for (threads, registers, shared), blocks in cases.items():
        assert card.Shape(1, threads, registers, shared).blocks_per_sm == blocks, (threads, registers, shared)
    assert card.Shape(132 * 4 * 3, 256, 64, 0).waves == 3


def test_bounds_follow_the_work():
    shape = card.Shape(132 * 8, 256, 32, 0)
    one = card.bounds(card.Work(num_bytes=card.COPY_RATE), shape)
    assert one.memory == 1 and one.limiter == "memory" and one.seconds == pytest.approx(1, rel=1e-4)
    both = card.bounds(card.Work(card.COPY_RATE, card.ISSUE_RATE * card.ISSUE_SHARE), shape)
    assert both.issue == pytest.approx(1) and both.seconds == pytest.approx(math.sqrt(2), rel=1e-4)
    product = card.bounds(card.Work(flops=card.PRODUCT_RATE), None)
    assert product.products == 1 and product.limiter == "products"
    for field in ("num_bytes", "instructions", "special", "flops", "rounds", "visits"):
        more = card.bounds(card.Work(1e6, 1e6, 1e5, 1e6, 2, 2)._replace(**{field: 1e9}), shape)
        assert more.seconds > card.bounds(card.Work(1e6, 1e6, 1e5, 1e6, 2, 2), shape).seconds, field
    few = card.bounds(card.Work(instructions=1e9), shape._replace(blocks=1))
    assert few.issue == pytest.approx(132 * card.bounds(card.Work(instructions=1e9), shape).issue)
    assert card.seconds_of([one] * 3) == pytest.approx(3 * one.seconds + card.EMPTY_GRAPH + 2 * card.NODE_GAP)


CODE = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA 0x00a0 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   MUFU.EX2 R8, R4 ;
        /*0040*/              @!P1 BRA 0x0070 ;
        /*0050*/                   FADD R8, R8, R4 ;
        /*0060*/                   FADD R8, R8, R5 ;
        /*0070*/                   LDG.E.U16 R5, desc[UR4][R2.64] ;
        /*0080*/                   ISETP.NE.AND P0, PT, R0, RZ, PT ;
        /*0090*/               @P0 BRA 0x0020 ;
        /*00a0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
        /*00d0*/                   NOP;
"""


def test_a_loop_is_found_in_machine_code():
    """6 instructions are in the loop where a branch skips two others, of which one in two passes has them."""
    code = loops.analyze(CODE)
    assert code.loop == loops.Pass(6, 18, 1)
    assert code.mean == loops.Pass(7, 18, 1)
    assert code.whole == loops.Pass(10, 18, 1)
    straight = loops.analyze(CODE.replace("@P0 BRA 0x0020", "@P0 BRA 0x00a0"))
    assert straight.loop is None and straight.whole == loops.Pass(10, 18, 1)


def run_tool(*arguments):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RLHF_FAST_SIMT")}
    command = [sys.executable, "-m", "rlhf_fast.bench.predict", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.exhaustive(0, slow=1)
@pytest.mark.skipif(runtime_stub.nvcc() is None or sass.cuobjdump() is None, reason="no nvcc")
@pytest.mark.parametrize("op", sorted({target.op for target in TARGETS}))
def test_the_tool_predicts_the_targets_of_an_op(op, tmp_path):
    pytest.importorskip("triton")
    result = run_tool(op, "--save", tmp_path / "table.md")
    assert result.returncode == 0, result.stderr[-2000:]
    rows, committed = read_rows(tmp_path / "table.md"), read_rows(TABLE)
    check_rows(rows)
    targets = {f"{name}, triton" for name in names_of_targets() if name.split()[0] == op}
    assert targets and targets <= rows.keys() <= committed.keys()
    for name, row in rows.items():  # another compiler makes other code
        assert 0.8 < seconds(row["predicted"]) / seconds(committed[name]["predicted"]) < 1.25, name
    if op == "decode_attention":
        assert re.search(r"decode_attention\.attend_kernel<__nv_bfloat16, 4, true> .* by hand", result.stdout)


@pytest.mark.slow
def test_without_nvcc_only_triton_is_predicted(monkeypatch):
    pytest.importorskip("triton")
    code = "import sys; from rlhf_fast.bench.checks import runtime_stub; runtime_stub.nvcc = lambda: None\n"
    code += "from rlhf_fast.bench import predict; sys.argv = ['predict', 'ppo_loss']; sys.exit(predict.main())"
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RLHF_FAST_SIMT")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "nvcc was not found: csrc/cuda is left out" in result.stderr
    assert "| triton |" in result.stdout and "| cuda |" not in result.stdout
