"""The paged KV cache and its scheduler: reference counts, shared pages, prefill; freed pages are never read."""

import gc
from itertools import pairwise

import pytest
import torch
from architectures import build, llama, prompts, sampling

from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.rollout import kv_cache, prefill
from rlhf_fast.rollout.decoder import TokenBatch
from rlhf_fast.rollout.kv_cache import MIB, PAGE_SIZE, KVShape, OutOfPages, PagedKVCache, create_cache
from rlhf_fast.rollout.rollout import Rollout

PATHS = ["fused", "attention"]
"""The decode paths over a PagedKVCache."""
pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SHAPES = [KVShape(2, 8, 8), KVShape(3, 5, 7), KVShape(1, 1, 1)]
small_pages = pytest.mark.usefixtures("pages_of_4")
nan_pages = pytest.mark.usefixtures("pages_of_4", "free_pages_are_nan")


@pytest.fixture(params=PATHS)
def decode_path(request):
    return request.param


@pytest.fixture
def pages_of_4(monkeypatch):
    monkeypatch.setitem(PAGE_SIZE, "cpu", 4)


@pytest.fixture
def free_pages_are_nan(monkeypatch):
    release, init = PagedKVCache.release, PagedKVCache.__init__

    def nan_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.memory.fill_(torch.nan)

    def nan_release(self, pages):
        release(self, pages)
        for page in pages:
            if not self.refcount(page):
                for view in (*self.k, *self.v):
                    view[page] = torch.nan

    monkeypatch.setattr(PagedKVCache, "__init__", nan_init)
    monkeypatch.setattr(PagedKVCache, "release", nan_release)


class RecordingDecoder:
    """A decoder that records the (positions, slots) of each call of another."""

    def __init__(self, decoder):
        self.decoder, self.calls = decoder, []
        self.name, self.shapes, self.dtype = decoder.name, decoder.shapes, decoder.dtype

    def session(self):
        return self.decoder.session()

    def hidden(self, cache: PagedKVCache, batch: TokenBatch):
        self.calls.append((batch.positions.tolist(), batch.slots.tolist()))
        return self.decoder.hidden(cache, batch)


def recorded(model: Model, decode_path: str, **settings) -> tuple[Rollout, list]:
    """Return a rollout, and the list to which its decoder's calls are appended."""
    rollout = Rollout(model, sampling(**settings), decode_path=decode_path)
    rollout._decoder = RecordingDecoder(rollout._get_decoder())
    return rollout, rollout._decoder.calls


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def small_cache(dtype=torch.float32) -> PagedKVCache:
    return PagedKVCache(SHAPES, dtype, CPU, num_pages=5, num_slots=2, max_pages_per_slot=3, page_size=4)


def test_views_of_one_allocation():
    cache = small_cache(torch.bfloat16)
    start, end = cache.memory.data_ptr(), cache.memory.data_ptr() + 2 * cache.memory.numel()
    spans = []
    for layer, (heads, k_dim, v_dim) in enumerate(SHAPES):
        for view, dim in ((cache.k[layer], k_dim), (cache.v[layer], v_dim)):
            assert view.shape == (5, heads, 4, dim) and view.is_contiguous() and (view.data_ptr() - start) % 128 == 0
            spans.append((view.data_ptr(), view.data_ptr() + 2 * view.numel()))
    assert spans == sorted(spans) and spans[-1][1] <= end
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert cache.block_table.shape == (2, 3) and cache.block_table.dtype == torch.int32


def test_pages_are_reference_counted():
    cache = small_cache()
    assert [cache.pages_for(n) for n in (0, 1, 3, 4, 5, 8)] == [0, 1, 1, 1, 2, 2]
    first, second = cache.allocate(3), cache.allocate(1)
    assert len({*first, *second}) == 4 and cache.num_free_pages == 1
    with pytest.raises(OutOfPages, match="2 pages requested, 1 of 5 are free"):
        cache.allocate(2)
    assert cache.num_free_pages == 1
    cache.incref(first[:2])
    assert [cache.refcount(page) for page in first] == [2, 2, 1]
    cache.release(first)
    assert cache.num_free_pages == 2 and cache.allocate(1) == [first[2]]
    cache.release(first[:2])
    assert cache.num_free_pages == 3 and cache.refcount(first[0]) == 0
    with pytest.raises(RuntimeError, match="is free already"):
        cache.release(first[:1])
    with pytest.raises(RuntimeError, match="is free and cannot be shared"):
        cache.incref(first[:1])


