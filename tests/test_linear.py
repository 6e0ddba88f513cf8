"""The linear head's ops beyond their references: orders of products, frozen inputs, repeated backward, errors."""

import pytest
import torch
import toy
from transformers import AutoModelForCausalLM

from rlhf_fast import ops
from rlhf_fast.kernels import _cpu_head as cpu_head
from rlhf_fast.kernels._backends import COMPILED

BACKENDS = [b for b in ops.linear_logprobs.backends if ops.linear_logprobs.can_run(b, "cpu")]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
CPU_KERNELS = [b for b in BACKENDS if b in COMPILED and b != "simt"]
compiled = pytest.mark.parametrize("backend", CPU_KERNELS[-1:])
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's kernels cannot be forced on the CPU here")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def random_head(N, D, V, dtype=torch.float32, ignored=0.3):
    hidden = (2 * torch.randn(N, D)).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) / D**0.5).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,)).masked_fill(torch.rand(N) < ignored, -100)
    return hidden, weight, targets


def to_float64(*tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in tensors]


def random_ppo_rows(N):
    return -5 * torch.rand(N), torch.randn(N), torch.rand(N) / N


@compiled
@DTYPES
@pytest.mark.parametrize("bytes_3_gemm, bytes_4_gemm", [(1, 1), (1 << 16, 1 << 14), (1 << 30, 1 << 30)])
def test_orders_and_sizes_of_blocks(backend, dtype, bytes_3_gemm, bytes_4_gemm, monkeypatch):
    """With chunks of one row, of some rows and of all, results differ from the exact ones by float32 rounding only."""
    hidden, weight, targets = random_head(37, 31, 5003, dtype)
    weights = torch.rand(37)
    monkeypatch.setattr(cpu_head, "MIN_BF16_WEIGHT", 1 << 40)  # test_linear_half.py has products in bfloat16
    monkeypatch.setattr(cpu_head, "LOGITS_BYTES_3_GEMM", bytes_3_gemm)
    monkeypatch.setattr(cpu_head, "LOGITS_BYTES_4_GEMM", bytes_4_gemm)
    loss, logprobs = ops.linear_cross_entropy.backend(backend)(hidden, weight, targets, weights)
    loss.backward()
    float64_inputs = to_float64(hidden, weight)
    truth, true_logprobs = ops.linear_cross_entropy.reference(*float64_inputs, targets, weights.double())
    truth.backward()
    torch.testing.assert_close(logprobs.double(), true_logprobs, atol=4e-6, rtol=1e-6)
    for ours, exact in zip((hidden, weight), float64_inputs, strict=True):
        bound = 4e-6 if dtype == torch.float32 else 2**-8 * exact.grad.abs() + 1e-6
        assert ((ours.grad.double() - exact.grad).abs() <= bound).all()


def norm_of_error(x, truth):
    return ((x.double() - truth).norm() / truth.norm()).item()


@each_backend
def test_long_sums_are_as_near_the_truth_as_plain_torchs(backend):
    """The gradient of hidden sums over the vocabulary, the one of weight over the rows, a product over the width."""
    if backend in ("simt", "triton"):
        pytest.skip("a simulator would take minutes")
    hidden, weight, targets = random_head(48, 64, 30011, ignored=0)
    exact = to_float64(hidden, weight)
    ops.linear_cross_entropy.reference(*exact, targets)[0].backward()
    plain = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    torch.nn.functional.cross_entropy(plain[0] @ plain[1].T, targets).backward()
    ops.linear_cross_entropy.backend(backend)(hidden, weight, targets)[0].backward()
    for ours, theirs, truth in zip((hidden, weight), plain, exact, strict=True):
        assert norm_of_error(ours.grad, truth.grad) <= 1.5 * norm_of_error(theirs.grad, truth.grad)

    for rows in (1, 48):
        x, w = torch.randn(rows, 30011), torch.randn(40, 30011)
        truth = x.double() @ w.double().T
        ours = ops.linear.backend(backend)(x, w)
        assert norm_of_error(ours, truth) <= 1.5 * norm_of_error(x @ w.T, truth)


