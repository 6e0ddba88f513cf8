"""Scoring by Triton's fused product and softmax, compared with float64. Its tiles compile for NVIDIA GPUs."""

import os
import subprocess
import sys

import pytest
import torch

from rlhf_fast.kernels._backends import TRITON_DEVICES
from rlhf_fast.kernels._head_inputs import random_head_inputs
from rlhf_fast.kernels.linear_kl import linear_kl_with_statistics
from rlhf_fast.kernels.linear_logprobs import linear_logprobs_with_statistics

pytest.importorskip("triton")
if not TRITON_DEVICES:
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)

from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels.triton import _scoring as scoring

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])


@pytest.fixture
def small(monkeypatch):
    """Small sizes have several blocks of rows, splits, tiles per split and steps per product."""
    monkeypatch.setattr(scoring, "choose_tile", lambda *_: scoring.Tile(16, 16, 16, 4, 2))
    monkeypatch.setattr(scoring, "MAX_SPLITS", 3)
    monkeypatch.setattr(scoring, "GROUP_BYTES", 0)
    monkeypatch.setattr(scoring, "LIST_BLOCK", 16)


def one_head(N, D, V, dtype, **options):
    args = random_head_inputs(N, D, V, DEVICE, dtype, **options)
    return [x if x is None else x.detach() for x in args]


def two_heads(N, D, E, V, dtype, ref_scale=1.0, **options):
    """Return the arguments of score_pair without temperature and softcap."""
    hidden, weight, targets, bias = one_head(N, D, V, dtype, **options)
    ref_hidden, ref_weight, _, ref_bias = one_head(N, E, V, dtype, **options)
    ref_hidden = (ref_scale * ref_hidden.nan_to_num()).masked_fill((targets == -100)[:, None], torch.nan)
    return hidden, weight, ref_hidden, ref_weight, targets, bias, ref_bias


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def float64_score(hidden, weight, targets, bias, temperature, softcap, convert=double):
    args = map(convert, (hidden, weight, targets, bias, temperature, softcap))
    logprobs, entropy, _, _, statistics = linear_logprobs_with_statistics.reference(*args)
    return torch.stack([logprobs, entropy, *statistics])


def score(hidden, weight, targets, bias, temperature, softcap):
    out = torch.full((4, len(targets)), torch.nan, device=targets.device)
    scoring.score(hidden, weight, targets, bias, temperature, softcap, scoring.Outputs(*out.unbind()))
    return out


def score_pair(hidden, weight, ref_hidden, ref_weight, targets, bias, ref_bias, temperature, softcap):
    out = torch.full((9, len(targets)), torch.nan, device=targets.device)
    heads = (hidden, weight, ref_hidden, ref_weight)
    scoring.score_pair(*heads, targets, temperature, softcap, bias, ref_bias, scoring.Outputs(*out.unbind()))
    return out


def float64_score_pair(
    hidden, weight, ref_hidden, ref_weight, targets, bias, ref_bias, temperature, softcap, convert=double
):
    args = hidden, weight, ref_hidden, ref_weight, targets, temperature, softcap, bias, ref_bias
    logprobs, ref_logprobs, entropy, kl, (m, s, *others) = linear_kl_with_statistics.reference(*map(convert, args))
    return torch.stack([logprobs, entropy, m, s, ref_logprobs, kl, *others])


def assert_near(ours, reference, args):
    """Allow the largest error of plain float32 torch, plus float32 rounding of the value and of the logits."""
    assert ours.dtype == torch.float32
    truth, plain = reference(*args), reference(*args, convert=lambda x: x)
    finite = truth.isfinite()
    assert torch.equal(ours.double()[~finite].nan_to_num(), truth[~finite].nan_to_num())
    error, allowed = ((x.double() - truth).where(finite, 0).abs() for x in (ours, plain))
    logits = truth[2::4].where(finite[2::4], 0).abs().amax(0)
    slack = 2e-6 * (1 + truth.where(finite, 0).abs()) + 2**-23 * logits
    for i, (row, bound) in enumerate(zip(error - slack, allowed, strict=True)):
        if len(row):
            assert row.max() <= bound.max(), f"output {i}: {row.max()} beyond rounding, plain torch {bound.max()}"


