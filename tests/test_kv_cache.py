"""Pages and the schedule over them: who holds what, what is shared, what is read, and that freed pages say nothing."""

import gc

import pytest
import torch
from architectures import build, llama, prompts, sampling

from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.rollout import kv_cache, scheduler
from rlhf_fast.rollout.decoder import Packed
from rlhf_fast.rollout.kv_cache import MIB, PAGE, Arena, KVShape, Overflow, allocate
from rlhf_fast.rollout.rollout import Rollout

PATHS = ["fused", "attention"]
"""Those that decode over an Arena."""
pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SHAPES = [KVShape(2, 8, 8), KVShape(3, 5, 7), KVShape(1, 1, 1)]


@pytest.fixture(params=PATHS)
def path(request):
    return request.param


@pytest.fixture
def small_pages(monkeypatch):
    """Pages of 4 positions."""
    monkeypatch.setitem(PAGE, "cpu", 4)


@pytest.fixture
def nan_pages(monkeypatch):
    """Pages that nobody holds are NaN."""
    drop, init = Arena.drop, Arena.__init__

    def poisoned_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.memory.fill_(torch.nan)

    def poisoned_drop(self, pages):
        drop(self, pages)
        for index in pages:
            if not self._holders[index]:
                for block in (*self.k, *self.v):
                    block[index] = torch.nan

    monkeypatch.setattr(Arena, "__init__", poisoned_init)
    monkeypatch.setattr(Arena, "drop", poisoned_drop)


class Spy:
    """A decoder that notes the calls of another."""

    def __init__(self, decoder):
        self.decoder, self.calls = decoder, []
        self.name, self.shapes, self.dtype = decoder.name, decoder.shapes, decoder.dtype

    def ready(self):
        return self.decoder.ready()

    def hidden(self, arena: Arena, packed: Packed):
        self.calls.append((packed.positions.tolist(), packed.slots.tolist()))
        return self.decoder.hidden(arena, packed)


def spied(model: Model, path: str, **settings) -> tuple[Rollout, list]:
    rollout = Rollout(model, sampling(**settings), path=path)
    rollout._decoder = Spy(rollout._decide())
    return rollout, rollout._decoder.calls


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_views_of_one_allocation():
    found = Arena(SHAPES, torch.bfloat16, CPU, pages=5, slots=2, width=3, page=4)
    start, end = found.memory.data_ptr(), found.memory.data_ptr() + 2 * found.memory.numel()
    spans = []
    for layer, (heads, k_dim, v_dim) in enumerate(SHAPES):
        for view, dim in ((found.k[layer], k_dim), (found.v[layer], v_dim)):
            assert view.shape == (5, heads, 4, dim) and view.is_contiguous() and (view.data_ptr() - start) % 128 == 0
            spans.append((view.data_ptr(), view.data_ptr() + 2 * view.numel()))
    assert spans == sorted(spans) and spans[-1][1] <= end
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    assert found.block_table.shape == (2, 3) and found.block_table.dtype == torch.int32


def test_pages_are_counted():
    found = Arena(SHAPES, torch.float32, CPU, pages=5, slots=2, width=3, page=4)
    assert [found.need(n) for n in (0, 1, 3, 4, 5, 8)] == [0, 1, 1, 1, 2, 2]
    one, other = found.take(3), found.take(1)
    assert len({*one, *other}) == 4 and found.free == 1
    with pytest.raises(Overflow, match="2 pages asked for, 1 of 5 are free"):
        found.take(2)
    assert found.free == 1
    found.hold(one[:2])
    found.drop(one)
    assert found.free == 2 and found.take(1) == [one[2]]
    found.drop(one[:2])
    assert found.free == 3
    with pytest.raises(RuntimeError, match="is free already"):
        found.drop(one[:1])
    with pytest.raises(RuntimeError, match="is free and cannot be shared"):
        found.hold(one[:1])


def test_pages_are_copied_in_every_layer_and_seats_are_whole():
    found = Arena(SHAPES, torch.float32, CPU, pages=5, slots=2, width=3, page=4)
    found.memory.normal_()
    before = [block.clone() for block in (*found.k, *found.v)]
    found.copy([0, 3], [1, 4])
    for block, old in zip((*found.k, *found.v), before, strict=True):
        assert torch.equal(block, old[[0, 0, 2, 3, 3]])
    found.copy([], [])
    found.seat(1, [4, 2, 3])
    found.seat(1, [1])
    assert found.block_table.tolist() == [[0, 0, 0], [1, 0, 0]]


