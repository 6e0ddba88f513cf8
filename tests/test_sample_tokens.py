"""sample_tokens beyond its reference: samples follow their distribution and depend only on their own row.

Noise seeds are fixed, so a statistical test always gives the same result.
"""

import math
from importlib import import_module

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.kernels._sampling import gumbel_noise, noise_words, philox

sample_tokens = ops.sample_tokens
BACKENDS = sample_tokens.backends
INFINITY = float("inf")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def choose(backend, many, few):
    """Return `few` for Triton's interpreter, which takes some hundredths of a second for each row."""
    return few if backend == "triton" else many


def sample(backend, logits, **options):
    options.setdefault("seed", 20)
    options.setdefault("row_ids", torch.arange(logits.shape[0]))
    options.setdefault("steps", 0)
    return sample_tokens.backend(backend)(logits, **options)


def chi_square_z(tokens, probabilities):
    """Return how many standard deviations counts are off their expectation. Rare tokens are counted together."""
    n = len(tokens)
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    rare = probabilities * n < 8
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = n * torch.cat([probabilities[~rare], probabilities[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    # Wilson and Hilferty: the cube root of chi-square over its freedom is close to normal.
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def test_philox_known_answers():
    """The vectors published with Random123."""
    for counter, key, answer in [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]:
        assert tuple(int(word) for word in philox(tuple(torch.tensor([c]) for c in counter), key)) == answer


def test_noise_streams_are_uncorrelated():
    """Rows, steps, seeds and neighbouring tokens are compared. Pearson's r times sqrt(n) is standard normal."""
    n = 40_000
    base = noise_words(5, torch.tensor([3]), torch.tensor([7]), n).double()
    others = {
        "row": noise_words(5, torch.tensor([4]), torch.tensor([7]), n),
        "high row bits": noise_words(5, torch.tensor([3 + 2**32]), torch.tensor([7]), n),
        "step": noise_words(5, torch.tensor([3]), torch.tensor([8]), n),
        "seed": noise_words(6, torch.tensor([3]), torch.tensor([7]), n),
        "high seed bits": noise_words(5 + 2**32, torch.tensor([3]), torch.tensor([7]), n),
        "next token": base.roll(1, 1),
        "next quad": base.roll(4, 1),
    }
    for name, other in others.items():
        r = torch.corrcoef(torch.cat([base, other.double()]))[0, 1].item()
        assert abs(r) * n**0.5 < 4.5, f"{name}: r = {r}"
    gumbel = gumbel_noise(5, torch.arange(8), torch.zeros(8, dtype=torch.int64), n)
    assert abs(gumbel.mean() - 0.5772157) < 4.5 * math.pi / math.sqrt(6 * 8 * n)


@pytest.mark.parametrize(
    "backend, options",
    [
        (backend, options)
        for backend in BACKENDS
        for options in (
            {"temperature": 2.0},
            {},
            {"temperature": 0.1},
            {"top_k": 30},
            {"top_p": 0.9},
            {"temperature": 0.7, "min_p": 0.02, "top_k": 50, "top_p": 0.97},
        )[: 2 if backend == "triton" else None]  # a test below compares its filters with the reference's
    ],
    ids=str,
)
@pytest.mark.exhaustive(1, by=("backend",))
def test_samples_follow_the_distribution(backend, options):
    """The expectation is a float64 softmax over the tokens that a sort keeps."""
    V, n = {"reference": (61, 5000), "triton": (37, 200), "simt": (61, 600)}.get(backend, (499, 10_000))
    logits = 2 * torch.randn(V, generator=torch.Generator().manual_seed(1))
    tokens, logprobs, _, kept_logprobs = sample(backend, logits.expand(n, V), **options)[:4]
    scaled = logits.double() / options.get("temperature", 1.0)
    probabilities = scaled.masked_fill(~sorted_reference(logits, **options), -INFINITY).softmax(-1)
    assert abs(chi_square_z(tokens, probabilities)) < 4.5
    torch.testing.assert_close(kept_logprobs, probabilities.log()[tokens].float(), atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(logprobs, scaled.log_softmax(-1)[tokens].float(), atol=3e-5, rtol=1e-5)


def test_heavy_tail():
    """131071 tokens 18 nats below the best one get 0.2 % of the samples. 24-bit noise would give them 0.013 %."""
    B, V, calls = 64, 2**17, 64
    logits = torch.full((B, V), -18.0)
    logits[:, 77] = 0.0
    hits = sum((sample(sample_tokens.chosen("cpu"), logits, steps=step)[0] != 77).sum().item() for step in range(calls))
    tail = (V - 1) * math.exp(-18) / (1 + (V - 1) * math.exp(-18))
    expected = B * calls * tail
    assert abs(hits - expected) < 2.5 * math.sqrt(expected), f"{hits} samples from the tail, expected {expected:.1f}"


def counters_of(words, key):
    """Invert philox: return the counter that gives these four words with a two-word key."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = words
    left, right = pow(0xD2511F53, -1, 2**32), pow(0xCD9E8D57, -1, 2**32)
    for i in range(9, -1, -1):
        k0, k1 = (key[0] + i * 0x9E3779B9) & mask, (key[1] + i * 0xBB67AE85) & mask
        before2, before0 = c1 * right & mask, c3 * left & mask
        c1, c3 = c0 ^ k0 ^ (before2 * 0xCD9E8D57 >> 32 & mask), c2 ^ k1 ^ (before0 * 0xD2511F53 >> 32 & mask)
        c0, c2 = before0, before2
    return c0, c1, c2, c3


@pytest.fixture(scope="module")
def rarest():
    """Return rows, steps and tokens whose words are 0, 1, ... (noise of 22.9, 21.8, ... nats), by inverting Philox."""
    V, seed, words = 2**17, 11, [0, 1, 7, 300, 2**32 - 1]
    row_ids, steps, tokens = [], [], []
    for word in words:
        rest = torch.randint(2**32, (3, 2**20), generator=torch.Generator().manual_seed(word))
        quad, step, low, high = counters_of((torch.full_like(rest[0], word), *rest), (seed, 0))
        at = int((quad < V // 4).nonzero()[0])
        row = int(low[at]) | int(high[at]) << 32
        row_ids.append(row - 2**64 if row >= 2**63 else row)
        steps.append(int(step[at]))
        tokens.append(4 * int(quad[at]))
    return V, seed, words, torch.tensor(row_ids), torch.tensor(steps), torch.tensor(tokens)


@pytest.mark.exhaustive(3)
def test_the_rarest_noise(backend, rarest, monkeypatch):
    """The largest noise values decide as they should. Random samples would almost never contain them."""
    if backend == "triton":
        monkeypatch.setattr(import_module("rlhf_fast.kernels.triton.sample_tokens"), "TILE", 2**14)
    V, seed, words, row_ids, steps, tokens = rarest
    rows = range(len(words))
    noise = gumbel_noise(seed, row_ids, steps, V)
    for row, token, word in zip(rows, tokens, words, strict=True):
        assert abs(noise[row, token] + math.log(-math.log1p(-(word + 0.5) / 2**32))) < 1e-9
    # The rare token just wins against a head token, and just does not.
    head = (tokens + 1000) % V
    for margin, expected in (1e-3, tokens), (-1e-3, head):
        logits = torch.full((len(words), V), -60.0)
        logits[rows, head] = 0.0
        logits[rows, tokens] = (noise[rows, head] - noise[rows, tokens] + margin).float()
        assert torch.equal(sample(backend, logits, seed=seed, row_ids=row_ids, steps=steps)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.exhaustive(1, by=("backend",))
def test_tokens_are_those_of_the_reference(backend, dtype):
    """Tokens are equal at every vocabulary size, with and without ties: the noise is the same integers.

    Inputs are fixed, because a token at which the mass equals top-p to seven digits may be kept or not.
    """
    torch.manual_seed(5)
    sizes = (1, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 127, 999, 1024, 4097)
    for V in choose(backend, sizes, (1, 999, 1024, 4097)):
        logits = (2 * torch.randn(5, V)).to(dtype)
        logits[2] = logits[2].round()
        logits[3] = 0
        logits[4] *= 1e4
        for options in (
            {},
            {"temperature": 0.3},
            {"top_k": 3},
            {"top_p": 0.7},
            {"top_k": 40, "top_p": 0.9, "min_p": 0.1},
        ):
            ours, truth = sample(backend, logits, **options), sample("reference", logits, **options)
            assert torch.equal(ours[0], truth[0]), f"V {V}, {options}"
            torch.testing.assert_close(ours[1:], truth[1:], atol=2e-5, rtol=1e-5)


def test_temperature_zero_takes_the_first_largest(backend):
    logits = torch.randn(4, 203).round()
    logits[:, [77, 150]] = 9.0
    tokens, logprobs, raw_logprobs, kept_logprobs, log_kept_mass, entropy = sample(
        backend, logits, temperature=0.0, top_p=0.5
    )
    assert tokens.tolist() == [77] * 4
    assert not torch.stack([logprobs, kept_logprobs, log_kept_mass, entropy]).any()
    torch.testing.assert_close(raw_logprobs, logits.log_softmax(-1)[:, 77])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_distribution_are_marked_and_change_no_other_row(backend, dtype):
    logits = torch.randn(9, 301).to(dtype)
    good = sample(backend, logits, top_p=torch.full((9,), 0.9))
    invalid = logits.clone()
    invalid[1], invalid[3, 300], invalid[5, 0] = -INFINITY, float("nan"), INFINITY
    top_p = torch.full((9,), 0.9)
    top_p[7] = 1.5
    out = sample(backend, invalid, top_p=top_p)
    for ours, before in zip(out, good, strict=True):
        assert torch.equal(ours[::2][[0, 1, 3, 4]], before[::2][[0, 1, 3, 4]])
    bad = [1, 3, 5, 7]
    assert out[0][bad].tolist() == [-1] * 4
    assert all(x[bad].isnan().all() for x in out[1:])


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_nan_beside_masked_tokens_is_marked(backend, top_p):
    """In rows and tiles with at most one other token, which leave nothing to add up but the NaN."""
    nan, tail = float("nan"), [-INFINITY] * choose(backend, 5000, 300)
    for row in ([nan, 1.0], [nan, -3.0, -INFINITY], [-INFINITY, nan, -INFINITY, 5.0], [2.0] * 40 + tail + [nan]):
        for temperature in (1.0, 0.7):
            logits = torch.tensor([row, [0.0 if x != x else x for x in row]])
            out = sample(backend, logits, temperature=torch.full((2,), temperature), top_p=torch.full((2,), top_p))
            assert out[0][0] == -1 and out[0][1] >= 0, row[:4]
            assert all(x[0].isnan() and x[1].isfinite() for x in out[1:]), row[:4]


@pytest.mark.exhaustive(3)
def test_masked_tokens_are_never_sampled(backend):
    V = choose(backend, 130, 20)
    logits = torch.full((V, V), -INFINITY)
    logits[range(V), range(V)] = torch.randn(V)
    tokens, logprobs = sample(backend, logits)[:2]
    assert tokens.tolist() == list(range(V)) and not logprobs.any()
    rows = choose(backend, 100 if backend == "simt" else 2000, 12)
    logits = torch.zeros(rows, 70).masked_fill(torch.arange(70) % 3 > 0, -INFINITY)
    for options in {}, {"top_k": 60}, {"top_p": 0.99}, {"temperature": 50.0}:
        assert (sample(backend, logits, **options)[0] % 3 == 0).all()


def test_filters_that_are_off_change_no_bit(backend):
    logits = 5 * torch.randn(6, 517)
    plain = sample(backend, logits)
    ones = torch.ones(6)
    for options in {"top_k": 0}, {"top_k": 517}, {"top_p": 1.0}, {"min_p": 0.0}, {
        "temperature": ones, "top_k": (517 * ones).long(), "top_p": ones, "min_p": 0 * ones,
    }:  # fmt: skip
        for a, b in zip(sample(backend, logits, **options), plain, strict=True):
            assert torch.equal(a, b)


def sorted_reference(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Return the mask of the tokens kept in one row, by a sort in float64."""
    z = [x / temperature for x in logits.double().tolist()]
    order = sorted(range(len(z)), key=lambda v: (-z[v], v))
    order = order[: top_k or len(z)]
    mass = [math.exp(z[v] - z[order[0]]) for v in order]
    kept, before = [], 0.0
    for v, m in zip(order, mass, strict=True):
        if before < top_p * math.fsum(mass) and m >= min_p:
            kept.append(v)
        before += m
    return torch.zeros(len(z), dtype=torch.bool).index_fill(0, torch.tensor(kept), True)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1}, {"top_k": 7}, {"top_k": 149}, {"top_p": 0.01}, {"top_p": 0.5}, {"top_p": 0.95}, {"top_p": 0.9999},
        {"min_p": 0.1}, {"min_p": 1.0}, {"top_k": 20, "top_p": 0.8}, {"top_k": 60, "top_p": 0.9, "min_p": 0.05},
        {"top_p": 0.9, "temperature": 3.0}, {"top_p": 0.9, "temperature": 0.2, "top_k": 100},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.exhaustive(4, by=("backend",))
def test_kept_tokens_are_those_of_a_sort(backend, options, ties):
    """Row v has noise with which token v wins if it is kept."""
    V = choose(backend, 150, 25)  # more than one bracket of the threshold search
    if options.get("top_k", 0) >= V:
        options = options | {"top_k": V - 5}
    logits = 2 * torch.randn(V, generator=torch.Generator().manual_seed(len(str(options))))
    logits = logits.round() if ties else logits
    tokens, logprobs, _, kept_logprobs, log_kept_mass, _ = sample(
        backend, logits.expand(V, V), noise=1e6 * torch.eye(V), **options
    )
    kept = tokens == torch.arange(V)
    assert torch.equal(kept, sorted_reference(logits, **options))
    assert abs(kept_logprobs[kept].double().exp().sum() - 1) < 1e-5
    assert abs(logprobs[kept].double().exp().sum().log() - log_kept_mass[0]) < 1e-5


@pytest.mark.parametrize("masked", [0, 500])
def test_a_top_p_just_below_1_keeps_a_distribution(backend, masked):
    """By rounding, the target mass may exceed the sum of all tokens' masses."""
    V = 700
    logits = 3 * torch.randn(choose(backend, 12, 2), V, generator=torch.Generator().manual_seed(4))
    logits[:, V - masked :] = -INFINITY
    for below in (2**-24, 2**-23, 1e-6):
        tokens, logprobs, _, kept_logprobs, log_kept_mass, _ = sample(backend, logits, top_p=1 - below, temperature=0.7)
        assert ((tokens >= 0) & (tokens < V - masked)).all()
        torch.testing.assert_close(kept_logprobs, logprobs, atol=1e-5, rtol=1e-5)
        assert (log_kept_mass.abs() < 1e-5).all()


def test_the_smallest_floats_are_distinguished(backend):
    """The threshold search must separate -0 from the negative number next to it, and end."""
    logits = torch.full((1, 300), -1e-45)
    logits[0, 7] = 1.0
    assert (logits[0, 0] < 0) and sample(backend, logits, top_k=1)[0].item() == 7
    noise = torch.zeros(1, 300)
    noise[0, 1], noise[0, 2] = 8.0, 9.0
    assert sample(backend, logits, top_k=3, noise=noise)[0].item() == 1  # kept are 7, 0, 1: the first of equal ones


def test_the_callers_noise_replaces_the_keyed_noise(backend):
    logits, noise = torch.zeros(1, 8), torch.full((1, 8), -INFINITY)
    logits[0, 3], noise[0, 3] = -100.0, 0.0
    assert sample(backend, logits, noise=noise)[0].item() == 3


def test_in_flat_rows_the_filters_keep_the_lowest_indices(backend):
    """All tokens are equal, so the bracket of the threshold search never shrinks."""
    V = 5000
    for value in 0.0, -0.0, 1e4, -3.5:
        noise = torch.zeros(2, V)
        noise[0, 1249], noise[1, 1250] = 9.0, 9.0
        for options in {"top_k": 1250}, {"top_p": 0.25}:
            tokens, _, _, kept_logprobs, log_kept_mass, _ = sample(
                backend, torch.full((2, V), value), noise=noise, **options
            )
            assert tokens.tolist() == [1249, 0]
            torch.testing.assert_close(kept_logprobs, torch.full((2,), -math.log(1250)))
            torch.testing.assert_close(log_kept_mass, torch.full((2,), math.log(0.25)))


def test_many_equal_small_terms_are_all_counted(backend):
    """A float32 sum rounds equal small terms beside a large one in one direction, and would lose 1e-5 of the mass."""
    logits = torch.zeros(3, 40_000)
    logits[:, 0] = 14.0
    _, logprobs, _, _, _, entropy = sample(backend, logits, noise=torch.eye(3, 40_000)[[0, 0, 0]])
    exact = -math.log1p(39_999 * math.exp(-14))
    torch.testing.assert_close(logprobs, torch.full((3,), exact), atol=3e-7, rtol=0)
    exact_entropy = -exact + 14 * 39_999 * math.exp(-14) * math.exp(exact)
    torch.testing.assert_close(entropy, torch.full((3,), exact_entropy), atol=3e-6, rtol=0)


@pytest.mark.exhaustive(3)
def test_a_row_depends_only_on_itself(backend):
    """Bits are the same for any batch, order, other rows and number of threads."""
    B = choose(backend, 33, 11)
    args = sample_tokens.make_inputs(B=B, V=770, mixed=True, device="cpu", dtype=torch.float32)
    whole = sample_tokens.backend(backend)(*args)
    shuffled = torch.randperm(B)

    def rows(index):
        return sample_tokens.backend(backend)(*(a[index] if isinstance(a, torch.Tensor) else a for a in args))

    for part in shuffled, shuffled[:7], torch.tensor([5]):
        for a, b in zip(rows(part), whole, strict=True):
            assert torch.equal(a, b[part])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        for a, b in zip(sample_tokens.backend(backend)(*args), whole, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.exhaustive(3)
def test_samples_of_one_prompt_differ(backend):
    """With equal logits, other row ids, steps or seeds give other tokens. Seeds and ids use all of their 64 bits."""
    B = choose(backend, 64, 16)
    logits = torch.zeros(B, choose(backend, 4096, 2048))
    base = sample(backend, logits)[0]
    assert len(base.unique()) > 0.85 * B
    ids = torch.arange(B)
    for other in {"steps": 1}, {"seed": 21}, {"seed": 20 + 2**63}, {"row_ids": ids + 2**40}, {"row_ids": ids - 2**63}:
        assert (sample(backend, logits, **other)[0] == base).sum() < 5
    assert torch.equal(sample(backend, logits, steps=torch.zeros(B, dtype=torch.int32))[0], base)


@pytest.fixture
def small_tiles(monkeypatch):
    """Set small tiles in Triton's kernels, so that rows have many, and a sample far smaller than a row."""
    home = pytest.importorskip("rlhf_fast.kernels.triton.sample_tokens")
    for module, name, value in (home, "TILE", 256), (home.filters, "SAMPLE", 256), (home.filters, "TILE", 512):
        monkeypatch.setattr(module, name, value)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton here")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_rows_of_many_tiles(dtype):
    """Rows are flat, peaked, tied, masked and sorted; in one all tokens of the sample are far below the others."""
    torch.manual_seed(2)
    V = 1029
    logits = torch.randn(7, V) * torch.tensor([0.01, 1.0, 3.0, 10.0, 3.0, 2.0, 1.0])[:, None]
    logits[2] = logits[2].round()
    logits[4] = logits[4].sort(descending=True).values
    logits[5] = logits[5].masked_fill(torch.rand(V) < 0.4, -INFINITY)
    sampled = torch.arange(V) % (V // 16) < 16
    logits[6] = torch.where(sampled, logits[6] - 20, logits[6])
    logits = logits.to(dtype)
    for options in (
        {"temperature": 0.8}, {"top_p": 0.9}, {"top_k": 700}, {"top_p": 0.6, "temperature": 1.5, "min_p": 0.01},
        {"top_k": 30, "top_p": 0.8},
    ):  # fmt: skip
        ours, truth = sample("triton", logits, **options), sample("reference", logits, **options)
        assert torch.equal(ours[0], truth[0]), f"{options}"
        torch.testing.assert_close(ours[1:], truth[1:], atol=2e-5, rtol=1e-5)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton here")
@pytest.mark.usefixtures("small_tiles")
def test_options_of_many_tiles_by_row():
    """Filtered, unfiltered, greedy and invalid rows are in one batch."""
    torch.manual_seed(4)
    args = list(sample_tokens.make_inputs(B=12, V=1030, mixed=True, device="cpu", dtype=torch.float32))
    args[0][7, 1029] = float("nan")
    args[3][9] = 1.5
    ours, truth = sample_tokens.backend("triton")(*args), sample_tokens.backend("reference")(*args)
    assert torch.equal(ours[0], truth[0]) and ours[0][[7, 9]].tolist() == [-1, -1]
    torch.testing.assert_close(ours[1:], truth[1:], atol=2e-5, rtol=1e-5, equal_nan=True)
    alone = sample_tokens.backend("triton")(*(a[3:4] if isinstance(a, torch.Tensor) else a for a in args))
    for a, b in zip(alone, ours, strict=True):
        assert torch.equal(a, b[3:4])


def test_a_trainer_computes_the_same_logprobs(backend):
    """The importance ratio is 1 when rollout and trainer share logits, for temperature != 1 and top-p < 1."""
    logits = 4 * torch.randn(32, 1500)
    tokens, logprobs, raw_logprobs = sample(backend, logits, temperature=0.6, top_p=0.8)[:3]
    again, _ = ops.token_logprobs(logits, tokens, temperature=0.6)
    torch.testing.assert_close((again - logprobs).exp(), torch.ones(32), atol=5e-6, rtol=0)
    torch.testing.assert_close(raw_logprobs, ops.token_logprobs(logits, tokens)[0], atol=5e-6, rtol=1e-6)


def test_bad_arguments_are_named():
    logits, keys = torch.zeros(3, 5), {"row_ids": torch.arange(3), "steps": 0}
    for options, message in [
        ({"temperature": -1.0}, "temperature must be between 0 and 1e6, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_k": -1}, "top_k must be 0 \\(off\\) or more, got -1"),
        ({"min_p": 2}, "min_p must be between 0 and 1, got 2"),
        ({"top_p": torch.ones(4)}, r"top_p must be a number or have shape \(3,\), got \[4\]"),
        ({"noise": torch.zeros(3, 4)}, r"noise must have shape \[3, 5\], got \[3, 4\]"),
        ({"steps": torch.zeros(2)}, r"row_ids and steps must have shape \(3,\), got \[\[3\], \[2\]\]"),
        (
            {"steps": None},
            r"row_ids, int64 of shape \(3,\), and steps, the same or an int, must be given: .*; steps is None",
        ),
        ({"row_ids": None}, "row_ids, int64 .*; row_ids is None"),
    ]:
        with pytest.raises(ValueError, match=f"sample_tokens: {message}"):
            sample_tokens(logits, **{**keys, **options})
    with pytest.raises(ValueError, match="floating point of shape"):
        sample_tokens(torch.zeros(3, 0), **keys)
