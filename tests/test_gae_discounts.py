"""gamma and lam of gae, gae_packed and ppo_advantages as tensors of one number per row."""

import os
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_fast import ops
from rlhf_fast.kernels import _gae
from rlhf_fast.kernels._arguments import split_rows

NAMES = ("gae", "gae_packed", "ppo_advantages")
PER_ROW = ("gamma", "lam", "gamma and lam")
CALLS = [(name, backend) for name in NAMES for backend in getattr(ops, name).backends]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
each_call = pytest.mark.parametrize("name, backend", CALLS, ids=lambda x: x)
needs_simt = pytest.mark.skipif("simt" not in ops.gae.backends, reason="CUDA's kernels do not run here")


class Batch:
    """Rows of tokens, on which each of the three ops computes advantages and returns (B, T), zero outside the mask."""

    def __init__(self, B, T):
        self.rewards, self.values = torch.randn(2, B, T)
        self.mask = (torch.rand(B, T) > 0.2) | (torch.rand(B, 1) > 0.6)
        self.bootstrap = torch.randn(B)

    def call(self, name, backend, gamma, lam):
        """Return advantages and returns, and what else the op has: statistics and kl of ppo_advantages."""
        op = getattr(ops, name)
        device = "cpu" if op.can_run(backend, "cpu") else "cuda"
        gamma, lam = (x.to(device) if isinstance(x, torch.Tensor) and x.is_cpu else x for x in (gamma, lam))
        rewards, values, mask, bootstrap = (
            x.to(device) for x in (self.rewards, self.values, self.mask, self.bootstrap)
        )
        B, T = mask.shape
        call = op.backend(backend)
        if name == "gae":
            out = call(rewards, values, mask, gamma, lam, bootstrap)
        elif name == "gae_packed":
            offsets = torch.arange(B + 1, device=device) * T
            out = call(rewards.flatten(), values.flatten(), mask.flatten(), offsets, gamma, lam, bootstrap)
            out = [x.view(B, T) for x in out]
        else:  # its reward is -kl_coef times the difference of log-probabilities, and the score at the last token
            zeros, scores = torch.zeros_like(values), torch.zeros_like(bootstrap)
            out = call(-rewards, zeros, values, scores, mask, 1.0, "k1", gamma, lam, 0.0, bootstrap)
        return [x.cpu() for x in out]

    def truth(self, gamma, lam):
        """Return advantages and returns by a loop over numbers in float64."""
        B, T = self.mask.shape
        gammas, lams = (x.double().tolist() if isinstance(x, torch.Tensor) else [x] * B for x in (gamma, lam))
        advantages, returns = torch.zeros(2, B, T, dtype=torch.float64)
        for row in range(B):
            advantage, next_value = 0.0, self.bootstrap[row].item()
            for t in reversed(range(T)):
                if self.mask[row, t]:
                    reward, value = self.rewards[row, t].item(), self.values[row, t].item()
                    delta = reward + gammas[row] * next_value - value
                    advantage, next_value = delta + gammas[row] * lams[row] * advantage, value
                    advantages[row, t], returns[row, t] = advantage, advantage + value
        return advantages, returns


def discounts(per_row, B):
    gamma = 0.8 + 0.2 * torch.rand(B) if "gamma" in per_row else 0.99
    lam = torch.rand(B) if "lam" in per_row else 0.95
    for x in (gamma, lam):
        if isinstance(x, torch.Tensor) and B > 2:
            x[:2] = torch.tensor([0.0, 1.0])
    return gamma, lam


def assert_close(ours, truth):
    for o, t in zip(ours, truth, strict=False):
        assert (o - t).abs().max() <= 1e-5 * max(1.0, t.abs().max())


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_call
@pytest.mark.parametrize("per_row", PER_ROW)
@pytest.mark.parametrize("B, T", [(7, 37), (11, 3), (3, 700)])
@pytest.mark.exhaustive(1, by=("name", "backend", "per_row"))
def test_against_a_loop_in_float64(name, backend, per_row, B, T):
    batch = Batch(B, T)
    gamma, lam = discounts(per_row, B)
    assert_close(batch.call(name, backend, gamma, lam), batch.truth(gamma, lam))