@compiled
def test_bits_do_not_depend_on_the_vocabulary_block_or_the_op(backend, monkeypatch):
    hidden, weight, targets = random_head(64, 40, 9001)
    old, advantages, weights = random_ppo_rows(64)

    def every_op():
        scored = ops.linear_logprobs.backend(backend)(hidden.detach(), weight.detach(), targets)
        trained = ops.linear_logprobs.backend(backend)(hidden, weight, targets)
        _, *ppo, _ = ops.linear_ppo_loss.backend(backend)(hidden, weight, targets, old, advantages, weights)
        _, *without_grad, _ = ops.linear_ppo_loss.backend(backend)(
            hidden.detach(), weight.detach(), targets, old, advantages, weights
        )
        _, logprobs = ops.linear_cross_entropy.backend(backend)(hidden, weight, targets)
        return [scored[:2], trained[:2], ppo, without_grad], logprobs, (*scored[2:], *trained[2:])

    results, logprobs, rest = every_op()
    for width, tiles in {"VOCAB_TILES": 2, "KEPT_TILES": 3}.items():
        monkeypatch.setattr(cpu_head, width, tiles)
    others, again, rest_again = every_op()
    assert all(torch.equal(x, rest[i % 2]) for i, x in enumerate((*rest, *rest_again)))  # log_z and top1
    for logp, entropy in results + others:
        assert torch.equal(logp, logprobs) and torch.equal(logp, again)
        assert torch.equal(entropy, results[0][1])


@each_backend
def test_the_first_ratio_is_one(backend):
    hidden, weight, targets = random_head(50, 24, 3001)
    old, *_ = ops.linear_logprobs.backend(backend)(hidden.detach(), weight.detach(), targets, temperature=0.7)
    _, advantages, weights = random_ppo_rows(50)
    outputs = ops.linear_ppo_loss.backend(backend)(hidden, weight, targets, old, advantages, weights, temperature=0.7)
    stats = dict(zip(ops.linear_ppo_loss.stats, outputs[3].tolist(), strict=True))
    assert stats["ratio_max"] == stats["ratio_min"] == 1
    assert stats["kl_k1"] == stats["kl_k3"] == stats["clipped_low"] == stats["clipped_high"] == 0


