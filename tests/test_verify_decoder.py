"""The comparison of a decoder with its model: what it refuses and allows in half precision, and that it runs once."""

import pytest
import torch
from architectures import build, sampling
from test_fused import MODELS
from test_rollout import SMOLLM2

from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.model.model import Model
from rlhf_fast.rollout import verify
from rlhf_fast.rollout.attention import AttentionDecoder
from rlhf_fast.rollout.decoder import TokenBatch
from rlhf_fast.rollout.fused import FusedDecoder
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.rollout.verify import _compare
from rlhf_fast.scoring import Scorer

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16]


class WrongDecoder:
    """A decoder with one fault in a call's batch, or in what another decoder makes of it."""

    def __init__(self, decoder, fault: str):
        self.decoder, self.fault, self.calls = decoder, fault, 0
        self.name, self.shapes, self.dtype = decoder.name, decoder.shapes, decoder.dtype

    def hidden(self, cache, batch: TokenBatch):
        self.calls += 1
        decodes = len(batch.tokens) == 3
        if self.fault == "positions are one too large" and not decodes:
            batch = batch._replace(positions=batch.positions + 1)
        elif self.fault == "a decoded token has the position of the one before" and decodes:
            batch = batch._replace(positions=batch.positions - 1)
        elif self.fault == "two sequences are exchanged when decoding" and decodes:
            batch = batch._replace(slots=batch.slots.flip(0))
        elif self.fault == "a sequence of one token reads another's page":
            batch = batch._replace(block_table=batch.block_table[[0, 0, 2]].contiguous())
        found = self.decoder.hidden(cache, batch)
        if self.fault == "the last decoded tokens are wrong" and decodes:
            found = found.flip(1)
        elif self.fault == "NaN in one token":
            found[0] = torch.nan
        elif self.fault == "all are 20 % too large":
            found = 1.2 * found
        return found


FAULTS = [
    "positions are one too large",
    "a decoded token has the position of the one before",
    "two sequences are exchanged when decoding",
    "a sequence of one token reads another's page",
    "the last decoded tokens are wrong",
    "NaN in one token",
    "all are 20 % too large",
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", [None, *FAULTS])
@pytest.mark.parametrize("name", ["llama 4/4 heads of 64", "llama 8/2 heads of 128"])
def test_a_wrong_decoder_is_refused(name, fault, dtype):
    model = Model(MODELS[name]().to(dtype))
    decoder = FusedDecoder.make(model)
    with decoder.session(), torch.no_grad():
        wrong = WrongDecoder(decoder, fault or "")
        if fault is None:
            verify._run_and_compare(model, wrong)
        else:
            with pytest.raises(Unsupported, match="hidden states over our cache are off by"):
                verify._run_and_compare(model, wrong)
        assert wrong.calls


def errors_of(*rows: list[float]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Hidden states of norm 1 that are off by the given shares of it."""
    width = max(map(len, rows))
    expected = [torch.tensor([[1.0, 0.0]]).repeat(len(row), 1) for row in rows]
    found = torch.zeros(len(rows), width, 2)
    for i, row in enumerate(rows):
        found[i, : len(row)] = expected[i] + torch.tensor([[0.0, share] for share in row])
    return found, expected


def test_in_half_precision_few_tokens_may_be_far_off():
    """As of a module whose own hidden states of one token differ from a float32 copy's by more than their size."""
    small = [0.02] * 12
    found, expected = errors_of([0.03, 1.2, *small[:10]], small[:4], small[:9])
    _compare(found, expected, torch.bfloat16)
    with pytest.raises(Unsupported):
        _compare(found, expected, torch.float32)
    found, expected = errors_of([0.03, 1.2, 0.5, *small[:9]], small[:4], [0.4, *small[:8]])
    with pytest.raises(Unsupported, match=r"off by 0\.4 of their size"):
        _compare(found, expected, torch.bfloat16)
    found, expected = errors_of(small, [0.2] * 4, small[:9])  # a whole row is not rounding
    with pytest.raises(Unsupported):
        _compare(found, expected, torch.bfloat16)


@pytest.mark.parametrize("make", [FusedDecoder.make, AttentionDecoder.make])
def test_a_model_is_compared_once(make, monkeypatch):
    runs = []
    run = verify._run_and_compare
    monkeypatch.setattr(verify, "_run_and_compare", lambda *args: (runs.append(1), run(*args)))
    model = Model(build("Llama")())
    for _ in range(3):
        make(model)
    assert len(runs) == 1
    for _ in range(2):
        Rollout(model, sampling(), decode_path=make(model).name)
        Scorer(model, decode_path=make(model).name)
    assert len(runs) == 1
    model.module.to(torch.bfloat16)
    for _ in range(2):
        make(model)
    assert len(runs) == 2


def test_a_refusal_is_kept(monkeypatch):
    runs = []

    def refuse(*_):
        runs.append(1)
        raise Unsupported("its hidden states differ")

    monkeypatch.setattr(verify, "_run_and_compare", refuse)
    model = Model(build("Llama")())
    for _ in range(3):
        with pytest.raises(Unsupported, match="its hidden states differ"):
            AttentionDecoder.make(model)
    assert len(runs) == 1


@pytest.mark.skipif(not SMOLLM2, reason="RLHF_FAST_SMOLLM2 names no folder with SmolLM2-135M")
def test_smollm2_in_bfloat16_is_decoded_by_the_fused_path():
    model = Model.load(ModelConfig(SMOLLM2, dtype="bfloat16"))
    assert Rollout(model, sampling(max_new_tokens=4)).decode_path == "fused"
