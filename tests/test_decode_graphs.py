"""The decode step as CUDA graphs gives the responses of the eager step, bit for bit.

Without a GPU a recorder that runs the step again stands for the graph; it fails where a step depends on anything but
the static tensors that a replay would read. csrc/cuda's own rope_store, run on the CPU, then writes the cache.
"""

import logging
import os
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from architectures import SERVED, build, prompts, sampling
from torch.utils._pytree import tree_map_only

from rlhf_fast import graph_capture, ops
from rlhf_fast.batches import STOP
from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.errors import UserError
from rlhf_fast.kernels import rope_store
from rlhf_fast.model.model import Model
from rlhf_fast.rollout import cuda_graphs, fused, op_step
from rlhf_fast.rollout.cuda_graphs import DecodeGraphs, StaticStep, bucket_size
from rlhf_fast.rollout.input_batch import InputBatch
from rlhf_fast.rollout.kv_cache import KVShape, PagedKVCache
from rlhf_fast.rollout.op_step import OpStep
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.rollout.sampler import Sampler
from rlhf_fast.rollout.weights import RopeTable, read_weights

FAMILIES = ["llama", "qwen3", "gpt2", "gpt_neox", "mistral, sliding window"]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif("simt" not in ops.rope_store.backends, reason="no simt")),
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
pytestmark = pytest.mark.usefixtures("one_thread")


class RunAgain:
    """A recorder that keeps the function, and the size of its result, as a graph keeps its launches."""

    def __init__(self):
        self.captures = 0
        self.replays = 0

    def warm_up(self, function):
        return function()

    def capture(self, function):
        self.captures += 1
        result = None

        def replay():
            nonlocal result
            self.replays += 1
            fresh = function()
            result = fresh if result is None else result.copy_(fresh)
            return result

        return replay


def linear_by_rows(linear, x):
    """Multiply one row at a time: a row's bits do not depend on the padding."""
    return torch.stack([ORIGINAL_LINEAR(linear, row[None])[0] for row in x])