OPTIONS = [
    {"N": 37, "D": 24, "V": 131},
    {"N": 1, "D": 1, "V": 2},
    {"N": 5, "D": 17, "V": 33, "temperature": 0.7, "bias": True},
    {"N": 33, "D": 40, "V": 97, "softcap": 5.0, "temperature": 1.5, "bias": True, "index": torch.int32},
    {"N": 18, "D": 8, "V": 50, "ignored": 0.0, "softcap": 2.0},
    {"N": 9, "D": 9, "V": 64, "offset": -640.0, "temperature": 0.3},
    {"N": 0, "D": 8, "V": 5},
]


@DTYPES
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items()))
@pytest.mark.exhaustive(10)
def test_a_head_alone(options, dtype, small, poisoned):
    options = dict(options)
    scalars = options.pop("temperature", 1.0), options.pop("softcap", 0.0)
    args = *one_head(dtype=dtype, **options), *scalars
    ours = score(*args)
    assert_near(ours, float64_score, args)
    assert torch.equal(ours, score(*args))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items()))
def test_log_z_and_top1(options, small):
    """Also of rows whose target is the largest, in one of several splits of the vocabulary."""
    options = dict(options)
    scalars = options.pop("temperature", 1.0), options.pop("softcap", 0.0)
    hidden, weight, targets, bias = one_head(dtype=torch.float32, **options)
    x = hidden.nan_to_num() @ weight.T + (0 if bias is None else bias)
    is_valid = targets != -100
    targets[::2] = torch.where(is_valid, x.argmax(-1).to(targets.dtype), targets)[::2]
    out = torch.full((5, len(targets)), torch.nan)
    top1 = torch.full((len(targets),), 7, dtype=torch.uint8)
    scoring.score(hidden, weight, targets, bias, *scalars, scoring.Outputs(*out[:4], log_z=out[4], top1=top1))
    args = map(double, (hidden, weight, targets, bias, *scalars))
    _, _, log_z, is_top1, _ = linear_logprobs_with_statistics.reference(*args)
    torch.testing.assert_close(out[4].double(), log_z, rtol=2e-6, atol=5e-6)
    assert torch.equal(top1.bool(), is_top1)