def test_pages_are_copied_in_every_layer_and_assign_replaces_the_row():
    cache = small_cache()
    cache.memory.normal_()
    before = [view.clone() for view in (*cache.k, *cache.v)]
    cache.copy_pages([0, 3], [1, 4])
    for view, old in zip((*cache.k, *cache.v), before, strict=True):
        assert torch.equal(view, old[[0, 0, 2, 3, 3]])
    cache.copy_pages([], [])
    cache.assign(1, [4, 2, 3])
    cache.assign(1, [1])
    assert cache.block_table.tolist() == [[0, 0, 0], [1, 0, 0]]


def test_missing_memory_is_an_error_that_says_how_many_rows_fit(monkeypatch):
    shapes = [KVShape(1, 128, 128)]  # a page of 4 float32 positions: 4 KiB
    cache = create_cache(shapes, torch.float32, CPU, [1024, 8], num_pages=2000, num_slots=2, cache_mb=2, page_size=4)
    assert cache.num_pages == 512 and cache.max_pages_per_slot == 256
    with pytest.raises(UserError, match="cache_mb: 1 MiB hold 0 rows: one of 1028 tokens needs 2 MiB"):
        create_cache(shapes, torch.float32, CPU, [1028], num_pages=257, num_slots=1, cache_mb=1, page_size=4)
    monkeypatch.setattr(kv_cache, "available_bytes", lambda _: 3 * MIB + 5)
    sentence = "4 rows of up to 1024 tokens need 4 MiB of keys and values, and cpu has 3 MiB left: 3 rows fit; lower"
    with pytest.raises(UserError, match=sentence):
        create_cache(shapes, torch.float32, CPU, [1024] * 9, num_pages=1024, num_slots=4, page_size=4)
    monkeypatch.setattr(kv_cache, "available_bytes", lambda _: None)
    with pytest.raises(UserError, match="0 rows fit"):
        create_cache(shapes, torch.float32, CPU, [2**50], num_pages=2**48, num_slots=4, page_size=4)


def test_available_memory_is_read_from_the_system():
    assert kv_cache.available_bytes(CPU) is None or kv_cache.available_bytes(CPU) > 2**20


@nan_pages
@pytest.mark.parametrize("length", [3, 4, 5, 7, 8, 9])
def test_page_boundaries(length, decode_path):
    """Prompts that end at a page boundary, or one token to each side of it; responses that do."""
    model, batch = llama(eos_token_id=None), prompts(length, 1)
    expected = Rollout(model, sampling(temperature=0.0), decode_path="transformers").generate(batch, samples=2)
    for limit in range(1, 7):
        found = Rollout(model, sampling(temperature=0.0, max_new_tokens=limit), decode_path=decode_path).generate(
            batch, samples=2
        )
        assert found.response_ids() == [row[:limit] for row in expected.response_ids()]
        torch.testing.assert_close(found.raw_logprobs, expected.raw_logprobs[:, :limit], rtol=0, atol=2e-5)


@small_pages
def test_freed_pages_are_never_read(decode_path, request):
    """Two slots, many rows: every page is reused several times, and is NaN in between."""
    model, batch = llama(), prompts(2, 9, 5, 3, 16, 11, 4)
    rollouts = [Rollout(model, sampling(batch=2), seed=3, decode_path=decode_path) for _ in range(2)]
    expected = rollouts[0].generate(batch, samples=3)
    request.getfixturevalue("free_pages_are_nan")
    assert equal(rollouts[1].generate(batch, samples=3), expected)