@each_call
def test_a_row_has_the_bits_that_its_number_gives(name, backend):
    """A number that float32 has, as the float of a tensor is."""
    batch, B = Batch(6, 70), 6
    gamma, lam = discounts("gamma and lam", B)
    of_all = [torch.tensor(x).item() for x in (0.99, 0.95)]
    calls = {"gamma and lam": (gamma, lam), "gamma": (gamma, of_all[1]), "lam": (of_all[0], lam)}
    rows = {per_row: batch.call(name, backend, *given) for per_row, given in calls.items()}
    for row in (3,) if backend == "triton" and INTERPRETED else range(B):
        for per_row, found in rows.items():
            g = gamma[row].item() if "gamma" in per_row else of_all[0]
            la = lam[row].item() if "lam" in per_row else of_all[1]
            number = batch.call(name, backend, g, la)
            assert same_bits([x[row] for x in found[:2]], [x[row] for x in number[:2]])


@needs_simt
@pytest.mark.parametrize("per_row", PER_ROW)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.exhaustive(1, by=("name",))
def test_long_rows_split_over_blocks(name, per_row):
    batch = Batch(2, 16384)
    assert _gae.chunking(2, 2 * 16384, 16384, batch.values)[0] == 1024
    # Their products are exact in float32: over thousands of tokens a rounded decay is another one.
    gamma, lam = torch.tensor([1 - 2**-8, 1 - 2**-11]), torch.tensor([0.875, 1 - 2**-10])
    gamma, lam = gamma if "gamma" in per_row else 1 - 2**-12, lam if "lam" in per_row else 1 - 2**-9
    ours = batch.call(name, "simt", gamma, lam)
    assert_close(ours, batch.truth(gamma, lam))
    gamma, lam = (x if isinstance(x, float) else x[:1] for x in (gamma, lam))
    first = Batch(1, 16384)
    for field in ("rewards", "values", "mask", "bootstrap"):
        setattr(first, field, getattr(batch, field)[:1])
    assert same_bits([x[:1] for x in ours[:2]], first.call(name, "simt", gamma, lam)[:2])


@pytest.mark.parametrize("backend", [b for b in ops.gae_packed.backends if ops.gae.can_run(b, "cpu")])
def test_packed_equals_padded(backend):
    lengths = [5, 0, 33, 1, 0, 64, 17, 0]
    inside = torch.arange(64) < torch.tensor(lengths)[:, None]
    rewards, values = torch.randn(2, *inside.shape)
    mask = inside & (torch.rand(inside.shape) > 0.3)
    gamma, lam = discounts("gamma and lam", len(lengths))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    padded = ops.gae.backend(backend)(rewards, values, mask, gamma, lam)
    packed = ops.gae_packed.backend(backend)(rewards[inside], values[inside], mask[inside], offsets, gamma, lam)
    assert same_bits([x[inside] for x in padded], packed)


@each_call
@pytest.mark.parametrize("B, T", [(4, 30), (3, 5000)])
def test_a_nan_makes_nan_of_its_row_alone(name, backend, B, T):
    if T > 4096 and (backend == "reference" or (backend == "triton" and INTERPRETED)):
        pytest.skip("long rows are for the kernels that split them")
    batch = Batch(B, T)
    batch.mask[1, -2:] = torch.tensor([True, False])
    for i, name_of_nan in enumerate(("gamma", "lam")):
        given, healthy = [0.99, 0.95], [0.99, 0.95]
        given[i] = torch.full((B,), given[i])
        healthy[i] = given[i].clone()
        given[i][1] = torch.nan
        found, expected = batch.call(name, backend, *given), batch.call(name, backend, *healthy)
        others = torch.arange(B) != 1
        for x, y in zip(found[:2], expected[:2], strict=True):
            assert torch.equal(x[1].isnan(), batch.mask[1]), f"of {name_of_nan}"
            assert torch.equal(x[others], y[others])
        if name == "ppo_advantages":
            assert found[2].isnan().tolist() == [False, True, True, True, True]
            assert torch.equal(found[3], expected[3])
            empty = Batch(B, T)
            empty.mask[1] = False
            assert same_bits(empty.call(name, backend, *given), empty.call(name, backend, *healthy))