ORIGINAL_LINEAR = op_step._linear


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Return the device. On a CPU the fused path runs op by op, as on a GPU, with a recorder of its own."""
    monkeypatch.setattr(op_step, "_linear", linear_by_rows)
    if request.param == "cpu":
        monkeypatch.setattr(fused, "find_kernels", lambda _: None)
        monkeypatch.setattr(cuda_graphs, "recorder_for", lambda _: RunAgain())
        monkeypatch.setattr(rope_store, "_check_slot_mapping", lambda *_: None)  # it refuses padding on a CPU
        monkeypatch.setattr(ops, "rope_store", ops.rope_store.backend("simt"))
    return request.param


@pytest.fixture
def made(monkeypatch):
    """Return the list of the DecodeGraphs that rollouts make."""
    found, init = [], DecodeGraphs.__init__

    def record(self, *args):
        init(self, *args)
        found.append(self)

    monkeypatch.setattr(DecodeGraphs, "__init__", record)
    return found


def make_model(name: str, device: str, **changes) -> Model:
    module = SERVED[name]() if not changes else build("Llama", **changes)()
    return Model(module.to(device))


def same(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if isinstance(a, torch.Tensor))


def rollouts(model, seed=3, **settings) -> tuple[Rollout, Rollout]:
    """Return one with graphs and one without."""
    cfg = sampling(**settings)
    return tuple(Rollout(model, cfg, seed, keep_cache=on, decode_path="fused", cuda_graphs=on) for on in (True, False))


def test_buckets():
    sizes = [bucket_size(n) for n in (1, 2, 3, 9, 64, 65, 97, 129, 193, 256, 257, 321)]
    assert sizes == [1, 2, 4, 16, 64, 96, 128, 192, 256, 256, 320, 384]


@pytest.mark.parametrize("name", FAMILIES)
def test_responses_are_those_of_the_eager_step(name, device, made):
    """Rows leave one by one, so batches are padded, and to several buckets."""
    model, batch = make_model(name, device), prompts(2, 9, 5, 3, 6, 11, 4)
    model.module.generation_config.eos_token_id = list(range(2, 7))
    graphed, eager = rollouts(model, max_new_tokens=40)
    found, expected = graphed.generate(batch, samples=3), eager.generate(batch, samples=3)
    assert len(set(expected.lengths.tolist())) > 5
    assert same(found, expected)
    assert len(made) == 1 and made[0].num_graphs > 1 and not made[0].failed


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"min_p": 0.05, "temperature": 1.3},
        {"batch": 3},  # rows are admitted while others run
        {"batch": 5, "min_new_tokens": 4},  # end tokens are banned in some rows of a step
        {"min_new_tokens": 12},
        {"batch": 1},
    ],
    ids=str,
)
def test_settings(settings, device, made):
    model, batch = make_model("llama", device), prompts(2, 9, 5, 3, 6, 11, 4)
    graphed, eager = rollouts(model, **settings)
    for step in (0, 1):
        assert same(graphed.generate(batch, 2, step), eager.generate(batch, 2, step))
    assert len(made) == 1 and made[0].num_graphs


@pytest.mark.parametrize("min_new_tokens", [0, 4])
def test_stop_texts(min_new_tokens, device, made, tmp_path):
    """The host looks for them, and the rows that they end leave the batch."""
    model, batch = Model.load(ModelConfig(toy.model(tmp_path))), prompts(2, 9, 5, 3)
    model.module.to(device)
    batch = batch._replace(tokens=[[token % 6 + 2 for token in tokens] for tokens in batch.tokens])
    graphed, eager = rollouts(model, stop=("a", "bc"), min_new_tokens=min_new_tokens, batch=6)
    found, expected = graphed.generate(batch, 4), eager.generate(batch, 4)
    assert same(found, expected) and (found.finish_reasons == STOP).sum() > 3 and made[0].num_graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_the_whole_batch(dtype, device, made, monkeypatch):
    """A batch as large as its bucket, which no row leaves, has the same products with graphs and without."""
    monkeypatch.setattr(op_step, "_linear", ORIGINAL_LINEAR)
    model, batch = Model(build("Llama", eos_token_id=None)().to(device, dtype)), prompts(2, 9, 5, 3)
    graphed, eager = rollouts(model)
    for step in (0, 1):
        assert same(graphed.generate(batch, 4, step), eager.generate(batch, 4, step))
    assert made[0].num_graphs == 1


def test_an_adapter_needs_new_graphs_for_each_rollout(device, made):
    """Its sums with the weights are made for one rollout, and must not stay in memory."""
    pytest.importorskip("peft")
    from rlhf_fast.config.fields import LoraConfig
    from rlhf_fast.model import lora

    module = lora.attach(build("Llama")(), LoraConfig(rank=2), "lm", 0).to(device)
    model, batch = Model(module), prompts(2, 9, 5)
    graphed, eager = rollouts(model)
    for step in (0, 1):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.01 * parameter.requires_grad)
        assert same(graphed.generate(batch, 3, step), eager.generate(batch, 3, step))
        assert graphed._graphs is None and graphed._cache is not None
    assert len(made) == 2 and made[0].num_graphs


def test_rollouts_in_sequence_replay_the_graphs_of_the_first(device, made):
    """The weights change in place, as an optimizer changes them, and the noise by the step."""
    model, batch = make_model("qwen3", device), prompts(2, 9, 5, 3)
    graphed, eager = rollouts(model)
    responses = []
    for step in range(3):
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.mul_(1 + 0.02 * step)
        responses.append(graphed.generate(batch, 4, step))
        assert same(responses[-1], eager.generate(batch, 4, step))
    assert len(made) == 1
    assert not same(responses[0][:1], responses[1][:1])


def test_a_graph_without_a_ban_does_not_serve_rows_with_one(device, made):
    """Buckets that the first rollout shrinks to, after min_new_tokens, are those in which the others begin."""
    model, batch = make_model("llama", device), prompts(2, 9, 5, 3)
    model.module.generation_config.eos_token_id = list(range(2, 12))
    graphed, eager = rollouts(model, max_new_tokens=40, min_new_tokens=4)
    for samples in (8, 4, 2, 1):
        assert same(graphed.generate(batch, samples), eager.generate(batch, samples))
    assert {bans for _, bans in made[0]._replays} == {False, True}


def test_new_memory_of_a_weight_or_the_cache_needs_new_graphs(device, made):
    model, batch = make_model("llama", device), prompts(2, 9)
    graphed, eager = rollouts(model)
    graphed.generate(batch, 2)
    weight = model.decoder.layers[0].mlp.up_proj.weight
    weight.data = weight.data.clone() * 1.1
    assert same(graphed.generate(batch, 2), eager.generate(batch, 2)) and len(made) == 2
    larger = prompts(20, 30, 9)
    assert same(graphed.generate(larger, 2), eager.generate(larger, 2)) and len(made) == 3
    assert same(graphed.generate(batch, 2), eager.generate(batch, 2)) and len(made) == 3


def test_a_rollout_that_keeps_no_cache_keeps_no_graphs(device, made):
    model, batch = make_model("llama", device), prompts(2, 9)
    rollout = Rollout(model, sampling(), decode_path="fused")
    first = rollout.generate(batch)
    assert rollout._graphs is None and same(rollout.generate(batch), first) and len(made) == 2


def test_padding_leaves_the_cache_alone(device):
    """Rows of padding write nothing, and stay padding."""
    model, batch = make_model("llama", device, eos_token_id=None), prompts(2, 9, 5)
    graphed, _ = rollouts(model)
    graphed.generate(batch)
    cache, graphs = graphed._cache, graphed._graphs
    cache.memory.fill_(7)
    empty, empty32 = np.zeros(0, np.int64), np.zeros(0, np.int32)
    graphs.input_batch.load(1, empty, empty, empty, empty32, empty32)
    with torch.no_grad():
        for _ in range(3):
            graphs(3, False)
    assert (cache.memory == 7).all()
    assert (graphs.input_batch.first(4).positions == -1).all()


def test_a_capture_that_fails_runs_eagerly_with_one_warning(device, made, monkeypatch, caplog):
    class Refuses(RunAgain):
        def capture(self, function):
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "recorder_for", lambda _: Refuses())
    monkeypatch.setattr(graph_capture, "_warned", set())
    model, batch = make_model("llama", device), prompts(2, 9, 5, 3)
    graphed, eager = rollouts(model)
    with caplog.at_level(logging.WARNING, "rlhf_fast"):
        assert same(graphed.generate(batch, 3), eager.generate(batch, 3))
        graphed.generate(batch, 3)
    assert made[0].failed and sum("cannot be captured" in record.message for record in caplog.records) == 1
    monkeypatch.setenv("RLHF_FAST_STRICT", "1")
    with pytest.raises(UserError, match=r"RLHF_FAST_STRICT=1 and .* cannot be captured as a CUDA graph"):
        rollouts(model)[0].generate(batch, 3)


@pytest.mark.parametrize("step", ["capture_begin", "function", "capture_end"])
@pytest.mark.parametrize("error", [RuntimeError, TypeError])
def test_a_capture_that_fails_names_the_cause(error, step, monkeypatch):
    """The end of a capture that has failed is an error of its own. A capture in another pool follows, at whose end
    torch's generator may be used again."""
    graphs = []

    class Graph:
        def __init__(self):
            self.calls = []
            graphs.append(self)

        def capture_begin(self, *, pool, **_):
            self.calls.append(pool)
            if step == "capture_begin" and len(graphs) == 1:
                raise error("the cause")

        def capture_end(self):
            self.calls.append("end")
            if len(graphs) == 1 and step == "function":
                raise RuntimeError("operation failed due to a previous error during capture")
            if len(graphs) == 1 and step == "capture_end":
                raise error("the cause")

    def function():
        if step == "function":
            raise error("the cause")

    pools = iter(range(9))
    stream = SimpleNamespace(wait_stream=lambda _: None)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    for name, value in (("CUDAGraph", Graph), ("Stream", lambda _: stream), ("graph_pool_handle", lambda: next(pools))):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    with pytest.raises(error, match="the cause"):
        graph_capture.CudaRecorder(torch.device("cuda")).capture(function)
    assert [graph.calls for graph in graphs] == [[0] if step == "capture_begin" else [0, "end"], [1, "end"]]


