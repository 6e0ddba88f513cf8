"""Log-probabilities near 0: log p of a token far ahead keeps its relative precision, and so does the target's gradient.

log p = z - logsumexp(z) rounds to 0 from a lead of 16.6 nats on, while the other columns keep their gradients. With

    log p = -log1p(others / own)        d log p / d z of the target = others / (own + others)

both are right to the last digits. Every op that returns a log-probability is here, with every backend that runs.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rlhf_fast import ops

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
GPU = ("triton", "simt", "cuda")
# A third above the largest errors that random rows show. A GPU's 2^x is off by 2 units of its last place.
ULPS, GPU_ULPS = 4, 7
# The target's gradient has one product more. Triton: its distances are of tanh, whose error all logits share that tie.
SOFTCAP_ULPS = {"triton": 16, "simt": 8, "cuda": 8}
CPU_SOFTCAP_ULPS = 6
EQUAL_ULPS = 10  # of the GPU kernels where many equal logits 8 to 11 nats below the largest have much of the sum: their
# exponential is off by the same half a unit of an argument between 8 and 16, and by 2 units of the instruction. Another
# digit would cost 3 operations a logit, of 10.
LEADS = (0.0, 0.5, 3.0, 9.0, 16.0, 17.0, 25.0, 40.0, 63.0, 80.0)


class Logits(NamedTuple):
    """Logits (N, V) with a target in each row; z = softcap(logits) / temperature."""

    x: Tensor
    targets: Tensor
    temperature: float = 1.0
    softcap: float = 0.0

    def z(self) -> Tensor:
        x = self.x.double()
        x = self.softcap * torch.tanh(x / self.softcap) if self.softcap else x
        return x / self.temperature

    def logprobs(self, tokens: Tensor, z: Tensor | None = None) -> Tensor:
        """Return log p of `tokens` (N,) in float64."""
        z = self.z() if z is None else z
        column = tokens[:, None]
        others = z.scatter(1, column, -torch.inf).logsumexp(1)
        return -torch.log1p(torch.exp(others - z.gather(1, column)[:, 0])).where(others > -torch.inf, 0)

    def target_grads(self) -> Tensor:
        """Return the derivative of the targets' log p by their own logits in float64."""
        x = self.x.double().gather(1, self.targets[:, None])[:, 0]
        by_logit = torch.cosh(x / self.softcap) ** -2 if self.softcap else torch.ones_like(x)
        return -torch.expm1(self.logprobs(self.targets)) * by_logit / self.temperature


class Result(NamedTuple):
    logprobs: Tensor
    grad: Tensor | None  # of the sum of log p by the logits


def head_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden and weight whose product is x without rounding; the weight's gradient is that of the logits."""
    return torch.eye(len(x), dtype=x.dtype, device=x.device), x.T.contiguous().requires_grad_()


def token_logprobs(run: Callable, logits: Logits) -> Result:
    x = logits.x.clone().requires_grad_()
    logprobs, _ = run(x, *logits[1:])
    return Result(logprobs, torch.autograd.grad(logprobs.sum(), x)[0])


def linear_logprobs(run: Callable, logits: Logits) -> Result:
    hidden, weight = head_of(logits.x)
    logprobs, *_ = run(hidden, weight, logits.targets, None, logits.temperature, logits.softcap)
    return Result(logprobs, torch.autograd.grad(logprobs.sum(), weight)[0].T)


def linear_cross_entropy(run: Callable, logits: Logits) -> Result:
    hidden, weight = head_of(logits.x)
    ones = torch.ones(len(hidden), device=hidden.device)
    loss, logprobs = run(hidden, weight, logits.targets, ones, None, logits.softcap)
    assert abs(loss + logprobs.double().sum()) <= 1e-5 * loss
    return Result(logprobs, -torch.autograd.grad(loss, weight)[0].T)


def linear_ppo_loss(run: Callable, logits: Logits) -> Result:
    hidden, weight = head_of(logits.x)
    ones = torch.ones(len(hidden), device=hidden.device)
    old = logits.logprobs(logits.targets).float()
    loss, logprobs, _, _ = run(
        hidden, weight, logits.targets, old, ones, ones, temperature=logits.temperature, softcap=logits.softcap
    )
    grad = -torch.autograd.grad(loss, weight)[0].T
    return Result(logprobs, grad / torch.exp(logprobs - old)[:, None].to(grad.dtype))


def linear_kl(run: Callable, logits: Logits) -> Result:
    hidden, weight = head_of(logits.x)
    frozen = weight.detach().roll(1, 1)  # the reference of a row is the policy of another one
    outputs = run(hidden, weight, hidden, frozen, logits.targets, logits.temperature, logits.softcap)
    return Result(outputs[0], torch.autograd.grad(outputs[0].sum(), weight)[0].T)