def call_on(batch, name, **options):
    return batch.call(name, "reference", options.get("gamma", 0.99), options.get("lam", 0.95))


@pytest.mark.parametrize("key", ["gamma", "lam"])
@pytest.mark.parametrize("name", NAMES)
def test_bad_tensors_name_the_rule(name, key):
    batch = Batch(3, 4)
    cases = [
        (torch.rand(2), rf"{key} must be a number or have shape \(3,\), got \[2\]"),
        (torch.rand(1), rf"{key} must be a number or have shape \(3,\), got \[1\]"),
        (torch.rand(3, 1), rf"{key} must be a number or have shape \(3,\), got \[3, 1\]"),
        (torch.ones(3, dtype=torch.int64), rf"{key} must be floating point, got int64; pass {key}.float\(\)"),
        (torch.rand(3, device="meta"), "all tensors must be on one device, got cpu.*meta"),
        (torch.tensor(1.5), r"gamma and lam must be within \[0, 1\], got .*1.5"),
    ]
    for given, rule in cases:
        with pytest.raises(ValueError, match=f"^{name}: {rule}"):
            call_on(batch, name, **{key: given})
    other = "gamma" if key == "lam" else "lam"
    with pytest.raises(ValueError, match=rf"^{name}: {other} must be within \[0, 1\], got -0.5$"):
        call_on(batch, name, **{key: torch.rand(3), other: -0.5})
    for given in (None, [0.9, 0.9, 0.9]):
        with pytest.raises(TypeError, match=f"^{name}: {key} must be a number or a torch.Tensor, got "):
            call_on(batch, name, **{key: given})


@each_call
@pytest.mark.parametrize("key", ["gamma", "lam"])
def test_numbers_of_a_tensor_on_the_cpu_are_checked(name, backend, key):
    if not getattr(ops, name).can_run(backend, "cpu"):
        pytest.skip("a GPU would be waited for")
    for bad, shown in ((1.5, "1.5"), (-0.25, "-0.25"), (torch.inf, "inf")):
        given = {"gamma": 0.99, "lam": 0.95, key: torch.tensor([0.5, 1.0, bad])}
        rule = re.escape(f"{name}: {key} must be within [0, 1], got {shown} in row 2")
        with pytest.raises(ValueError, match=f"^{rule}$"):
            Batch(3, 4).call(name, backend, **given)


@each_call
def test_every_form_of_a_tensor_gives_the_same_bits(name, backend):
    """Strides, an expanded number, 16 bits, and a tensor that requires a gradient."""
    batch = Batch(5, 40)
    values = torch.rand(5).bfloat16().float()
    plain = batch.call(name, backend, values, values)
    strided = torch.stack([values, torch.full((5,), torch.nan)], 1)[:, 0]
    forms = [strided, values.bfloat16(), values.clone().requires_grad_(), values.flip(0).flip(0)]
    for form in forms:
        found = batch.call(name, backend, form, form)
        assert same_bits(found, plain) and not any(x.requires_grad for x in found)
    expanded = torch.tensor(0.75).expand(5)
    assert same_bits(
        batch.call(name, backend, expanded, expanded), batch.call(name, backend, torch.full((5,), 0.75), 0.75)
    )
    half = values.half()
    assert same_bits(batch.call(name, backend, half, half), batch.call(name, backend, half.float(), half.float()))


@pytest.mark.parametrize("name", NAMES)
def test_one_of_float64_makes_all_float64(name):
    batch = Batch(3, 20)
    lam = torch.rand(3, dtype=torch.float64)
    found = batch.call(name, "reference", 0.99, lam)
    truth = batch.truth(0.99, lam)
    for x, y in zip(found, truth, strict=False):
        assert x.dtype == torch.float64
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_without_dimensions_is_a_number(name):
    """One of float64 or of integers makes no tensor float64."""
    batch = Batch(3, 20)
    plain = call_on(batch, name, gamma=1.0, lam=0.75)
    found = call_on(batch, name, gamma=torch.tensor(1), lam=torch.tensor(0.75, dtype=torch.float64, requires_grad=True))
    assert same_bits(found, plain) and found[0].dtype == torch.float32