def test_they_can_be_turned_off(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(graph_capture, "CudaRecorder", lambda device: device)
    assert graph_capture.recorder_for(cpu) is None and graph_capture.recorder_for(gpu) is gpu
    monkeypatch.setitem(os.environ, "RLHF_FAST_CUDA_GRAPHS", "0")
    assert graph_capture.recorder_for(gpu) is None


def test_the_input_batch_pads_and_advances():
    batch = InputBatch(4, torch.device("cpu"))
    rows = [np.array(x) for x in ([5, 6, 7], [-1, 2**62, 0], [0, 1, 2], [3, 4, 5], [2, 0, 1])]
    for n in (3, 2):
        loaded = batch.load(2**62 + 1, *(x[:n] for x in rows))
        everything = batch.first(4)
        assert loaded.key.item() == 2**62 + 1
        assert [field.tolist() for field in loaded[1:]] == [x[:n].tolist() for x in rows]
        everything.advance(torch.tensor([9, 8, 7, 6]))
        assert everything.tokens.tolist() == [9, 8, 7, 6]
        assert everything.num_sampled.tolist()[:n] == [1, 2, 3][:n]
        assert everything.positions.tolist() == [4, 5, 6][:n] + [-1] * (4 - n)


def test_the_input_batch_waits_for_copies_on_its_own_device(monkeypatch):
    """The model may be on another GPU than torch's current device, whose stream says nothing about the copy."""
    batch = InputBatch(4, torch.device("cpu"))
    recorded = []
    batch._copied = SimpleNamespace(synchronize=lambda: None, record=lambda *streams: recorded.extend(streams))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("stream", device))
    empty, empty32 = np.zeros(0, np.int64), np.zeros(0, np.int32)
    batch.load(1, empty, empty, empty, empty32, empty32)
    assert recorded == [("stream", torch.device("cpu"))]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9, "temperature": 0.7, "min_new_tokens": 3}], ids=str)
