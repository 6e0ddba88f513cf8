"""token_logprobs: bits that do not depend on the batch, signs, extreme logits, errors."""

import math

import pytest
import torch

from rlhf_fast import ops

BACKENDS = [b for b in ops.token_logprobs.backends if ops.token_logprobs.can_run(b, "cpu")]
compiled = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
every = pytest.mark.parametrize("backend", BACKENDS)


def random_inputs(N, V, **kw):
    return torch.randn(N, V, **kw) * 4, torch.randint(V, (N,))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.exhaustive(1, by=("backend",))
def test_a_row_has_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads(backend, dtype):
    logits, targets = random_inputs(33, 2500)
    logits = logits.to(dtype).requires_grad_()
    run = ops.token_logprobs.backend(backend)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = run(logits, targets)
        (gradient,) = torch.autograd.grad(whole[0].sum() + whole[1].sum(), logits)
        torch.set_num_threads(3)
        again = run(logits, targets)
        (gradient_again,) = torch.autograd.grad(again[0].sum() + again[1].sum(), logits)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(gradient, gradient_again)
    for i in (0, 7, 32):
        alone = run(logits[i : i + 1], targets[i : i + 1])
        for a, b, c in zip(alone, whole, again, strict=True):
            assert a[0] == b[i] == c[i]


@every
@pytest.mark.parametrize("offset", [-640.0, -100.0, 0.0, 60.0, 640.0])
def test_log_probabilities_are_never_positive(backend, offset):
    logits, _ = random_inputs(64, 777)
    targets = logits.argmax(-1)
    rows = torch.arange(64)
    logits[rows, targets] += torch.linspace(0, 100, 64)
    logits += offset
    logprobs, entropy = ops.token_logprobs.backend(backend)(logits, targets)
    truth = logits.double().log_softmax(-1)
    assert (logprobs <= 0).all()
    if backend != "reference":
        assert (entropy >= 0).all()
    torch.testing.assert_close(logprobs.double(), truth[rows, targets], atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), -(truth.exp() * truth).sum(-1), atol=5e-6, rtol=2e-6)


@compiled
def test_the_gradient_of_a_likely_token_does_not_cancel_in_bfloat16(backend):
    """The gradient is p - 1 with p = 1 - 2^-12: with p rounded to bfloat16 it would be 0."""
    logits = torch.zeros(1, 3, dtype=torch.bfloat16)
    logits[0, 1] = 9.0
    logits.requires_grad_()
    ops.token_logprobs.backend(backend)(logits, torch.tensor([1]))[0].sum().backward()
    exact = 1 - logits.detach().double().softmax(-1)[0, 1]
    assert exact > 0
    assert abs(logits.grad[0, 1].double() / exact - 1) < 2**-8


@every
def test_logits_of_minus_infinity(backend):
    logits, targets = random_inputs(5, 3000)
    logits[:, 100:2900] = -torch.inf
    targets %= 100
    logits[4, :2000] = -torch.inf
    targets[4] = 5  # a token of logit -inf
    logits.requires_grad_()
    logprobs, entropy = ops.token_logprobs.backend(backend)(logits, targets)
    truth = logits.detach().double().log_softmax(-1)
    finite = truth.masked_fill(truth == -torch.inf, 0)
    torch.testing.assert_close(entropy.double(), -(truth.exp() * finite).sum(-1), atol=2e-6, rtol=1e-6)
    assert logprobs[4] == -torch.inf and logprobs[:4].isfinite().all()
    (logprobs[:4].sum() + entropy.sum()).backward()
    assert (logits.grad[:4, 100:2900] == 0).all() and logits.grad.isfinite().all()


@every
@pytest.mark.parametrize("where", [0, 1500, 2999])
def test_nan_propagates(backend, where):
    logits, targets = random_inputs(2, 3000)
    logits[0, where] = torch.nan
    logits[1] = -torch.inf
    logprobs, entropy = ops.token_logprobs.backend(backend)(logits, targets)
    assert logprobs.isnan().all() and entropy.isnan().all()


INFINITE = [[math.inf, 0.0, 1.0], [0.5, -math.inf, math.inf], [-math.inf] * 3, [math.inf] * 3, [math.inf, -math.inf, 0]]


@every
@pytest.mark.parametrize("row", INFINITE, ids=str)
def test_a_row_without_a_distribution_is_nan(backend, row):
    """A row with +inf, or with nothing above -inf; alone and beside 40 tokens more."""
    for more in (0, 40):
        fill = 0.0 if math.inf in row else -math.inf
        logits = torch.tensor([[*row, *[fill] * more]] * len(row), requires_grad=True)
        targets = torch.arange(len(row))
        outputs = ops.token_logprobs.backend(backend)(logits, targets)
        assert outputs[0].isnan().all() and outputs[1].isnan().all()
        for output in outputs:
            assert torch.autograd.grad(output.sum(), logits, retain_graph=True)[0].isnan().all()