def test_numbers_stay_numbers():
    """So a GPU's call needs no memory, launch or wait for them, and torch.compile's graph no tensor of the CPU."""
    args = ops.gae.make_inputs(B=2, T=3, device="cpu", dtype=torch.float32)
    for given in ((0.99, 0.95), (torch.tensor(0.5), 1)):
        normalized = ops.gae.normalized(*args[:3], *given, None)
        assert [type(x) for x in normalized[3:5]] == [float, float]
        assert split_rows(normalized, ops.gae.rows) is normalized
    assert _gae.row_discounts("gae", 0.99, 0.95) == (0.99, 0.95, None, None)
    on_meta = ops.gae.normalized(*(x.to("meta") for x in args[:3]), torch.tensor(0.5), 0.95, None)
    assert on_meta[3] == 0.5
    schema = str(ops.gae.torch_op._schema)
    assert "float gamma=1., float lam=0.94999999999999996, Tensor? bootstrap=None, Tensor? gamma_rows=None" in schema


@pytest.mark.parametrize("name", NAMES)
def test_compiled_faked_and_split_by_vmap(name):
    batch = Batch(3, 20)
    lam = torch.rand(3)

    def advantages(rewards, lam):
        options = {"gamma": 0.99, "lam": lam, "bootstrap": batch.bootstrap}
        if name == "gae":
            return ops.gae(rewards, batch.values, batch.mask, **options)
        if name == "gae_packed":
            flat = rewards.flatten(), batch.values.flatten(), batch.mask.flatten()
            return ops.gae_packed(*flat, torch.tensor([0, 20, 40, 60]), **options)
        zeros = torch.zeros_like(rewards)
        return ops.ppo_advantages(rewards, zeros, batch.values, zeros[:, 0], batch.mask, **options)

    for given in (lam, torch.tensor(0.5)):
        torch._dynamo.reset()
        compiled = torch.compile(advantages, fullgraph=True, backend="aot_eager")
        assert same_bits(compiled(batch.rewards, given), advantages(batch.rewards, given))
    lams = torch.stack([lam, lam.flip(0)])
    found = torch.vmap(lambda lam: advantages(batch.rewards, lam))(lams)
    for i in (0, 1):
        assert same_bits([x[i] for x in found], advantages(batch.rewards, lams[i]))
    expected = advantages(batch.rewards, lam)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = advantages(mode.from_tensor(batch.rewards), mode.from_tensor(lam))
    assert [x.shape for x in fake] == [x.shape for x in expected]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.exhaustive(1)
def test_the_op_of_torch_keeps_its_contract(name):
    op = getattr(ops, name)
    sizes = [size for size in op.small_sizes if "per_row" in size]
    assert {size["per_row"] for size in sizes} == set(PER_ROW)
    args = op.normalized(*op.make_inputs(device="cpu", dtype=torch.float32, **sizes[0]))
    torch.library.opcheck(op.torch_op, split_rows(args, op.rows))


def test_lambda_of_a_responses_length():
    """VAPO's: 1 - 1 / (alpha length), 0 where that is negative."""
    mask = torch.arange(400) < torch.tensor([10, 20, 40, 400])[:, None]
    lam = (1 - 1 / (0.05 * mask.sum(1))).clamp(0, 1)
    torch.testing.assert_close(lam, torch.tensor([0.0, 0.0, 0.5, 0.95]))
    rewards, values = torch.randn(2, *mask.shape)
    advantages, _ = ops.gae(rewards, values, mask, 1.0, lam)
    for row, number in enumerate((0.0, 0.0, 0.5, 0.95)):
        one = slice(row, row + 1)
        torch.testing.assert_close(advantages[one], ops.gae(rewards[one], values[one], mask[one], 1.0, number)[0])