@torch.no_grad()
def test_a_step_does_not_wait_for_its_device(name, settings):
    """As a capture does, the meta device raises where a number is read on the host, or where tensors meet one on the
    CPU."""
    model = Model(SERVED[name]())
    weights, sampler = read_weights(model), Sampler(model, sampling(**settings), [2, 3], 5)
    shape = KVShape(weights.num_kv_heads, weights.head_dim, weights.head_dim)
    cpu_cache, cache = (
        PagedKVCache([shape] * 2, torch.float32, torch.device(device), 9, 4, 3) for device in ("cpu", "meta")
    )
    static = StaticStep(OpStep(weights, cpu_cache, None), sampler)

    def move(x: torch.Tensor) -> torch.Tensor:
        return x.to("meta")

    angles = torch.empty(96, weights.head_dim // 2, device="meta")
    rope = None if weights.rotary is None else RopeTable(angles, angles)
    static.step = OpStep(tree_map_only(torch.Tensor, move, weights), cache, rope)
    static.input_batch._all = tree_map_only(torch.Tensor, move, static.input_batch._all)
    sampler.banned = move(sampler.banned)
    head = move(model.head_weight)
    sampler.model = SimpleNamespace(
        head_weight=head, head_bias=None, softcap=0.0, exact=False, for_head=lambda hidden: 2.0 * hidden
    )
    packed = static.run(4, bans=bool(settings))
    assert packed.device.type == "meta" and packed.shape == (4 * cuda_graphs.SAMPLE_BYTES,)