@every
@pytest.mark.parametrize("softcap", [30.0, 0.3, 50.0, 7.0])
@pytest.mark.parametrize("row", [*INFINITE, [-math.inf, 3.0, 0.0], [-3.4e38, 3.4e38, 0.0]], ids=str)
@pytest.mark.exhaustive(1, by=("backend", "row"))
def test_a_softcap_makes_infinite_logits_finite(backend, row, softcap):
    logits = torch.tensor([[*row, *torch.randn(50)]] * len(row), requires_grad=True)
    targets = torch.arange(len(row))
    outputs = ops.token_logprobs.backend(backend)(logits, targets, 0.7, softcap)
    x = logits.detach().double().requires_grad_()
    truth = (softcap * torch.tanh(x / softcap) / 0.7).log_softmax(-1)
    exact = truth[targets, targets], -(truth.exp() * truth).sum(-1)
    for ours, expected in zip(outputs, exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=5e-6, rtol=1e-5)
        grad, expected = (
            torch.autograd.grad(y.sum(), v, retain_graph=True)[0].double() for y, v in ((ours, logits), (expected, x))
        )
        torch.testing.assert_close(grad, expected, atol=5e-6, rtol=1e-4)


@every
def test_one_output_alone_has_a_gradient(backend):
    logits, targets = random_inputs(3, 50)
    for i in (0, 1):
        ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
        (ops.token_logprobs.backend(backend)(ours, targets)[i] * torch.arange(3)).sum().backward()
        (ops.token_logprobs.reference(truth, targets, 1.0, 0.0)[i] * torch.arange(3)).sum().backward()
        torch.testing.assert_close(ours.grad.double(), truth.grad, atol=2e-6, rtol=1e-5)
        assert truth.grad.abs().max() > 1e-3


@every
@pytest.mark.parametrize(
    "mean, sd, temperature", [(0, 20, 0.7), (300, 3, 0.7), (-2000, 5, 0.3), (50, 8, 1.9), (7e3, 3, 0.05)]
)
def test_gradients_at_a_temperature_are_as_exact_as_plain_torchs(backend, mean, sd, temperature):
    """A kernel that computes z in its backward pass otherwise than in its forward pass has other probabilities."""
    logits, targets = sd * torch.randn(8, 700) + mean, torch.randint(700, (8,))

    def gradient(run, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(run(x).sum(), x)[0].double()

    def plain(x):
        return (x / temperature).log_softmax(-1).gather(-1, targets[:, None])

    truth = gradient(plain, logits.double())
    ours = gradient(lambda x: ops.token_logprobs.backend(backend)(x, targets, temperature)[0], logits)
    bound = 2 * (gradient(plain, logits) - truth).norm() + 2e-7 * truth.norm()
    assert (ours - truth).norm() <= bound


@every
@pytest.mark.parametrize("temperature", [1e-12, 1e-30])
def test_a_tiny_temperature_gives_certain_tokens_no_gradient(backend, temperature):
    logits = torch.tensor([[0.3, 0.7, -1.0], [5.0, 5.0, 2.0]], requires_grad=True)
    logprobs, entropy = ops.token_logprobs.backend(backend)(logits, torch.tensor([1, 1]), temperature)
    torch.testing.assert_close(logprobs, torch.tensor([0.0, -math.log(2)]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(2)]))
    (gradient,) = torch.autograd.grad(logprobs[0], logits)
    assert (gradient == 0).all()


@every
@pytest.mark.parametrize("softcap", [5.0, 30.0])
@pytest.mark.parametrize("temperature", [1e-8, 1e-9, 1e-10, 1e-12, 1e-20])
def test_a_tiny_temperature_under_a_softcap(backend, temperature, softcap):
    """A float32 tanh is many temperatures off, but by the same in the two largest, and the third has no share."""
    logits = torch.tensor([[9.0, 9.0, 3.0], [9.0, 3.0, 3.0]], requires_grad=True)
    logprobs, entropy = ops.token_logprobs.backend(backend)(logits, torch.tensor([0, 0]), temperature, softcap)
    torch.testing.assert_close(logprobs, torch.tensor([-math.log(2), 0.0]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2), 0.0]))
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    assert gradient.isfinite().all() and gradient[0, 0] > 0 and (gradient[1] == 0).all()