@DTYPES
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items()))
@pytest.mark.exhaustive(10)
def test_a_policy_and_its_reference(options, dtype, small, poisoned):
    options = dict(options)
    scalars = options.pop("temperature", 1.0), options.pop("softcap", 0.0)
    args = *two_heads(E=options["D"] + 8 * (options["N"] % 2), dtype=dtype, **options), *scalars
    ours = score_pair(*args)
    assert_near(ours, float64_score_pair, args)
    assert torch.equal(ours, score_pair(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_tiles_as_chosen(dtype, poisoned):
    """Rows are in more than one block."""
    args = *one_head(70, 24, 300, dtype, bias=True), 1.0, 0.0
    assert_near(score(*args), float64_score, args)
    args = *two_heads(70, 24, 16, 300, dtype), 1.0, 0.0
    assert_near(score_pair(*args), float64_score_pair, args)


def test_a_pair_of_equals_has_no_divergence(small):
    hidden, weight, targets, bias = one_head(21, 24, 131, torch.bfloat16, bias=True)
    out = score_pair(hidden, weight, hidden, weight, targets, bias, bias, 0.9, 0.0)
    assert (out[5] == 0).all() and torch.equal(out[0], out[4]) and torch.equal(out[2:4], out[6:8])
    assert torch.equal(out[:4], score(hidden, weight, targets, bias, 0.9, 0.0))  # these tiles are the same


def test_far_apart(small):
    args = *two_heads(20, 24, 24, 131, torch.float32, ref_scale=300.0), 1.0, 0.0
    truth = float64_score_pair(*args)
    assert truth[5].max() > 300
    torch.testing.assert_close(score_pair(*args).double(), truth, atol=1e-4, rtol=2e-6)


@pytest.mark.parametrize("ignored", ["all", "none", "a block", "all but the last"])
def test_ignored_rows(ignored, small, poisoned):
    hidden, weight, targets, bias = one_head(53, 24, 131, torch.bfloat16, ignored=0.0)
    off = torch.zeros(53, dtype=torch.bool, device=DEVICE)
    off[{"all": slice(None), "none": slice(0), "a block": slice(5, 40), "all but the last": slice(-1)}[ignored]] = True
    hidden, targets = hidden.masked_fill(off[:, None], torch.nan), targets.masked_fill(off, -100)
    out = score(hidden, weight, targets, bias, 1.0, 0.0)
    assert (out[:, off] == 0).all() and out.isfinite().all()
    assert_near(out, float64_score, (hidden, weight, targets, bias, 1.0, 0.0))
    both = score_pair(hidden, weight, hidden, weight, targets, bias, bias, 1.0, 0.0)
    assert (both[:, off] == 0).all() and torch.equal(both[:4], out)


def test_ignored_rows_cost_no_product(small, monkeypatch):
    """With a weight of NaN every row that is multiplied is NaN. Blocks behind the last valid row are not."""
    hidden, weight, targets, _ = one_head(64, 24, 131, torch.float32, ignored=0.0)
    targets[7:] = -100
    seen = []
    run = scoring.launch.run

    def keep(kernel, grid, *args, **meta):
        run(kernel, grid, *args, **meta)
        if kernel is scoring.score_kernel:
            _, _, parts, *_ = args
            seen.append(parts.clone())

    monkeypatch.setattr(scoring.launch, "run", keep)
    score(hidden, torch.full_like(weight, torch.nan), targets, None, 1.0, 0.0)
    (parts,) = seen
    assert parts[:, 1, :16].isnan().all() and (parts[:, 1, 16:] == 0).all() and parts.shape[2] == 64


@DTYPES
@pytest.mark.exhaustive(1)
def test_a_row_has_the_same_bits_in_any_batch(dtype, small):
    args = two_heads(41, 24, 17, 131, dtype, ignored=0.0, bias=True)
    hidden, weight, ref_hidden, ref_weight, targets, bias, ref_bias = args
    whole = score_pair(*args, 0.7, 0.0)
    alone = score(hidden, weight, targets, bias, 0.7, 0.0)
    for rows in (slice(0, 1), slice(7, 8), slice(40, 41), slice(3, 30), torch.randperm(41, device=DEVICE)):
        some = score_pair(hidden[rows], weight, ref_hidden[rows], ref_weight, targets[rows], bias, ref_bias, 0.7, 0.0)
        assert torch.equal(some, whole[:, rows])
        assert torch.equal(score(hidden[rows], weight, targets[rows], bias, 0.7, 0.0), alone[:, rows])
    odd = torch.arange(41, device=DEVICE) % 3 == 0
    some = score(hidden, weight, targets.masked_fill(odd, -100), bias, 0.7, 0.0)
    assert torch.equal(some[:, ~odd], alone[:, ~odd])


@pytest.mark.parametrize("offset", [-640.0, -100.0, 60.0, 640.0])
def test_confident_rows_are_never_more_than_certain(offset, small):
    """hidden is the identity, so weight has the logits."""
    logits = 4 * torch.randn(32, 90, device=DEVICE)
    targets = logits.argmax(-1)
    logits[torch.arange(32), targets] += torch.linspace(0, 100, 32, device=DEVICE)
    logits += offset
    out = score(torch.eye(32, device=DEVICE), logits.T.contiguous(), targets, None, 1.0, 0.0)
    truth = logits.double().log_softmax(-1)
    others = logits.scatter(1, targets[:, None], -torch.inf)
    assert (out[0] <= 0).all() and (out[1] >= 0).all() and torch.equal(out[2], others.amax(-1))
    picked = truth[torch.arange(32), targets]
    torch.testing.assert_close(out[0].double(), picked, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(out[1].double(), -(truth.exp() * truth).sum(-1), atol=5e-6, rtol=2e-6)


def test_columns_that_are_ruled_out(small):
    """Tiles, splits and the target itself, by the policy, by the reference or by both."""
    hidden, weight, ref_hidden, ref_weight, targets, bias, ref_bias = two_heads(
        20, 24, 16, 150, torch.bfloat16, ignored=0.2, bias=True
    )
    bias[20:140] = -torch.inf
    targets = torch.where(targets >= 0, targets % 20, targets)
    targets[0] = 30
    ref_bias[40:60] = -torch.inf
    args = hidden, weight, ref_hidden, ref_weight, targets, bias, ref_bias, 0.8, 0.0
    out = score_pair(*args)
    assert_near(out, float64_score_pair, args)
    assert out[0, 0] == -torch.inf and out[1:].isfinite().all()
    assert torch.equal(out[:4], score(hidden, weight, targets, bias, 0.8, 0.0))
    for columns in (slice(5, 6), slice(0, 18), slice(145, 150)):  # what the policy still allows
        only = ref_bias.clone()
        only[columns] = -torch.inf
        args = hidden, weight, ref_hidden, ref_weight, targets, bias, only, 0.8, 0.0
        out = score_pair(*args)
        assert (out[5] == torch.where(targets >= 0, torch.inf, 0)).all() and out[1].isfinite().all()


@pytest.mark.parametrize("V", [96, 150])  # one and several tiles a split
def test_the_reference_may_rule_out_a_token_that_the_policy_never_samples(V, small):
    """Also if the first tile holds only such tokens: their probability is 0 only relative to the other tiles."""
    args = two_heads(20, 24, 16, V, torch.bfloat16, ignored=0.2, bias=True)
    *others, bias, ref_bias = args
    never = torch.arange(V, device=DEVICE) < 32
    others[4] = others[4].where(others[4] < 0, others[4] % (V - 32) + 32)
    policy_only = bias.masked_fill(never, -torch.inf)
    expected = score_pair(*others, policy_only, ref_bias.masked_fill(never, -torch.inf), 1.0, 0.0)
    out = score_pair(*others, bias.masked_fill(never, -1000), ref_bias.masked_fill(never, -torch.inf), 1.0, 0.0)
    assert torch.equal(out, expected) and out.isfinite().all() and out[5].max() > 0.1


@pytest.mark.parametrize("where", [0, 70, 130])
def test_nan_shows(where, small):
    hidden, weight, targets, bias = one_head(6, 24, 131, torch.float32, ignored=0.0, bias=True)
    targets[0] = where
    bad = bias.clone()
    bad[where] = torch.nan
    in_sums = targets != where  # the target is in none
    out = score(hidden, weight, targets, bad, 1.0, 0.0)
    assert out[:2].isnan().all() and torch.equal(out[3].isnan(), in_sums)
    out = score(hidden, weight, targets, bias - torch.inf, 1.0, 0.0)
    assert out[:2].isnan().all() and (out[3] == 0).all()
    out = score_pair(hidden, weight, hidden, weight, targets, bias, bad, 1.0, 0.0)
    assert out[:4].isfinite().all() and out[[4, 5, 8]].isnan().all() and torch.equal(out[7].isnan(), in_sums)


def test_strides(small):
    """Rows with gaps between them are read in place; other strides are copied first."""
    hidden, weight, targets, bias = one_head(20, 24, 131, torch.bfloat16, bias=True)
    expected = score(hidden, weight, targets, bias, 1.0, 0.0)

    def strided(x, stride, step):
        memory = torch.full((len(x), stride), torch.nan, dtype=x.dtype, device=DEVICE)
        return memory[:, 3 : 3 + step * x.shape[1] : step].copy_(x)

    for stride, step in ((31, 1), (60, 2)):
        args = strided(hidden, stride, step), strided(weight, stride, step), targets, bias
        assert torch.equal(score(*args, 1.0, 0.0), expected)
    args = hidden, weight, targets.repeat_interleave(2)[::2], bias.repeat_interleave(2)[::2]
    assert torch.equal(score(*args, 1.0, 0.0), expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="maps a file to memory")
@pytest.mark.parametrize("stride", [2**29 + 8, 2**22 - 8])
@pytest.mark.exhaustive(1)
def test_addresses_beyond_two_to_the_thirty_one(stride, small, tmp_path):
    """The memory between the rows is never touched."""
    V = 5 if stride > 2**25 else 600
    hidden, weight, targets, _ = one_head(3, 8, V, torch.bfloat16, ignored=0.0)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2 * V * stride)
    storage = torch.UntypedStorage.from_file(str(tmp_path / "sparse"), shared=True, nbytes=2 * V * stride)
    far = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (V, 8), (stride, 1)).copy_(weight)
    expected = score(hidden, weight, targets, None, 1.0, 0.0)
    assert torch.equal(score(hidden, far, targets, None, 1.0, 0.0), expected)


def test_two_dtypes_and_float64_are_unsupported():
    hidden, weight, targets, _ = one_head(4, 8, 9, torch.bfloat16)
    with pytest.raises(Unsupported, match="two dtypes"):
        score(hidden, weight.float(), targets, None, 1.0, 0.0)
    with pytest.raises(Unsupported, match="float64"):
        score(hidden.double(), weight.double(), targets, None, 1.0, 0.0)


COMPILES = """
import itertools
import torch
import rlhf_fast.bench.checks.triton_resources as tool
from rlhf_fast.kernels.triton import _scoring as scoring

def record(D, has_bias, softcap, is_pair, arch):
    def call():
        def empty(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="cuda")

        head = empty(512, D), empty(50257, D)
        targets = empty(512, dtype=torch.int64)
        bias = empty(50257) if has_bias else None
        out = scoring.Outputs(*empty(9 if is_pair else 4, 512, dtype=torch.float32).unbind())
        if is_pair:
            scoring.score_pair(*head, *head, targets, 1.0, softcap, bias, bias, out)
        else:
            scoring.score(*head, targets, bias, 1.0, softcap, out)
    return tool.record_launches(call, arch)

seen = set()
cases = (768, False, 0.0), (776, True, 0.0), (768, True, 30.0), (77, False, 0.0)
for (D, has_bias, softcap), is_pair, arch in itertools.product(cases, (False, True), tool.SHARED_MEMORY):
    for launch in record(D, has_bias, softcap, is_pair, arch):
        if (launch, arch) in seen:
            continue
        seen.add((launch, arch))
        used = tool.measure(launch, arch)
        faults = [*tool.find_faults(arch, used)]
        if used.product_instruction and D % 8 == 0 and not used.vector_loads:
            faults.append("no 16-byte loads")
        faults = [f"FAULT {fault}" for fault in faults]
        print(launch.name, D, has_bias, softcap, arch, used, *faults, sep="; ")
"""


@pytest.mark.slow
def test_no_tile_spills_and_all_use_tensor_cores(tmp_path):
    file = tmp_path / "compiles.py"
    file.write_text(COMPILES)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=env)
    assert result.returncode == 0 and "FAULT" not in result.stdout, result.stdout + result.stderr
    for kernel in ("score_kernel", "score_pair_kernel"):
        assert result.stdout.count(f"_scoring.{kernel};") == 8, result.stdout