@each_backend
def test_losses_of_parts_add_up(backend):
    hidden, weight, targets = random_head(41, 16, 301)
    old, advantages, weights = random_ppo_rows(41)

    def run(rows):
        loss, _, _, stats = ops.linear_ppo_loss.backend(backend)(
            hidden[rows], weight, targets[rows], old[rows], advantages[rows], weights[rows], old[rows] - 0.1,
            kl_coef=0.2, entropy_coef=0.1,
        )  # fmt: skip
        return loss, stats

    whole, stats = run(slice(None))
    assert whole.abs() > 1e-3
    truth = torch.autograd.grad(whole, (hidden, weight))
    parts = [run(slice(a, b)) for a, b in ((0, 1), (1, 20), (20, 41))]
    torch.testing.assert_close(sum(p[0] for p in parts), whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sum(p[1][:-2] for p in parts), stats[:-2], atol=1e-5, rtol=1e-5)
    for part in parts:
        part[0].backward()
    torch.testing.assert_close(hidden.grad, truth[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(weight.grad, truth[1], atol=1e-6, rtol=1e-4)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_number_is_the_weight_of_every_row(backend, dtype):
    """Also a tensor of no dimension. Rows without a target have none."""
    hidden, weight, targets = random_head(30, 12, 65)
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    old, advantages, _ = random_ppo_rows(30)
    found = []
    for weights in (torch.full((30,), 0.25), 0.25, torch.tensor(0.25)):
        loss, _, _, stats = ops.linear_ppo_loss.backend(backend)(hidden, weight, targets, old, advantages, weights)
        found.append((loss.detach(), stats, *torch.autograd.grad(loss, (hidden, weight))))
    assert found[0][1][0] == 0.25 * (targets != -100).sum() and (targets == -100).any()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


LOSSES = ("cross_entropy", "ppo", "logprobs", "entropy", "kl")


def loss_of(name, backend, hidden, weight, targets):
    rows, zeros = random_ppo_rows(len(targets)), torch.zeros_like(hidden.detach())
    if name == "cross_entropy":
        return ops.linear_cross_entropy.backend(backend)(hidden, weight, targets)[0]
    if name == "ppo":
        return ops.linear_ppo_loss.backend(backend)(hidden, weight, targets, *rows)[0]
    if name == "kl":
        return ops.linear_kl.backend(backend)(hidden, weight, zeros, weight, targets)[3].sum()
    return ops.linear_logprobs.backend(backend)(hidden, weight, targets)[LOSSES.index(name) - 2].sum()


@each_backend
def test_all_ignored_is_zero_and_still_connected(backend):
    hidden, weight, _ = random_head(6, 8, 50)
    with torch.no_grad():
        hidden.fill_(torch.nan)
    for name in LOSSES:
        loss = loss_of(name, backend, hidden, weight, torch.full((6,), -100))
        assert loss == 0
        hidden.grad = weight.grad = None
        loss.backward()
        assert (hidden.grad == 0).all() and (weight.grad == 0).all()


@each_backend
def test_a_frozen_input_does_not_change_the_other_gradient(backend):
    hidden, weight, targets = random_head(20, 12, 400)
    for name in LOSSES:
        torch.manual_seed(7)
        full = torch.autograd.grad(loss_of(name, backend, hidden, weight, targets), (hidden, weight))
        for i in (0, 1):
            inputs = [x.detach().requires_grad_(i == j) for j, x in enumerate((hidden, weight))]
            torch.manual_seed(7)
            loss_of(name, backend, *inputs, targets).backward()
            assert inputs[1 - i].grad is None
            assert torch.equal(inputs[i].grad, full[i])


@each_backend
@DTYPES
@pytest.mark.exhaustive(1, by=("backend",))
def test_backward_twice_and_scaled(backend, dtype):
    hidden, weight, targets = random_head(20, 12, 400, dtype)
    for name in LOSSES:
        loss = loss_of(name, backend, hidden, weight, targets)
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        double = torch.autograd.grad((2 * loss).square() / (4 * loss.detach()), (hidden, weight))
        for a, b, c in zip(first, second, double, strict=True):
            assert a.abs().max() > 0 and torch.equal(a, b)
            torch.testing.assert_close(2 * a, c, atol=1e-5, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@each_backend
def test_tied_embeddings_add_up(backend):
    _, weight, targets = random_head(30, 12, 100)
    tokens = torch.randint(100, (30,))

    def gradient(w, run):
        return torch.autograd.grad(run(torch.nn.functional.embedding(tokens, w), w), w)[0]

    ours = gradient(weight, lambda x, w: ops.linear_cross_entropy.backend(backend)(x, w, targets)[0])
    truth = gradient(*to_float64(weight), lambda x, w: torch.nn.functional.cross_entropy(x @ w.T, targets))
    torch.testing.assert_close(ours.double(), truth, atol=1e-6, rtol=1e-5)


@each_backend
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_mixed_dtypes_and_autocast(backend, dtypes):
    hidden, weight, targets = random_head(20, 12, 400)
    hidden, weight = (x.detach().to(d).requires_grad_() for x, d in zip((hidden, weight), dtypes, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, logprobs = ops.linear_cross_entropy.backend(backend)(hidden, weight, targets)
    loss.backward()
    float64_inputs = to_float64(hidden, weight)
    truth = torch.nn.functional.cross_entropy(float64_inputs[0] @ float64_inputs[1].T, targets)
    truth.backward()
    assert logprobs.dtype == torch.float32 and abs(loss - truth) < 1e-5
    for x, exact in zip((hidden, weight), float64_inputs, strict=True):
        assert x.grad.dtype == x.dtype
        assert ((x.grad.double() - exact.grad).abs() <= 2**-8 * exact.grad.abs() + 1e-6).all()


@each_backend
@pytest.mark.parametrize("offset", [-100.0, -35.0, 60.0])
def test_logits_with_a_large_common_part(backend, offset):
    """GPT-2's logits are so. Log-probabilities of bfloat16 logits would be off by 0.1."""
    hidden, weight, targets = (x.detach() for x in random_head(40, 65, 5003, ignored=0))
    hidden[:20] += 3 * weight[targets[:20]] * 65**0.5  # confident
    hidden[:, 0], weight[:, 0] = 10.0, offset / 10
    truth = (hidden.double() @ weight.double().T).log_softmax(-1)
    logprobs, entropy, log_z, top1 = ops.linear_logprobs.backend(backend)(hidden, weight, targets)
    assert (logprobs <= 0).all()
    torch.testing.assert_close(logprobs.double(), truth.gather(1, targets[:, None])[:, 0], atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), -(truth.exp() * truth).sum(-1), atol=1e-3, rtol=1e-6)
    logits = hidden.double() @ weight.double().T
    torch.testing.assert_close(log_z.double(), logits.logsumexp(-1), atol=1e-5, rtol=1e-6)
    assert torch.equal(top1, logits.argmax(-1) == targets) and 20 <= top1.sum() < 40


@each_backend
@pytest.mark.parametrize("softcap", [0.0, 250.0])
def test_log_z_of_targets_far_ahead_and_far_behind(backend, softcap):
    """log p of the first target rounds to 0, and p of the second is 0; of the third row another token ties."""
    x = torch.tensor([[200.0, -3.0, 1.0], [-1e30, 2.0, 1.0], [0.1, 0.2, 0.2]])
    targets = torch.tensor([0, 0, 2])
    run = ops.linear_logprobs.backend(backend)

    def cap(x):
        return softcap * (x / softcap).tanh() if softcap else x

    weight = x.T.contiguous().requires_grad_()
    logprobs, _, log_z, top1 = run(torch.eye(3), weight, targets, None, 0.5, softcap)
    z = cap(weight.detach().T.double().requires_grad_()) / 0.5
    torch.testing.assert_close(log_z.double(), z.logsumexp(-1), rtol=1e-7, atol=1e-7)
    assert logprobs[0] > -1e-30 and logprobs[1] < -100 and top1.tolist() == [True, False, True]
    exact = weight.detach().double().requires_grad_()
    (cap(exact.T) / 0.5).logsumexp(-1).sum().backward()
    torch.testing.assert_close(torch.autograd.grad(log_z.sum(), weight)[0].double(), exact.grad, rtol=1e-6, atol=1e-6)

    bias = torch.tensor([-torch.inf, 2.0, 1.0])
    _, _, log_z, top1 = run(torch.zeros(1, 4), torch.ones(3, 4), torch.tensor([1]), bias, 0.5, 0.0)
    torch.testing.assert_close(log_z, (bias[None] / 0.5).logsumexp(-1))
    _, _, log_z, top1 = run(torch.ones(2, 4), torch.ones(1, 4), torch.tensor([0, 0]), None, 0.5, softcap)
    torch.testing.assert_close(log_z.double(), cap(torch.full((2,), 4.0).double()) / 0.5, rtol=1e-7, atol=0)
    assert top1.all()


@each_backend
def test_one_weight_for_all_rows_and_a_temperature(backend):
    hidden, weight, targets = random_head(23, 8, 131)
    run = ops.linear_cross_entropy.backend(backend)
    rows = torch.full((23,), 0.3)
    expected = run(hidden, weight, targets, rows, temperature=0.7)
    logprobs = ops.linear_logprobs.reference(*to_float64(hidden, weight), targets, None, 0.7, 0.0)[0]
    torch.testing.assert_close(expected[0].double(), -0.3 * logprobs.sum(), rtol=1e-5, atol=1e-5)
    truth = torch.autograd.grad(expected[0], (hidden, weight))
    for number in (0.3, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)):
        found = run(hidden, weight, targets, number, temperature=0.7)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        grads = torch.autograd.grad(found[0], (hidden, weight))
        assert all(torch.equal(a, b) for a, b in zip(grads, truth, strict=True))
    with pytest.raises(ValueError, match="weights must have the shape of targets"):
        run(hidden, weight, targets, rows[:1])


@each_backend
def test_exact_kl(backend):
    hidden, weight, targets = random_head(20, 12, 400)
    own = ops.linear_kl.backend(backend)(hidden, weight, hidden.detach(), weight.detach(), targets)
    assert torch.equal(own[0], own[1]) and own[3].abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(own[3].sum(), hidden, retain_graph=True)
    assert gradient.abs().max() < 1e-6
    bias = torch.zeros(400)
    bias[3] = -torch.inf
    run = ops.linear_kl.backend(backend)
    without_3 = run(hidden, weight, hidden, weight, targets, bias=bias)[3]
    with_3 = run(hidden, weight, hidden, weight, targets, ref_bias=bias)[3]
    valid = targets != -100
    p = (hidden.detach().double() @ weight.detach().double().T).softmax(1)[:, 3]
    torch.testing.assert_close(without_3[valid].double(), -torch.log1p(-p)[valid], rtol=1e-5, atol=2e-6)
    assert without_3.isfinite().all() and (without_3[valid] > 0).all()
    assert (with_3[valid] == torch.inf).all() and (with_3[~valid] == 0).all()


@each_backend
@pytest.mark.parametrize("distance", [60.0, 95.0, 180.0, 700.0])
@pytest.mark.parametrize("temperature, softcap", [(1.0, 0.0), (0.5, 0.0), (0.1, 90.0)])
@pytest.mark.exhaustive(30)
def test_the_gradient_of_a_kl_to_a_far_reference(backend, distance, temperature, softcap):
    """The reference's log-probabilities are below -87, where exp underflows, and count in full.

    The gradient of the KL is p (log p - log p_ref - KL) / temperature: where one far token has nearly all of p, the
    difference of two float32 numbers of the KL's size. Triton's tanh is right to a few units in the last place, the
    CPU's and torch's to one: logits are up to 1800 nats apart here, and 4 units of that are 4e-4 nats of log p_ref."""
    x, ref_x = torch.randn(5, 40), torch.randn(5, 40)
    ref_x[:, 3:30:4] -= distance
    ref_x[0, 0] += distance  # the target: its log p is 0 in float32 at the larger distances
    targets = torch.tensor([0, 3, 7, 39, 3])

    def gradients(run, dtype):
        weight = x.T.to(dtype).contiguous().requires_grad_()
        eye, ref_weight = torch.eye(5, dtype=dtype), ref_x.T.to(dtype).contiguous()
        logprobs, _, entropy, kl = run(eye, weight, eye, ref_weight, targets, temperature, softcap)
        outputs = kl, entropy, logprobs
        return kl, [torch.autograd.grad(y.sum(), weight, retain_graph=True)[0].double() for y in outputs]

    kl, truth = gradients(ops.linear_kl.backend("reference"), torch.float64)
    z = softcap * torch.tanh(x.double().T / softcap) if softcap else x.double().T
    p_by_z = (z / temperature).softmax(0) / temperature
    of_tanh = 4 * 2**-23 * softcap / temperature * p_by_z if backend == "triton" else torch.zeros(())
    _, grads = gradients(ops.linear_kl.backend(backend), torch.float32)
    for i, (ours, exact) in enumerate(zip(grads, truth, strict=True)):
        rounding = of_tanh + (p_by_z * kl * 2**-21 if i == 0 else 0)
        assert ((ours - exact).abs() <= 2e-5 * exact.abs() + 2e-6 * exact.abs().max() + rounding).all()


@each_backend
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("banned", [[5], [0, 32], list(range(1, 33))], ids=["one", "two", "all but one"])
@pytest.mark.exhaustive(15)
def test_an_unused_infinite_kl_leaves_the_other_gradients_alone(backend, softcap, banned):
    """The reference gives some tokens probability 0: one, two, or all but token 0."""
    hidden, weight, _ = random_head(6, 8, 33, ignored=0)
    targets = torch.tensor([0, 5, 32, 7, 1, 20])
    ref_bias = torch.randn(33).index_fill(0, torch.tensor(banned), -torch.inf)
    ref = torch.randn(6, 8), torch.randn(33, 8)
    outputs = ops.linear_kl.backend(backend)(
        hidden, weight, *ref, targets, softcap=softcap, bias=torch.zeros(33), ref_bias=ref_bias
    )
    assert softcap or (outputs[3] == torch.inf).all()
    float64_inputs = to_float64(hidden, weight)
    exact = ops.linear_logprobs.reference(*float64_inputs, targets, None, 1.0, softcap)
    for ours, truth in ((outputs[0], exact[0]), (outputs[2], exact[1])):
        grads = torch.autograd.grad(ours.sum(), (hidden, weight), retain_graph=True)
        true_grads = torch.autograd.grad(truth.sum(), float64_inputs, retain_graph=True)
        for grad, true_grad in zip(grads, true_grads, strict=True):
            torch.testing.assert_close(grad.double(), true_grad, atol=1e-5, rtol=1e-4)


@each_backend
def test_infinite_logits_give_nan_in_their_row(backend):
    """By the bias, as hidden times an infinite weight may be NaN by itself."""
    hidden, weight = torch.zeros(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    for row in ([torch.inf, 0.0, 1.0], [-torch.inf] * 3, [-torch.inf, torch.inf, 2.0]):
        bias = torch.tensor(row, requires_grad=True)
        targets = torch.arange(3)
        outputs = ops.linear_logprobs.backend(backend)(hidden, weight, targets, bias)
        assert all(x.isnan().all() for x in outputs[:3]) and not outputs[3].any()
        loss, _ = ops.linear_cross_entropy.backend(backend)(hidden, weight, targets, torch.ones(3), bias)
        kl = ops.linear_kl.backend(backend)(hidden, weight, hidden, weight, targets, bias=bias, ref_bias=bias)
        for output in (*outputs[:3], loss, kl[0], kl[2], kl[3]):
            assert output.isnan().all()
            assert torch.autograd.grad(output.sum(), bias, retain_graph=True)[0].isnan().all()


@each_backend
def test_gradcheck_in_float64(backend):
    hidden, weight, _ = to_float64(*random_head(4, 3, 7))
    targets, bias = torch.tensor([2, -100, 6, 0], dtype=torch.int32), torch.randn(7).double().requires_grad_()
    old, advantages, weights = (x.double() for x in random_ppo_rows(4))
    ref = torch.randn(4, 5).double(), torch.randn(7, 5).double()
    checks = [
        lambda x, w, b: ops.linear_logprobs.backend(backend)(x, w, targets, b, 0.7, 3.0)[:3],
        lambda x, w, b: ops.linear_kl.backend(backend)(x, w, *ref, targets, 0.7, 3.0, b)[2:],
        lambda x, w, b: ops.linear_cross_entropy.backend(backend)(x, w, targets, None, b, 3.0, 0.7)[0],
        lambda x, w, b: ops.linear_ppo_loss.backend(backend)(
            x, w, targets, old, advantages, weights, old - 1, 0.9, 5.0, 0.0, 0.5, "k3", 0.3, 0.7, 3.0, b
        )[0],
    ]
    for check in checks:
        assert torch.autograd.gradcheck(check, (hidden, weight, bias))


@pytest.mark.skipif(not CPU_KERNELS, reason="rlhf_fast._cpu is not built")
def test_compiles_with_its_gradient():
    hidden, weight, targets = random_head(20, 12, 400)

    def loss(hidden, weight):
        logprobs, entropy, log_z, top1 = ops.linear_logprobs(hidden, weight, targets)
        weights = 0.1 + top1
        loss = ops.linear_cross_entropy(hidden, weight, targets)[0]
        loss = 3 * loss + ops.linear_cross_entropy(hidden, weight, targets, 0.3, temperature=0.7)[0]
        return loss + (logprobs * weights).sum() + 0.5 * entropy.sum() + 0.1 * log_z.sum()

    torch._dynamo.reset()
    eager = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(eager, torch.autograd.grad(graph(hidden, weight), (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@each_backend
def test_errors_say_what_came(backend):
    hidden, weight, targets = random_head(6, 8, 50, ignored=0)
    run = ops.linear_logprobs.backend(backend)
    wrong = targets.clone()
    wrong[4] = 50
    calls = {
        r"linear_logprobs: targets must be in \[0, 50\) or -100 \(ignored\), got 50 at 4": lambda: run(
            hidden, weight, wrong
        ),
        r"linear_logprobs: hidden \(..., D\) and weight \(V, D\) must share D.*\[6, 8\] and \[50, 7\]": lambda: run(
            hidden, weight[:, 1:], targets
        ),
        r"linear_logprobs: targets must have hidden's shape": lambda: run(hidden, weight, targets[:3]),
        r"linear_logprobs: bias must have shape \(50,\), got \[49\]": lambda: run(
            hidden, weight, targets, torch.zeros(49)
        ),
        r"float64 only together, got float64, float32": lambda: run(hidden.double(), weight, targets),
        r"linear_ppo_loss: kl_coef=0.1 needs ref_logprobs": lambda: ops.linear_ppo_loss(
            hidden, weight, targets, *random_ppo_rows(6), kl_coef=0.1
        ),
        r"kl_estimator must be one of k1, k2, k3, got 'k4'": lambda: ops.linear_ppo_loss(
            hidden, weight, targets, *random_ppo_rows(6), kl_estimator="k4"
        ),
        r"advantages must have the shape of targets \[6\], got \[5\]": lambda: ops.linear_ppo_loss(
            hidden, weight, targets, torch.zeros(6), torch.zeros(5), torch.zeros(6)
        ),
        r"linear_kl: weight and ref_weight must have one vocabulary, got 50 and 49 rows": lambda: ops.linear_kl(
            hidden, weight, hidden, weight[:49], targets
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_shifted_labels_give_a_models_own_loss(kind, tmp_path):
    """The ops shift nothing: row t predicts targets[t]. Unshifted labels give another loss."""
    net = AutoModelForCausalLM.from_pretrained(toy.model(tmp_path, kind))
    labels = torch.randint(3, net.config.vocab_size, (3, 9))
    out = net(labels, labels=labels.index_fill(1, torch.tensor([0, 4]), -100), output_hidden_states=True)
    labels = labels.index_fill(1, torch.tensor([0, 4]), -100)
    hidden, weight = out.hidden_states[-1], net.get_output_embeddings().weight
    inputs, targets = hidden[:, :-1], labels[:, 1:]
    loss, rows = ops.linear_cross_entropy(inputs, weight, targets)
    torch.testing.assert_close(loss, out.loss)
    for logprobs in (
        rows,
        ops.token_logprobs(out.logits[:, :-1], targets)[0],
        ops.linear_logprobs(inputs, weight, targets)[0],
        ops.linear_kl(inputs, weight, inputs, weight, targets)[0],
        ops.linear_ppo_loss(inputs, weight, targets, rows, rows, torch.ones_like(rows))[1],
    ):
        assert logprobs.shape == targets.shape == (3, 8)
        torch.testing.assert_close(-logprobs.sum() / (targets != -100).sum(), out.loss)
    assert abs(ops.linear_cross_entropy(hidden, weight, labels)[0] - out.loss) > 1e-3
