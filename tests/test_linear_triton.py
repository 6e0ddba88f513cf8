"""The linear head's Triton kernels beyond the ops' small sizes: several chunks, rows in segments, memory, bits."""

import gc

import pytest
import torch
from peak import gradient_peak

from rlhf_fast import ops

if not ops.linear_logprobs.can_run("triton", "cpu"):
    pytest.skip("Triton's kernels cannot be forced on the CPU here", allow_module_level=True)

from rlhf_fast.kernels.triton import _head, _logits, _scale, _softmax, launch


def triton(name):
    return getattr(ops, name).backend("triton")


def exact(name):
    return getattr(ops, name).backend("reference")


@pytest.fixture
def chunks(monkeypatch):
    """Return a function that sets the rows of a chunk, and up to how many programs for each SM a row is read whole."""

    def set_sizes(rows, programs=4):
        monkeypatch.setattr(_head.GpuHead, "max_chunk_rows", lambda *_: rows)
        monkeypatch.setattr(_head, "MIN_16_BIT_WORK", 0)
        monkeypatch.setattr(_head, "MIN_SPLIT_WORK", 0)
        monkeypatch.setattr(_head, "PART_BYTES", 1 << 14)
        monkeypatch.setattr(_softmax, "SEGMENT", 1)
        monkeypatch.setattr(_logits, "ROWS_PER_SM", programs)

    return set_sizes


def random_head(N, D, V, dtype=torch.float32, ignored=0.3):
    """Return hidden with NaN in ignored rows, weight, bias and targets."""
    is_ignored = torch.rand(N) < ignored
    hidden = (2 * torch.randn(N, D)).masked_fill(is_ignored[:, None], torch.nan)
    floats = hidden, torch.randn(V, D) / D**0.5, torch.randn(V)
    return *(x.to(dtype).requires_grad_() for x in floats), torch.randint(V, (N,)).masked_fill(is_ignored, -100)