@small_pages
def test_nothing_is_computed_twice(decode_path):
    """A prompt is prefilled once for all its samples; a response's last token and finished rows are never run."""
    model, batch = llama(), prompts(2, 9, 5, 3, 16, 11, 4)
    batch.tokens[3] = batch.tokens[1]  # the same prompt under another uid is prefilled only once
    for size in (1, 2, 5, 64):
        rollout, calls = recorded(model, decode_path, batch=size)
        found = rollout.generate(batch, samples=4)
        num_prompt_tokens = sum(len(tokens) for i, tokens in enumerate(batch.tokens) if i != 3)
        num_decoded = int(found.mask.sum()) - len(found.lengths)
        assert sum(len(positions) for positions, _ in calls) == num_prompt_tokens + num_decoded
        assert max(len(set(slots)) for _, slots in calls) <= size
        assert calls[0][0][:16] == list(range(16))  # the longest prompt first


@small_pages
def test_long_prompts_are_prefilled_in_several_calls(decode_path, monkeypatch):
    model, batch = llama(), prompts(2, 9, 5, 3, 16)
    expected = Rollout(model, sampling(), decode_path=decode_path).generate(batch, samples=2)
    monkeypatch.setattr(prefill, "MAX_PREFILL_TOKENS", {"cpu": 7})
    rollout, calls = recorded(model, decode_path)
    found = rollout.generate(batch, samples=2)
    assert [len(positions) for positions, _ in calls[:7]] == [7, 7, 2, 7, 2, 5, 5]
    assert found.response_ids() == expected.response_ids()
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=0 if decode_path == "fused" else 2e-5)


@nan_pages
@pytest.mark.parametrize("length", [1, 4, 6, 8])
def test_shared_pages_change_no_sample(length, decode_path):
    """Bit for bit: three samples that share pages, and each alone under the uid that gives it the same noise."""
    model, batch = llama(eos_token_id=None), prompts(length, uids=[5])
    shared = Rollout(model, sampling(batch=1), decode_path=decode_path).generate(batch, samples=3)
    for k in range(3):
        alone = Rollout(model, sampling(batch=1), decode_path=decode_path).generate(batch._replace(uids=[15 + k]))
        assert equal(alone._replace(uids=shared.uids[:1]), shared.take([k])._replace(uids=shared.uids[:1]))
    assert len({tuple(row) for row in shared.response_ids()}) == 3


@small_pages
def test_samples_share_the_pages_of_their_prompt(decode_path, monkeypatch):
    """Nine positions are two full pages, which are shared, and a third that each sample has for itself."""
    assigned, assign_rows = {}, PagedKVCache.assign_rows

    def record(self, pages_by_slot):
        assigned.update(pages_by_slot)
        assign_rows(self, pages_by_slot)

    monkeypatch.setattr(PagedKVCache, "assign_rows", record)
    Rollout(llama(), sampling(max_new_tokens=4), decode_path=decode_path).generate(prompts(9), samples=5)
    assert len(assigned) == 5 and all(len(pages) == 3 for pages in assigned.values())
    assert len({tuple(pages[:2]) for pages in assigned.values()}) == 1
    assert len({page for pages in assigned.values() for page in pages}) == 2 + 5


@small_pages
def test_cache_mb_changes_only_how_many_responses_run(decode_path):
    """A page takes 32 KiB, so that 1 MiB holds 32; all 15 rows at a time need more."""
    make = build("Llama", hidden_size=512, num_key_value_heads=4, eos_token_id=None)
    model, batch = Model(make()), prompts(2, 9, 5, 16, 3)
    free, limited = recorded(model, decode_path), recorded(model, decode_path, cache_mb=1)
    found = [rollout.generate(batch, samples=3).response_ids() for rollout, _ in (free, limited)]
    assert found[0] == found[1]
    running = [max(len(slots) for _, slots in calls if len(set(slots)) == len(slots)) for _, calls in (free, limited)]
    assert running[0] == 15 and 4 <= running[1] < 15