def test_memory_that_is_not_there(monkeypatch):
    shapes = [KVShape(1, 128, 128)]  # a page of 4 float32 positions: 4 KiB
    found = allocate(shapes, torch.float32, CPU, [1024, 8], pages=2000, slots=2, cache_mb=2, page=4)
    assert found.pages == 512 and found.width == 256
    with pytest.raises(UserError, match="cache_mb: 1 MiB hold 0 rows: one of 1028 tokens needs 2 MiB"):
        allocate(shapes, torch.float32, CPU, [1028], pages=257, slots=1, cache_mb=1, page=4)
    monkeypatch.setattr(kv_cache, "_room", lambda device: 3 * MIB + 5)
    sentence = "4 rows of up to 1024 tokens need 4 MiB of keys and values, and cpu has 3 MiB left: 3 rows fit; lower"
    with pytest.raises(UserError, match=sentence):
        allocate(shapes, torch.float32, CPU, [1024] * 9, pages=1024, slots=4, page=4)
    monkeypatch.setattr(kv_cache, "_room", lambda device: None)
    with pytest.raises(UserError, match="0 rows fit"):
        allocate(shapes, torch.float32, CPU, [2**50], pages=2**48, slots=4, page=4)


def test_the_room_is_looked_up():
    assert kv_cache._room(CPU) is None or kv_cache._room(CPU) > 2**20


@pytest.mark.parametrize("length", [3, 4, 5, 7, 8, 9])
def test_page_boundaries(length, path, small_pages, nan_pages):
    """Prompts that end a page, and one to each side; responses that end a page."""
    model, batch = llama(eos_token_id=None), prompts(length, 1)
    wanted = Rollout(model, sampling(temperature=0.0), path="transformers").generate(batch, samples=2)
    for limit in range(1, 7):
        found = Rollout(model, sampling(temperature=0.0, max_new_tokens=limit), path=path).generate(batch, samples=2)
        assert found.response_ids() == [row[:limit] for row in wanted.response_ids()]
        torch.testing.assert_close(found.raw_logprobs, wanted.raw_logprobs[:, :limit], rtol=0, atol=2e-5)


def test_freed_pages_never_leak(path, small_pages, request):
    """Two slots, many rows: every page is reused several times, and what it held before is NaN."""
    model, batch = llama(), prompts(2, 9, 5, 3, 16, 11, 4)
    rollouts = [Rollout(model, sampling(batch=2), seed=3, path=path) for _ in range(2)]
    clean = rollouts[0].generate(batch, samples=3)
    request.getfixturevalue("nan_pages")
    assert same(rollouts[1].generate(batch, samples=3), clean)


def test_nothing_is_computed_twice(path, small_pages):
    """A prompt is read once however many samples it gets; a response's last token and finished rows never are."""
    model, batch = llama(), prompts(2, 9, 5, 3, 16, 11, 4)
    batch.tokens[3] = batch.tokens[1]  # under another uid: read once all the same
    for size in (1, 2, 5, 64):
        rollout, calls = spied(model, path, batch=size)
        found = rollout.generate(batch, samples=4)
        read = sum(len(tokens) for i, tokens in enumerate(batch.tokens) if i != 3)
        assert sum(len(positions) for positions, _ in calls) == read + int(found.mask.sum()) - len(found.lengths)
        assert max(len(set(slots)) for _, slots in calls) <= size
        assert calls[0][0][:16] == list(range(16))  # the longest prompt first


def test_long_prompts_are_read_in_parts(path, small_pages, monkeypatch):
    model, batch = llama(), prompts(2, 9, 5, 3, 16)
    whole = Rollout(model, sampling(), path=path).generate(batch, samples=2)
    monkeypatch.setattr(scheduler, "PREFILL", 7)
    rollout, calls = spied(model, path)
    found = rollout.generate(batch, samples=2)
    assert [len(positions) for positions, _ in calls[:5]] == [7] * 5
    assert found.response_ids() == whole.response_ids()
    torch.testing.assert_close(found.logprobs, whole.logprobs, rtol=0, atol=0 if path == "fused" else 2e-5)


@pytest.mark.parametrize("length", [1, 4, 6, 8])
def test_one_sample_equals_no_sharing(length, path, small_pages, nan_pages):
    """Bit for bit: three samples that share pages, and each alone under the uid that gives it the same noise."""
    model, batch = llama(eos_token_id=None), prompts(length, uids=[5])
    shared = Rollout(model, sampling(batch=1), path=path).generate(batch, samples=3)
    for k in range(3):
        alone = Rollout(model, sampling(batch=1), path=path).generate(batch._replace(ids=[15 + k]))
        assert same(alone[:-1], shared.take([k])[:-1])
    assert len({tuple(row) for row in shared.response_ids()}) == 3