def to_float64(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def calls(targets, ref):
    """Return for each op two functions: one calls it with hidden, weight and bias, one makes a loss of its outputs."""
    N = len(targets)
    old, advantages, weights = -5 * torch.rand(N), torch.randn(N), torch.rand(N) / N
    upstream = torch.randn(3, N)

    def in_dtype_of(x, like):
        return x.double() if like.dtype == torch.float64 and x.is_floating_point() else x

    def run(name, *args, **options):
        return lambda call, x, w, b: call(name)(x, w, *(in_dtype_of(a, x) for a in args), bias=b, **options)

    def weighted(outputs):
        return sum((u * o).sum() for u, o in zip(upstream, outputs, strict=False))

    options = {"temperature": 0.7, "softcap": 20.0}
    ppo = {"kl_coef": 0.1, "entropy_coef": 0.05, "dual_clip": 3.0}
    return {
        "linear_cross_entropy": (run("linear_cross_entropy", targets, weights), lambda out: out[0]),
        "linear_logprobs": (run("linear_logprobs", targets, **options), weighted),
        "linear_ppo_loss": (
            run("linear_ppo_loss", targets, old, advantages, weights, old - 0.5, **options, **ppo),
            lambda out: out[0],
        ),
        "linear_kl": (run("linear_kl", *ref, targets, **options), lambda out: weighted([out[0], *out[2:]])),
    }


@pytest.mark.parametrize(
    "rows, programs, dtype",
    [
        (9, 4, torch.float32),
        (9, 4, torch.bfloat16),
        (20, 4, torch.bfloat16),
        (99, 9, torch.float16),
        (99, 1, torch.float32),
    ],
    ids=["split-float32", "split-bfloat16", "whole and split-bfloat16", "one-split-float16", "one-whole-float32"],
)
@pytest.mark.exhaustive(0, slow=1)
def test_chunks(chunks, poisoned, dtype, rows, programs):
    """Outputs and gradients are exact up to rounding, for any chunks and for rows read whole or in segments.

    The vocabulary of 4501 has products of 4496 and of 5 columns in 16 bits."""
    hidden, weight, bias, targets = random_head(23, 31, 4501, dtype)
    targets[:2] = torch.tensor([4500, 4495])  # one in each part
    with torch.no_grad():
        hidden[:2] = 1
    chunks(rows, programs)
    for name, (run, loss) in calls(targets, (torch.randn(23, 6), torch.randn(4501, 6) / 3)).items():
        float64_inputs = to_float64(hidden, weight, bias)
        outputs, truth = run(triton, hidden, weight, bias), run(exact, *float64_inputs)
        for ours, theirs in zip(outputs, truth, strict=True):
            torch.testing.assert_close(ours.to(theirs.dtype), theirs, atol=2e-5, rtol=2e-5)
        ours = torch.autograd.grad(loss(outputs), (hidden, weight, bias))
        theirs = torch.autograd.grad(loss(truth), float64_inputs)
        for a, b in zip(ours, theirs, strict=True):
            assert b.norm() > 0 and a.isfinite().all()
            tolerance = {4: 1e-5, 2: 2**-7}[dtype.itemsize]
            assert (a.double() - b).norm() <= tolerance * b.norm(), name
            if len(b) == 4501:
                assert (a.double() - b)[4496:].norm() <= tolerance * b[4496:].norm(), name


@pytest.mark.slow
def test_bits_do_not_depend_on_the_path(chunks, monkeypatch):
    """Log-probabilities have the same bits with and without a gradient, in each op, for rows read whole or in segments,
    where the library's products make the statistics. Where our product makes them they agree up to rounding."""
    hidden, weight, bias, targets = random_head(24, 24, 4500, torch.bfloat16)
    ours = triton("linear_logprobs")(hidden, weight, targets, bias)
    monkeypatch.setattr(_head, "MAX_SCORED_DEPTH", 0)
    theirs = triton("linear_logprobs")(hidden, weight, targets, bias)
    assert not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), "both took the same path"
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=2e-6)
    old, advantages, weights = torch.zeros(24), torch.randn(24), torch.rand(24)
    found = []
    for programs in (1, 100):
        chunks(12, programs)
        scored = triton("linear_logprobs")(hidden.detach(), weight.detach(), targets, bias.detach())
        found += [scored, triton("linear_logprobs")(hidden, weight, targets, bias)]
        found.append(triton("linear_ppo_loss")(hidden, weight, targets, old, advantages, weights, bias=bias)[1:3])
        loss, logprobs = triton("linear_cross_entropy")(hidden, weight, targets, weights, bias)
        found.append((logprobs, scored[1]))
        grads = torch.autograd.grad(loss, (hidden, weight, bias))
        again = torch.autograd.grad(
            triton("linear_cross_entropy")(hidden, weight, targets, weights, bias)[0], (hidden, weight, bias)
        )
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    for logprobs, entropy, *_ in found[1:]:
        assert torch.equal(logprobs, found[0][0]) and torch.equal(entropy, found[0][1])
    assert found[0][0].isfinite().all() and (found[0][0] < 0).any()


def test_large_gradients_in_float16_do_not_overflow(chunks):
    """A loss scaler makes such gradients."""
    chunks(4)
    hidden, weight, bias, targets = random_head(4, 16, 33, torch.float16, ignored=0)
    upstream = torch.full((4,), 1000.0)
    ours = torch.autograd.grad(
        triton("linear_logprobs")(hidden, weight, targets, bias)[0], (hidden, weight, bias), upstream
    )
    float64_inputs = to_float64(hidden, weight, bias)
    theirs = torch.autograd.grad(
        exact("linear_logprobs")(*float64_inputs[:2], targets, float64_inputs[2])[0], float64_inputs, upstream.double()
    )
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() <= 2**-8 * b.norm()