def caches() -> list[PagedKVCache]:
    """Return all caches in memory."""
    return [x for x in gc.get_objects() if type(x) is PagedKVCache]


def test_memory_is_freed_after_a_call_unless_the_cache_is_kept(decode_path):
    model, batch = llama(), prompts(3, 5)
    gc.collect()
    before = len(caches())
    rollout = Rollout(model, sampling(), decode_path=decode_path)
    first = rollout.generate(batch)
    assert len(caches()) == before
    keeping = Rollout(model, sampling(), decode_path=decode_path, keep_cache=True)
    assert equal(keeping.generate(batch), first)
    kept = keeping._cache
    assert len(caches()) == before + 1 and kept.num_free_pages == kept.num_pages
    assert equal(keeping.generate(batch), first) and keeping._cache is kept
    keeping.generate(prompts(30, 31, 32), samples=4)
    assert keeping._cache is not kept and keeping._cache.num_free_pages == keeping._cache.num_pages
    del kept
    assert len(caches()) == before + 1
    limited = Rollout(model, sampling(cache_mb=1), decode_path=decode_path, keep_cache=True)
    many = prompts(*[30] * 40)
    found = limited.generate(many, samples=3)
    kept = limited._cache
    assert equal(limited.generate(many, samples=3), found) and limited._cache is kept and kept.num_pages == 128


@nan_pages
@pytest.mark.parametrize("samples", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 6, 8])
@pytest.mark.exhaustive(12)
def test_the_pages_of_one_row_suffice(length, samples, decode_path, monkeypatch):
    """The fewest pages that `create_cache` accepts, whether or not the prompt fills its last page."""
    model, batch = llama(eos_token_id=None), prompts(3, length, 2)
    expected = Rollout(model, sampling(), decode_path=decode_path).generate(batch, samples=samples)
    pages = -(-(max(length, 3) + 11) // PAGE_SIZE["cpu"])
    monkeypatch.setattr("rlhf_fast.rollout.rollout.pages_needed", lambda *_: pages)
    found = Rollout(model, sampling(), decode_path=decode_path).generate(batch, samples=samples)
    assert found.response_ids() == expected.response_ids()
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=0 if decode_path == "fused" else 2e-5)


def test_cache_mb_for_one_row_suffices(decode_path):
    """4 pages of 256 KiB: a row of 119 positions needs them all, and the second sample reuses the first's last page."""
    shape = {"hidden_size": 512, "num_key_value_heads": 4, "max_position_embeddings": 128, "eos_token_id": None}
    model, batch = Model(build("Llama", **shape)()), prompts(40)
    found = Rollout(model, sampling(max_new_tokens=80, cache_mb=1), decode_path=decode_path).generate(batch, samples=2)
    assert found.mask.sum(1).tolist() == [80, 80]


@small_pages
def test_a_scheduler_that_cannot_go_on_raises(decode_path):
    rollout, batch = Rollout(llama(), sampling(), decode_path=decode_path, keep_cache=True), prompts(9)
    rollout.generate(batch)
    rollout._cache.allocate(1)
    with pytest.raises(RuntimeError, match="no response runs, and the next of 1 does not fit in 4 free of 5 pages"):
        rollout.generate(batch)


@small_pages
def test_a_kept_cache_whose_block_table_is_too_narrow_is_replaced(decode_path):
    """It has enough slots and pages for a longer row, but not enough pages in a row of its block table."""
    model, long = llama(eos_token_id=None), prompts(40)
    rollout = Rollout(model, sampling(), decode_path=decode_path, keep_cache=True)
    rollout.generate(prompts(*[3] * 9))
    kept = rollout._cache
    assert kept.num_slots >= 1 and kept.num_pages > kept.pages_for(51) > kept.max_pages_per_slot
    assert equal(rollout.generate(long), Rollout(model, sampling(), decode_path=decode_path).generate(long))
    assert rollout._cache is not kept and rollout._cache.max_pages_per_slot == 13