@every
def test_leading_shapes_and_views(backend):
    base, targets = torch.randn(4, 6, 5, 40), torch.randint(40, (5, 4, 2))
    view = base.permute(2, 0, 1, 3)[:, :, ::3]
    logprobs, _ = ops.token_logprobs.backend(backend)(view, targets)
    expected = view.double().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    torch.testing.assert_close(logprobs.double(), expected, atol=2e-6, rtol=1e-6)


@every
def test_gradients_pass_gradcheck_in_float64(backend):
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([2, -100, 6])
    run = ops.token_logprobs.backend("reference" if backend == "reference" else backend)
    assert torch.autograd.gradcheck(lambda x: run(x, targets, 0.7, 3.0), logits)


@every
def test_errors_name_the_value(backend):
    logits, targets = random_inputs(3, 10)
    run = ops.token_logprobs.backend(backend)
    with pytest.raises(ValueError, match=r"token_logprobs: targets must be in \[0, 10\) or -100 .*, got 10 at 1"):
        run(logits, torch.tensor([1, 10, 2]))
    with pytest.raises(ValueError, match="got -1 at 0"):
        run(logits, torch.tensor([-1, 10, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"logits must be \(..., V\) and targets \(...\).*\[3, 10\] and \[2\]"):
        run(logits, targets[:2])
    with pytest.raises(ValueError, match=r"temperature must be positive and finite, got 0\.0"):
        run(logits, targets, 0.0)
    with pytest.raises(ValueError, match="targets must be int64 or int32, got float32"):
        run(logits, targets.float())


@compiled
def test_addresses_beyond_two_to_the_thirty_one(backend):
    """Rows are 2^29 floats apart, so the fifth starts beyond element 2^31. Between rows no memory is allocated but the
    rest of each row's last 32 bytes."""
    if not hasattr(torch.UntypedStorage, "from_file"):
        pytest.skip("needs memory mapping")
    import tempfile

    N, V, stride = 5, 64, 2**29 + 8
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(4 * N * stride)
        storage = torch.UntypedStorage.from_file(file.name, shared=True, nbytes=4 * N * stride)
        logits = torch.empty(0).set_(storage, 0, (N, V), (stride, 1))
        logits.copy_(torch.randn(N, V))
        targets = torch.randint(V, (N,))
        far, near = (ops.token_logprobs.backend(backend)(x, targets) for x in (logits, logits.contiguous()))
        assert torch.equal(far[0], near[0]) and torch.equal(far[1], near[1])


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's kernels cannot be forced on the CPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.exhaustive(1)
def test_bits_do_not_depend_on_the_number_of_rows_or_programs(dtype, monkeypatch):
    """The segments of a row are read by one program or by one each; rows start at any address."""
    from rlhf_fast.kernels.triton import _logits, _softmax

    monkeypatch.setattr(_softmax, "SEGMENT", 1)
    logits, targets = random_inputs(7, 9001)
    logits, targets = logits.to(dtype), targets.masked_fill(torch.arange(7) == 3, -100)
    logits[5, 100:8600] = -torch.inf
    run = ops.token_logprobs.backend("triton")

    def results(rows_per_sm):
        monkeypatch.setattr(_logits, "ROWS_PER_SM", rows_per_sm)
        x = logits.clone().requires_grad_()
        outputs = run(x, targets, 0.7, 30.0)
        return *outputs, torch.autograd.grad(2 * outputs[0].sum() - outputs[1].sum(), x)[0]

    split, whole = results(100), results(1)
    for a, b in zip(split, whole, strict=True):
        assert torch.equal(a, b) and a.abs().max() > 0
    monkeypatch.setattr(_logits, "ROWS_PER_SM", 100)
    alone = run(logits[2:3], targets[2:3], 0.7, 30.0)
    assert alone[0] == whole[0][2] and alone[1] == whole[1][2]


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's kernels cannot be forced on the CPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 5, 21, 1203])
@pytest.mark.exhaustive(3)
def test_rows_may_start_at_any_address(V, dtype):
    """The logits are columns of a larger tensor, so that their rows start at other offsets than the gradient's."""
    larger = torch.randn(6, V + 11).to(dtype)
    targets = torch.randint(V, (6,))
    run = ops.token_logprobs.backend("triton")
    for first in (0, 1, 6):
        view = larger[:, first : first + V].detach().requires_grad_()
        plain = view.detach().clone().requires_grad_()
        ours, truth = run(view, targets), ops.token_logprobs.backend("reference")(plain, targets)
        grads = [torch.autograd.grad(a[0].sum() + 2 * a[1].sum(), x)[0] for a, x in ((ours, view), (truth, plain))]
        for a, b in zip((*ours, grads[0]), (*truth, grads[1]), strict=True):
            torch.testing.assert_close(a, b, atol=4e-6 if a.dtype == torch.float32 else 1e-2, rtol=1e-5)