def test_small_gradients_in_float16_do_not_vanish(chunks):
    """A weight of 1e-6 times a probability of 1e-3 is below float16's smallest number, and yet there is a gradient."""
    chunks(16)
    hidden, weight, _, _ = random_head(16, 24, 1000, torch.float16, ignored=0)
    targets, weights = torch.randint(1000, (16,)), torch.full((16,), 1e-6)
    (ours,) = torch.autograd.grad(1000 * triton("linear_cross_entropy")(hidden, weight, targets, weights)[0], weight)
    float64_inputs = to_float64(hidden, weight)
    (truth,) = torch.autograd.grad(
        1000 * exact("linear_cross_entropy")(*float64_inputs, targets, weights.double())[0], float64_inputs[1]
    )
    assert (ours.double() - truth).norm() <= 0.1 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.5, -3.0, 0.0, torch.nan, torch.inf])
def test_gradients_are_scaled_by_a_number_on_the_device(dtype, factor, monkeypatch):
    """By 1 nothing is written, also not where a gradient is NaN."""
    monkeypatch.setattr(_scale, "PROGRAMS_PER_SM", 1)  # of 4 SMs: programs take several blocks
    for N in (0, 1, 100, 4096 * 9 + 5):
        x = torch.randn(N).to(dtype)
        x[1:3] = torch.nan
        memory = torch.cat([x, torch.full((7,), 5.0, dtype=dtype)])
        before = memory.clone()
        _scale.scale_in_place(memory[:N], torch.tensor(factor))
        if factor == 1:
            assert torch.equal(memory.view(torch.uint8), before.view(torch.uint8))
        else:
            truth = (x.float() * factor).to(dtype)
            torch.testing.assert_close(memory[:N], truth, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(memory[N:], before[N:])


@pytest.mark.parametrize("V, depths", [(1000, [1000]), (1003, [1000, 3]), (5, [5])])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_the_vocabulary_have_a_float32_result(chunks, dtype, V, depths, monkeypatch):
    """The library may add parts of a product in the dtype of its result."""
    hidden, weight, bias, targets = random_head(20, 16, V, dtype)
    chunks(8)
    found = []

    def recorded(function):
        def run(a, b, out, *args, **options):
            found.append((tuple(a.shape), out.dtype))
            return function(a, b, out, *args, **options)

        return run

    for name in ("multiply", "multiply_to_float32"):
        monkeypatch.setattr(_head, name, recorded(getattr(_head, name)))
    triton("linear_cross_entropy")(hidden, weight, targets, bias=bias)[0].backward()
    over_vocabulary = [(depth, out) for (rows, depth), out in found if rows in (8, 4) and depth != 16]
    assert {depth for depth, _ in over_vocabulary} == set(depths)
    assert {out for _, out in over_vocabulary} == {torch.float32}


@pytest.mark.slow
def test_memory(chunks, monkeypatch):
    """Beyond inputs and gradients only a chunk's logits and its copy of hidden are allocated, nothing of size N V."""
    V, D, rows, run_kernel = 8192, 16, 6, launch.run

    def run_and_collect(*args, **options):
        run_kernel(*args, **options)
        gc.collect(0)  # the interpreter's frames keep references to the arguments

    monkeypatch.setattr(launch, "run", run_and_collect)
    chunks(rows, 1)

    def cross_entropy(hidden, weight):
        return triton("linear_cross_entropy")(hidden, weight, targets)[0]

    def logprobs(hidden, weight):
        return triton("linear_logprobs")(hidden, weight, targets)[0].sum()

    for N in (6, 30):
        hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
        targets = torch.randint(V, (N,))
        budget = 4 * rows * (V + D) + 4 * N * (2 * D + 30) + 20_000
        for run in (cross_entropy, logprobs):
            assert gradient_peak(run, hidden, weight) < budget + weight.nbytes, (run.__name__, N)
            assert gradient_peak(run, hidden, weight.detach()) < budget, (run.__name__, N)


def head_of_sizes(N, V, D=1, dtype=torch.float32):
    """Return a head of matrices without memory."""
    hidden, weight = (torch.empty(rows, D, dtype=dtype, device="meta") for rows in (N, V))
    return _head.GpuHead("", hidden, weight, torch.empty(N, dtype=torch.long, device="meta"))


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(launch, "num_sms", lambda _: 132)
    monkeypatch.setattr(_head, "can_multiply_to_float32", lambda *_: True)


def test_chunks_come_from_a_budget_and_a_floor(h100):
    def sizes(N, V, D=1, needs_weight=False, num_buffers=1):
        chunks = head_of_sizes(N, V, D).chunks(needs_weight, num_buffers)
        assert [begin for begin, _ in chunks[1:]] == [end for _, end in chunks[:-1]]
        return [end - begin for begin, end in chunks]

    assert sizes(0, 10) == [] and sizes(5, 10) == [5]
    assert sizes(8192, 151936, 4096) == [3072, 3072, 2048]  # of 2 GiB at most; 24 x 16 tiles are 2.9 waves of 132
    assert sizes(8192, 151936, 4096, True) == [3072, 3072, 2048]  # a float32 dW is its own sum
    assert sizes(4100, 1 << 20, 100) == [896, 896, 896, 896, 516]  # no less than 1024 rows at most, in even parts
    assert max(sizes(100_000, 50257)) == 10112
    assert max(sizes(100_000, 50257, num_buffers=2)) == 5120


def test_a_vocabulary_that_is_no_multiple_of_8_has_two_products(h100):
    """The head has them where tensor cores multiply for so long that more launches do not matter."""
    gpt2 = {"N": 8192, "V": 50257, "D": 768, "dtype": torch.bfloat16}
    assert head_of_sizes(**gpt2).column_parts == [(0, 50256), (50256, 1)]
    assert head_of_sizes(**gpt2 | {"V": 50263}).column_parts == [(0, 50256), (50256, 7)]
    for change in ({"V": 50264}, {"dtype": torch.float32}, {"N": 64}, {"V": 7, "N": 1 << 20}):
        head = head_of_sizes(**gpt2 | change)
        assert head.column_parts == [(0, head.V)], change


def test_one_chunk_where_it_takes_no_more_memory(h100):
    """A chunk of c rows takes 4 V (c + D) bytes, with the float32 dW that chunking needs; one chunk takes 4 V N."""
    V, D = 151936, 4096
    head_of = lambda N: head_of_sizes(N, V, D, torch.bfloat16)  # noqa: E731
    assert head_of(8192).chunks(True) == [(0, 8192)]
    assert [end - begin for begin, end in head_of(8193).chunks(True)] == [2816, 2816, 2561]
    for N in (1000, 5000, 8192, 10_000, 12_288, 65_536):
        for needs_weight, num_buffers in ((True, 1), (True, 2), (False, 1)):
            chunks = head_of(N).chunks(needs_weight, num_buffers)
            bytes_taken = 4 * V * num_buffers * max(end - begin for begin, end in chunks)
            bytes_taken += 4 * V * D * (needs_weight and len(chunks) > 1)
            budget = max(_head.CHUNK_BYTES, 4 * V * D * needs_weight)
            assert bytes_taken <= budget + 4 * V * D * needs_weight, (N, needs_weight, num_buffers)
            assert len(chunks) <= -(-N // (3072 // num_buffers)), (N, needs_weight, num_buffers)


@pytest.mark.parametrize("total, max_size, columns", [(8192, 4096, 4096), (10_000, 4096, 4096), (5000, 999, 768)])
def test_parts_are_few_and_take_the_fewest_waves(total, max_size, columns):
    parts = _head.split_rows(total, max_size, columns, 132)
    sizes = [end - begin for begin, end in parts]
    largest = max_size // 128 * 128
    assert sum(sizes) == total and len(sizes) == -(-total // largest) and len(set(sizes[:-1])) == 1
    waves = {rows: -(-(-(-rows // 128) * -(-columns // 256)) // 132) for rows in range(1, max_size + 1)}
    others = [[size] * (len(sizes) - 1) for size in range(128, largest + 1, 128)]
    others = [[*some, total - sum(some)] for some in others if 0 < total - sum(some) <= some[0]]
    assert sizes in others
    assert sum(waves[rows] for rows in sizes) == min(sum(waves[rows] for rows in some) for some in others)
    assert total != 10_000 or sizes == [4096, 4096, 1808]  # 10 waves; in even parts 12