def test_samples_share_the_pages_of_their_prompt(path, small_pages, monkeypatch):
    """Nine positions are two full pages, shared, and a last one that each sample has for itself."""
    seats, seat = {}, Arena.seat
    monkeypatch.setattr(Arena, "seat", lambda self, slot, pages: (seats.update({slot: pages}), seat(self, slot, pages)))
    Rollout(llama(), sampling(max_new_tokens=4), path=path).generate(prompts(9), samples=5)
    assert len(seats) == 5 and all(len(pages) == 3 for pages in seats.values())
    assert len({tuple(pages[:2]) for pages in seats.values()}) == 1
    assert len({page for pages in seats.values() for page in pages}) == 2 + 5


def test_a_budget_changes_nothing_but_how_many_run(path, small_pages):
    """A page takes 32 KiB, so that 32 may be had; all 15 rows at a time need more."""
    make = build("Llama", hidden_size=512, num_key_value_heads=4, eos_token_id=None)
    model, batch = Model(make()), prompts(2, 9, 5, 16, 3)
    free, limited = spied(model, path), spied(model, path, cache_mb=1)
    found = [rollout.generate(batch, samples=3).response_ids() for rollout, _ in (free, limited)]
    assert found[0] == found[1]
    most = [max(len(slots) for _, slots in calls if len(set(slots)) == len(slots)) for _, calls in (free, limited)]
    assert most[0] == 15 and 4 <= most[1] < 15


def arenas() -> list[Arena]:
    return [thing for thing in gc.get_objects() if type(thing) is Arena]


def test_memory_is_given_back(path):
    model, batch = llama(), prompts(3, 5)
    gc.collect()
    before = len(arenas())
    rollout = Rollout(model, sampling(), path=path)
    first = rollout.generate(batch)
    assert len(arenas()) == before
    keeping = Rollout(model, sampling(), path=path, keep_arena=True)
    assert same(keeping.generate(batch), first)
    kept = keeping._arena
    assert len(arenas()) == before + 1 and kept.free == kept.pages
    assert same(keeping.generate(batch), first) and keeping._arena is kept
    keeping.generate(prompts(30, 31, 32), samples=4)
    assert keeping._arena is not kept and keeping._arena.free == keeping._arena.pages
    del kept
    assert len(arenas()) == before + 1
    limited = Rollout(model, sampling(cache_mb=1), path=path, keep_arena=True)
    many = prompts(*[30] * 40)
    found = limited.generate(many, samples=3)
    kept = limited._arena
    assert same(limited.generate(many, samples=3), found) and limited._arena is kept and kept.pages == 128


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 6, 8])
def test_the_pages_of_one_row_suffice(length, samples, path, small_pages, nan_pages, monkeypatch):
    """The least that `allocate` accepts, whether or not the prompt ends its last page, whatever the samples."""
    model, batch = llama(eos_token_id=None), prompts(3, length, 2)
    wanted = Rollout(model, sampling(), path=path).generate(batch, samples=samples)
    monkeypatch.setattr(
        "rlhf_fast.rollout.rollout.most_pages", lambda rows, cfg, page: -(-(max(length, 3) + 11) // page)
    )
    found = Rollout(model, sampling(), path=path).generate(batch, samples=samples)
    assert found.response_ids() == wanted.response_ids()
    torch.testing.assert_close(found.logprobs, wanted.logprobs, rtol=0, atol=0 if path == "fused" else 2e-5)


def test_a_budget_of_one_row_suffices(path):
    """4 pages of 256 KiB: a row of 119 positions needs them all, and the second sample finds the first's last page."""
    shape = {"hidden_size": 512, "num_key_value_heads": 4, "max_position_embeddings": 128, "eos_token_id": None}
    model, batch = Model(build("Llama", **shape)()), prompts(40)
    found = Rollout(model, sampling(max_new_tokens=80, cache_mb=1), path=path).generate(batch, samples=2)
    assert found.mask.sum(1).tolist() == [80, 80]


def test_a_schedule_that_cannot_go_on_says_so(path, small_pages):
    rollout, batch = Rollout(llama(), sampling(), path=path, keep_arena=True), prompts(9)
    rollout.generate(batch)
    rollout._arena.take(1)
    with pytest.raises(RuntimeError, match="no response runs, and the next of 1 has no room in 4 free of 5 pages"):
        rollout.generate(batch)


def test_a_kept_arena_must_be_wide_enough(path, small_pages):
    """Slots and pages enough for a longer row than its block table has room for."""
    model, long = llama(eos_token_id=None), prompts(40)
    rollout = Rollout(model, sampling(), path=path, keep_arena=True)
    rollout.generate(prompts(*[3] * 9))
    kept = rollout._arena
    assert kept.slots >= 1 and kept.pages > kept.need(51) > kept.width
    assert same(rollout.generate(long), Rollout(model, sampling(), path=path).generate(long))
    assert rollout._arena is not kept and rollout._arena.width == 13