def linear_kl_ref(run: Callable, logits: Logits) -> Result:
    hidden, weight = head_of(logits.x)
    flat = torch.zeros_like(weight.detach())
    outputs = run(hidden, flat, hidden, weight.detach(), logits.targets, logits.temperature, logits.softcap)
    return Result(outputs[1], None)


CALLS = {
    "token_logprobs": token_logprobs,
    "linear_logprobs": linear_logprobs,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_ppo_loss": linear_ppo_loss,
    "linear_kl": linear_kl,
    "linear_kl_ref": linear_kl_ref,
}


def op_of(name: str):
    return getattr(ops, name.removesuffix("_ref"))


def runs(names):
    """Return (call's name, backend, device) of everything that runs here."""
    for name in names:
        op = op_of(name)
        for device in DEVICES:
            for backend in op.backends:
                if op.can_run(backend, device):
                    yield pytest.param(name, backend, device, id=f"{name}-{backend}-{device}")


SAMPLERS = ("sample_tokens", "linear_sample_tokens")
each_call = pytest.mark.parametrize("name, backend, device", list(runs(CALLS)))
each_sampler = pytest.mark.parametrize("name, backend, device", list(runs(SAMPLERS)))


OTHERS = {
    "zeros": lambda V: torch.zeros(V),
    "normal": lambda V: 3 * torch.randn(V),
    "equal": lambda V: torch.full((V,), -2.7),
    "one near": lambda V: torch.full((V,), -1.3).index_fill(0, torch.tensor(V // 2), 7.2),
    "masked": lambda V: torch.randn(V).masked_fill(torch.arange(V) % 3 == 0, -torch.inf),
    "one alone": lambda V: torch.full((V,), -torch.inf).index_fill(0, torch.tensor(V // 2), 0.3),
}


def rows_of(others, V, device="cpu", dtype=torch.float32, temperature=1.0, softcap=0.0) -> Logits:
    """Return a row for each lead: the target is so many nats of z above the largest of the others, or as far below it
    in the last row."""
    z = torch.stack([OTHERS[others](V) for _ in range(len(LEADS) + 1)])
    targets = (torch.arange(len(z)) * 7919) % V
    targets[0], targets[1] = 0, V - 1
    if softcap:
        z = z.clamp(max=0.2 * softcap / temperature)
    x = z * temperature
    column = targets[:, None]
    largest = z.scatter(1, column, -torch.inf).amax(1).clamp(min=-1e4)
    lead = torch.tensor([*LEADS, -6.0])
    if softcap:  # so far that tanh does not reach 1
        largest = largest.clamp(min=-0.9 * softcap / temperature)
        lead = lead.clamp(max=0.7 * softcap / temperature)
        own = softcap * torch.atanh((largest + lead) * temperature / softcap)
    else:
        own = (largest + lead) * temperature
    x = x.scatter(1, column, own[:, None])
    return Logits(x.to(device, dtype), targets.to(device), temperature, softcap)


def spacing(x: Tensor) -> Tensor:
    """Return the unit of the last place of numbers in float32."""
    return 2.0 ** (x.abs().clamp(min=2.0**-126).log2().floor() - 23)


def z_rounding(z: Tensor, tokens: Tensor) -> Tensor:
    """Return how far log p (N,) of `tokens` can be off where each z of the row is off by a unit of its last place.

    d log p / d z is 1 - p of the token itself, and -p of another column.
    """
    column = tokens[:, None]
    units, p = spacing(z.masked_fill(z.isinf(), 0)), z.softmax(1)
    own = units.gather(1, column) * (1 - 2 * p.gather(1, column))
    return own[:, 0] + (p * units).sum(1)


def ulps(ours: Tensor, truth: Tensor, rounding: Tensor | None = None) -> float:
    """Return the largest distance from a float64 truth in units of the last place of its float32.

    rounding: what the rounding of z (see above) excuses in the log-probability of a token with p below 0.98.
    """
    distance = (ours.double() - truth).abs()
    if rounding is not None:
        distance = torch.where(truth < -0.02, (distance - rounding).clamp(min=0), distance)
    return (distance / spacing(truth)).max().item()


def without_infinities(name: str, logits: Logits) -> Logits:
    """Return logits that `head_of` can make: -inf times 0 is NaN."""
    return logits._replace(x=logits.x.clamp(min=-1e4)) if name.startswith("linear") else logits


def check(name: str, backend: str, others: str, logits: Logits) -> None:
    logits = without_infinities(name, logits)
    result = CALLS[name](op_of(name).backend(backend), logits)
    on_gpu = backend in GPU
    limit = GPU_ULPS if on_gpu else ULPS
    if logits.softcap:
        limit = SOFTCAP_ULPS.get(backend, CPU_SOFTCAP_ULPS)
    if on_gpu and others == "one near":
        limit = max(limit, EQUAL_ULPS)
    truth = logits.logprobs(logits.targets)
    assert (result.logprobs <= 0).all() and result.logprobs.dtype == torch.float32
    assert ulps(result.logprobs, truth) <= limit, "log p"
    if result.grad is None or result.grad.dtype == torch.float16:  # 1e-20 is 0 in float16
        return
    exact, rounding = logits.target_grads(), 0 if result.grad.dtype == torch.float32 else 2**15  # 8 bits
    assert ulps(result.grad.gather(1, logits.targets[:, None])[:, 0], exact) <= limit + rounding, "gradient"
    if not logits.softcap and not rounding:
        row = result.grad.double()
        sums = row.abs().sum(1)
        bound = (1.5e-7 if on_gpu and name != "token_logprobs" else 1e-7) * sums  # a row's sum is in float32 there
        if logits.x.shape[1] > 10000:  # thousands of equal columns round alike: e^z twice, p, the target and the sum
            bound = 2e-7 * sums
        normal = sums > 1e-33  # below, single numbers are denormal
        assert (row.sum(1).abs() <= bound)[normal].all(), "the gradient of a row does not sum to 0"
    p = logits.z().softmax(1).scatter(1, logits.targets[:, None], 0)
    by_logit = torch.cosh(logits.x.double() / logits.softcap) ** -2 if logits.softcap else torch.ones(())
    expected = -p * by_logit / logits.temperature
    grad = result.grad.scatter(1, logits.targets[:, None], 0).double()
    bound = (2e-5 if rounding == 0 else 2**-8) * expected.abs() + 1e-37
    assert ((grad - expected).abs() <= bound).all(), "gradient of the others"


@each_call
@pytest.mark.parametrize("V", [2, 33, 1031])
@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.exhaustive(1, by=("name", "backend"))
def test_a_lead_keeps_its_digits(name, backend, device, others, V):
    check(name, backend, others, rows_of(others, V, device))


@each_call
@pytest.mark.parametrize("temperature, softcap", [(0.7, 0.0), (3.0, 0.0), (0.01, 0.0), (1.0, 30.0), (0.6, 50.0)])
@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.exhaustive(2, by=("name", "backend"))
def test_a_lead_keeps_its_digits_under_temperature_and_softcap(name, backend, device, others, temperature, softcap):
    if name == "linear_cross_entropy" and temperature != 1:
        temperature = 1.0  # it has none
    check(name, backend, others, rows_of(others, 517, device, temperature=temperature, softcap=softcap))


@each_call
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.exhaustive(1, by=("name", "backend"))
def test_a_lead_of_16_bit_numbers_keeps_its_digits(name, backend, device, dtype):
    check(name, backend, "normal", rows_of("normal", 1031, device, dtype))


@each_call
@pytest.mark.parametrize("V", [32000, 151936])
@pytest.mark.parametrize("others", ["zeros", "normal", "equal", "one near"])
@pytest.mark.exhaustive(0, by=("name", "backend"), slow=1)
def test_a_lead_over_a_large_vocabulary_keeps_its_digits(name, backend, device, others, V):
    logits = rows_of(others, V, device)
    keep = [2, 5, 9, 10] if backend in ("triton", "simt") and device == "cpu" else range(len(logits.x))
    check(name, backend, others, logits._replace(x=logits.x[list(keep)], targets=logits.targets[list(keep)]))


FILTERS = ({"top_p": 0.999}, {"top_k": 40}, {"top_k": 300, "top_p": 0.99999}, {"min_p": 1e-30})


def kept_z(logits: Logits, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return z with -inf for tokens that the filters remove, and the rows of which rounding cannot change that."""
    z, order = logits.z().sort(dim=1, descending=True, stable=True)
    is_kept = (torch.arange(z.shape[1], device=z.device) < (top_k or z.shape[1])).expand(z.shape)
    mass = (z - z[:, :1]).exp() * is_kept
    before, total, p = mass.cumsum(1) - mass, mass.sum(1, True), torch.tensor(top_p).double().item()
    is_clear = ((before - p * total).abs() > 1e-6 * total).all(1) if top_p < 1 else torch.ones(len(z)).bool()
    if top_p < 1:
        is_kept = is_kept & (before < p * total)
    is_kept = is_kept & (mass >= min_p)
    return logits.z().masked_fill(~torch.zeros_like(is_kept).scatter(1, order, is_kept), -torch.inf), is_clear


def sample(name: str, backend: str, logits: Logits, **filters) -> tuple[Tensor, ...]:
    keys = torch.arange(len(logits.x), device=logits.x.device)
    run = op_of(name).backend(backend)
    if name == "sample_tokens":
        return run(logits.x, logits.temperature, **filters, row_ids=keys, steps=3)
    hidden, weight = head_of(logits.x)
    options = filters | {"row_ids": keys, "steps": 3, "softcap": logits.softcap}
    return run(hidden, weight.detach(), logits.temperature, **options)


@each_sampler
@pytest.mark.parametrize("temperature", [1.0, 0.625])
@pytest.mark.parametrize("V", [2, 1031, 2500])
@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.exhaustive(1, by=("name", "backend"))
def test_a_sampled_token_has_an_exact_log_probability(name, backend, device, others, V, temperature):
    logits = without_infinities(name, rows_of(others, V, device, temperature=temperature))
    limit = GPU_ULPS if backend in GPU else ULPS
    for filters in ({}, *FILTERS):
        tokens, logprobs, raw_logprobs, kept, log_kept_mass, entropy = sample(name, backend, logits, **filters)
        assert (tokens[4:-1] == logits.targets[4:-1]).sum() >= 4, "a test of no confident token"
        z, x = logits.z(), logits.x.double()
        assert ulps(logprobs, logits.logprobs(tokens), z_rounding(z, tokens)) <= limit
        assert ulps(raw_logprobs, logits.logprobs(tokens, x), z_rounding(x, tokens)) <= limit
        assert (logprobs <= 0).all() and (kept <= 0).all() and (kept >= logprobs).all() and (log_kept_mass <= 0).all()
        if not filters:
            assert torch.equal(kept, logprobs) and (log_kept_mass == 0).all()
        z, is_clear = kept_z(logits, **filters)
        rounding = z_rounding(z, tokens)[is_clear]
        assert ulps(kept[is_clear], logits.logprobs(tokens, z)[is_clear], rounding) <= limit, filters
        truth = logits.z().log_softmax(1)
        exact = -(truth.exp() * truth.masked_fill(truth == -torch.inf, 0)).sum(1)
        assert ((entropy.double() - exact).abs() <= 1e-5 * exact + 1e-12).all()


@each_sampler
@pytest.mark.parametrize("temperature, leader", [(1e-30, 1e10), (1e-30, 1e4), (1e-20, 3e38), (1e-38, 5.0)])
@pytest.mark.parametrize("others", [-1e4, 0.25])
@pytest.mark.exhaustive(2, by=("name", "backend", "device"))
def test_a_lead_beyond_float32_has_no_entropy(name, backend, device, others, temperature, leader):
    """z is infinite in float32 for the first token, relative to the others, and -inf for the others, relative to it."""
    x = torch.full((2, 70), others, device=device)
    x[0, 5] = x[1, 69] = leader
    if name == "sample_tokens":
        x[1, :69] = -torch.inf
    logits = Logits(x, torch.tensor([5, 69], device=device), temperature)
    for filters in ({}, *FILTERS):
        tokens, logprobs, raw_logprobs, *outputs = sample(name, backend, logits, **filters)
        assert torch.equal(tokens, logits.targets) and all((x == 0).all() for x in (logprobs, *outputs)), filters
        assert ulps(raw_logprobs, logits.logprobs(tokens, x.double())) <= (GPU_ULPS if backend in GPU else ULPS)


ON_GPU = [x for x in runs(["token_logprobs"]) if x.values[1] in GPU]


@pytest.mark.parametrize("name, backend, device", ON_GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("V", [3, 1031])
@pytest.mark.exhaustive(2, by=("backend", "device"))
def test_infinite_logits_are_as_in_the_reference(name, backend, device, V, softcap, dtype):
    """A softcap makes them finite. Without one, a row with +inf or with nothing above -inf is NaN, and no other."""
    infinity = torch.inf
    rows = [[infinity, 0, 1], [0, infinity, 1], [-infinity] * 3, [infinity, infinity, 0], [infinity] + [-infinity] * 2]
    rows += [[-infinity, 0, 1], [0, -infinity, -infinity], [0.5, 0, 1]]
    x = torch.full((len(rows), V), -infinity)
    x[:, :3] = torch.tensor(rows)
    x = x.to(device, dtype)
    for target in (0, 1, V - 1):
        targets = torch.full((len(rows),), target, device=device)
        ours, truth = (outputs_and_gradients(each, x, targets, softcap) for each in (backend, "reference"))
        for a, b in zip(ours, truth, strict=True):
            if not softcap:
                b[:5] = torch.nan
            torch.testing.assert_close(a, b, equal_nan=True, atol=1e-6, rtol=2e-5 if a.dtype == torch.float32 else 1e-2)


def outputs_and_gradients(backend: str, x: Tensor, targets: Tensor, softcap: float) -> list[Tensor]:
    """Return log p and entropy of token_logprobs, and the gradient of either."""
    x = x.clone().requires_grad_()
    outputs = ops.token_logprobs.backend(backend)(x, targets, 1.0, softcap)
    grads = [torch.autograd.grad(output.sum(), x, retain_graph=True)[0] for output in outputs]
    return [*(output.detach() for output in outputs), *grads]
