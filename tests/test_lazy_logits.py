"""Every way to read logits gives under lazy_head what it gives without, value and gradient: where an op answers, where
logits are made, and where they are written."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from architectures import SMALL, build
from lazy_pair import assert_close, compare, grads_of
from torch import nn
from torch.nn import functional as F

from rlhf_fast.integrations import lazy_head, lazy_scales, status
from rlhf_fast.integrations.lazy_logits import LazyLogits

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {**SMALL, "vocab_size": 97, "initializer_range": 0.15}
V = 97
HEADS = {
    "plain": build("Llama", SIZES),
    "bias": build("Phi", SIZES),
    "soft cap": build("Gemma2", SIZES, head_dim=8, final_logit_softcapping=2.0),
    "scale": build("Cohere", SIZES, logit_scale=0.3),
}


def made_by(head: str) -> nn.Module:
    return HEADS[head]().eval()


# -- as trainers write it: logits z (B, T, V) and labels y (B, T) -----------------------------------------------------


def trl_selective_log_softmax(logits, index):
    """TRL 1.12, trainer/utils.py; verl's logprobs_from_logits_v2 is the same."""
    index = index.unsqueeze(-1)
    if logits.dtype in [torch.float32, torch.float64]:
        selected = torch.gather(logits, dim=-1, index=index)
        values = torch.stack([torch.logsumexp(lg, dim=-1) for lg in logits])
        return (selected - values.unsqueeze(-1)).squeeze(-1)
    rows = [F.log_softmax(lg, dim=-1).gather(dim=-1, index=i) for lg, i in zip(logits, index, strict=True)]
    return torch.stack(rows).squeeze(-1)


def trl_entropy_from_logits(logits, chunk_size=7):
    """TRL 1.12, trainer/utils.py."""
    found = []
    for chunk in logits.reshape(-1, logits.shape[-1]).split(chunk_size, dim=0):
        logps = F.log_softmax(chunk, dim=-1)
        found.append(-(torch.exp(logps) * logps).sum(-1))
    return torch.cat(found, dim=0).reshape(logits.shape[:-1])


def verl_entropy_from_logits(logits):
    """verl 0.9, utils/torch_functional.py; TRL's PPO has the same."""
    pd = torch.nn.functional.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - torch.sum(pd * logits, dim=-1)


def verl_entropy_with_chunking(logits, chunk_size=5):
    entropy = torch.zeros(logits.shape[0], device=logits.device)
    for i in range(0, logits.shape[0], chunk_size):
        chunk = logits[i : i + chunk_size].float()
        pd = F.softmax(chunk, dim=-1)
        entropy[i : i + chunk_size] = torch.logsumexp(chunk, dim=-1) - torch.sum(pd * chunk, dim=-1)
    return entropy


def openrlhf_log_probs(logits, labels):
    """OpenRLHF 0.11, models/actor.py: a float32 copy is divided in place."""
    logits = logits.to(torch.float32)
    logits.div_(0.8)
    return trl_selective_log_softmax(logits, labels)


def picked(z, y, **options):
    return z.log_softmax(-1).gather(-1, y.unsqueeze(-1), **options).squeeze(-1)


def cut(z):
    return z[:, :-1]


T = torch.tensor
READERS = {
    # losses
    "cross_entropy": lambda z, y: F.cross_entropy(cut(z).reshape(-1, V), y.reshape(-1)),
    "cross_entropy sum": lambda z, y: F.cross_entropy(cut(z).flatten(0, 1), y.flatten(), reduction="sum"),
    "cross_entropy none": lambda z, y: F.cross_entropy(cut(z).reshape(-1, V), y.reshape(-1), reduction="none"),
    "cross_entropy keywords": lambda z, y: F.cross_entropy(input=cut(z).reshape(-1, V), target=y.reshape(-1)),
    "cross_entropy ignore 5": lambda z, y: F.cross_entropy(
        cut(z).reshape(-1, V), y.reshape(-1).where(y.reshape(-1) > 40, 5), ignore_index=5
    ),
    "cross_entropy ignore -1": lambda z, y: F.cross_entropy(
        cut(z).reshape(-1, V), y.reshape(-1).where(y.reshape(-1) > 40, -1), ignore_index=-1, reduction="none"
    ),
    "cross_entropy ignored": lambda z, y: F.cross_entropy(
        cut(z).reshape(-1, V), y.reshape(-1).where(y.reshape(-1) > 40, -100)
    ),
    "cross_entropy transposed": lambda z, y: F.cross_entropy(cut(z).transpose(1, 2), y),
    "cross_entropy permuted": lambda z, y: F.cross_entropy(cut(z).permute(0, 2, 1), y, reduction="none"),
    "cross_entropy mT": lambda z, y: F.cross_entropy(cut(z).mT, y, reduction="sum"),
    "CrossEntropyLoss": lambda z, y: nn.CrossEntropyLoss(reduction="none")(
        cut(z).float().reshape(-1, V), y.reshape(-1)
    ),
    "nll_loss": lambda z, y: F.nll_loss(F.log_softmax(cut(z).reshape(-1, V), dim=1), y.reshape(-1)),
    "NLLLoss": lambda z, y: nn.NLLLoss(reduction="sum")(nn.LogSoftmax(-1)(cut(z).reshape(-1, V)), y.reshape(-1)),
    # log-probabilities
    "gather": lambda z, y: picked(cut(z), y),
    "gather function": lambda z, y: torch.gather(F.log_softmax(cut(z), -1), 2, y[..., None]),
    "gather keywords": lambda z, y: torch.gather(
        input=torch.log_softmax(input=cut(z), dim=-1), dim=-1, index=y[..., None]
    ),
    "log_softmax in float32": lambda z, y: F.log_softmax(cut(z), dim=2, dtype=torch.float32).gather(2, y[..., None]),
    "minus gather": lambda z, y: (-cut(z).log_softmax(-1)).gather(-1, y[..., None]),
    "nll": lambda z, y: -picked(cut(z), y).mean(1),
    "three of a row": lambda z, y: cut(z).log_softmax(-1).gather(-1, T([1, 5, 2]).expand(*y.shape, 3)),
    "take_along_dim": lambda z, y: torch.take_along_dim(cut(z).log_softmax(dim=-1), y.unsqueeze(-1), dim=2).squeeze(-1),
    "indexed": lambda z, y: cut(z).reshape(-1, V).log_softmax(-1)[torch.arange(y.numel()), y.reshape(-1)],
    "indexed in two dimensions": lambda z, y: z.log_softmax(-1)[
        T([[0], [1]]).expand(2, 4), T([[0, 3, 1, 2]]).expand(2, 4), y[:2, :4]
    ],
    "selective_log_softmax": lambda z, y: trl_selective_log_softmax(cut(z), y),
    "selective, temperature": lambda z, y: trl_selective_log_softmax(z[:, :-1, :][:, -4:, :] / 0.9, y[:, -4:]),
    "logits of tokens": lambda z, y: cut(z).gather(-1, y[..., None]),
    "logsumexp first": lambda z, y: cut(z).logsumexp(dim=-1, keepdim=True) - torch.gather(cut(z), -1, y[..., None]),
    "OpenRLHF": lambda z, y: openrlhf_log_probs(z, F.pad(y, (0, 1)))[:, :-1],
    "rolled": lambda z, y: picked(z, torch.roll(F.pad(y, (0, 1)), -1, 1))[:, :-2],
    "chunks": lambda z, y: torch.cat([picked(a, b) for a, b in zip(cut(z).chunk(2), y.chunk(2), strict=True)]),
    "chunks of positions": lambda z, y: torch.cat(
        [picked(a, b) for a, b in zip(cut(z).split(3, 1), y.split(3, 1), strict=True)], 1
    ),
    "unbind": lambda z, y: torch.stack([picked(a, b) for a, b in zip(cut(z).unbind(0), y.unbind(0), strict=True)]),
    # entropy and others
    "logsumexp": lambda z, y: torch.logsumexp(input=cut(z), dim=(-1,)),
    "z-loss": lambda z, y: cut(z).float().logsumexp(-1).square().mean(),
    "entropy of TRL": lambda z, y: trl_entropy_from_logits(cut(z)),
    "entropy of verl": lambda z, y: verl_entropy_from_logits(cut(z)),
    "entropy of verl, chunks": lambda z, y: verl_entropy_with_chunking(cut(z).reshape(-1, V)),
    "entropy, softmax * log_softmax": lambda z, y: -(z.softmax(-1) * z.log_softmax(-1)).sum(dim=-1, keepdim=True),
    "entropy, log first": lambda z, y: (-z.log_softmax(-1) * z.log_softmax(-1).exp()).sum(-1) * 2,
    "entropy, logits first": lambda z, y: z.logsumexp(-1) - (z * F.softmax(z, dim=-1)).sum(axis=-1),
    "log-probability and entropy": lambda z, y: (
        trl_selective_log_softmax(cut(z), y) + 0.3 * trl_entropy_from_logits(cut(z))
    ),
    "sum of squares of p": lambda z, y: torch.exp(torch.logsumexp(2.0 * z, dim=-1) - 2.0 * torch.logsumexp(z, dim=-1)),
    "dft": lambda z, y: -picked(cut(z), y).exp().detach() * picked(cut(z), y),
    # what is done before
    "ellipsis": lambda z, y: F.cross_entropy(z[..., :-1, :].contiguous().view(-1, z.size(-1)), y.reshape(-1)),
    "a mask": lambda z, y: F.cross_entropy(cut(z)[y > 40], y[y > 40], reduction="none"),
    "a list": lambda z, y: picked(cut(z)[[2, 0]], y[[2, 0]]),
    "an index": lambda z, y: picked(cut(z).index_select(1, T([3, 3, 0])), y.index_select(1, T([3, 3, 0]))),
    "rows of one": lambda z, y: picked(z[1, 2:5], y[1, 2:5]),
    "one position": lambda z, y: z[:, -2].logsumexp(-1) - z[:, -2, :].gather(1, y[:, -1:]).squeeze(1),
    "new dimensions": lambda z, y: z[:, None].unsqueeze(0)[..., None, :].squeeze().squeeze(0).logsumexp(-1),
    "narrow and select": lambda z, y: z.narrow(1, 2, 3).select(0, 1).logsumexp(-1),
    "views": lambda z, y: z.view(-1, V).unflatten(0, z.shape[:2]).view_as(z).reshape([-1, V]).logsumexp(-1),
    "time first": lambda z, y: z.transpose(0, 1).permute(1, 0, 2).transpose(1, 0).logsumexp(-1),
    "casts": lambda z, y: (
        z.to("cpu", torch.float32, copy=True).double().type_as(z).to(z).type(torch.float32).cpu().logsumexp(-1)
    ),
    "clone": lambda z, y: torch.clone(z).contiguous().logsumexp(-1),
    "temperature": lambda z, y: picked(cut(z) / 0.7, y),
    "a tensor as temperature": lambda z, y: picked(torch.div(cut(z), T(0.7)), y),
    "a temperature of one element": lambda z, y: picked(cut(z) / T([[0.7]]), y),
    "equal temperatures of rows": lambda z, y: picked(cut(z) / torch.full((3, 1, 1), 0.7), y),
    "scales": lambda z, y: (0.5 * z * T(3.0) / 2).mul(1.5).logsumexp(-1),
    "scale in place": lambda z, y: z.clone().mul_(1.5).div_(T(0.7)).logsumexp(-1),
    "keyword scale": lambda z, y: torch.mul(input=z, other=0.3).logsumexp(-1),
}
ROWWISE = {
    "temperature of rows": lambda z, y: picked(cut(z) / T([0.5, 1.0, 2.0])[:, None, None], y),
    "temperature of tokens": lambda z, y: picked(cut(z) * torch.linspace(0.5, 2, y.shape[1])[:, None], y),
}
CAPS = {"soft cap": lambda z, y: (3.0 * torch.tanh(z / 3.0)).logsumexp(-1), "mean": lambda z, y: z.mean(-1)}
MAKERS = {
    "max": lambda z, y: cut(z).max(-1).values,
    "topk": lambda z, y: z.topk(3, -1).values,
    "a part of the vocabulary": lambda z, y: z[:, -1, 5:9] + z[..., 7].sum(),
    "plus": lambda z, y: z[:, :-1] + 1,
    "plus itself": lambda z, y: z + z.float(),
    "minus": lambda z, y: (-z).log_softmax(-1).gather(-1, F.pad(y, (0, 1))[..., None]),
    "label smoothing": lambda z, y: F.cross_entropy(cut(z).reshape(-1, V), y.reshape(-1), label_smoothing=0.1),
    "class weights": lambda z, y: F.cross_entropy(
        cut(z).reshape(-1, V), y.reshape(-1), weight=torch.linspace(0.1, 2, V)
    ),
    "probabilities as targets": lambda z, y: F.cross_entropy(cut(z).reshape(-1, V), torch.ones(y.numel(), V) / V),
    "kl_div": lambda z, y: F.kl_div(z.log_softmax(-1), torch.full(z.shape, 1 / V), reduction="batchmean"),
    "stack": lambda z, y: torch.stack([z, z]).mean(),
    "cat": lambda z, y: torch.cat([z[:1], z[1:]]).square().mean((1, 2)),
    "second argument": lambda z, y: torch.ones(z.shape) - z,
    "where": lambda z, y: torch.where(z > 0, z, 0.1 * z),
    "softmax": lambda z, y: z.softmax(-1)[..., 3],
    "log_softmax": lambda z, y: z.log_softmax(-1).mean(-1),
    "softmax of positions": lambda z, y: z.softmax(1),
    "sum": lambda z, y: z.sum(-1) + z.sum(),
    "p times other logits": lambda z, y: (z.softmax(-1) * (z / 2)).sum(-1),
    "matmul": lambda z, y: z @ torch.ones(V, 2),
    "matmul from the left": lambda z, y: torch.ones(2, z.shape[1]) @ z,
    "einsum": lambda z, y: torch.einsum("btv,btv->bt", z, z),
    "masked_fill": lambda z, y: z.masked_fill(torch.arange(V) > 50, -1e4).logsumexp(-1),
    "view of vocabulary": lambda z, y: z.flatten(1).view(3, -1)[:, 5:100] + z.reshape(-1)[0],
    "Categorical": lambda z, y: torch.distributions.Categorical(logits=cut(z)).log_prob(y),
    "expand": lambda z, y: z[None].expand(2, -1, -1, -1).mean((1, 2)),
    "gather of fewer rows": lambda z, y: z.gather(-1, y[:, :2, None]),
    "learned temperature": lambda z, y: z.mean() + (z / z.detach().std().requires_grad_()).logsumexp(-1),
    "norm": lambda z, y: torch.linalg.vector_norm(z, dim=-1),
    "dropout": lambda z, y: F.dropout(z, 0.0),
    "set item": lambda z, y: set_item(z.clone(), (..., slice(0, 5)), -3.0).logsumexp(-1),
    "masked_fill_": lambda z, y: z.clone().masked_fill_(torch.arange(V) > 50, -1e4).logsumexp(-1),
    "add_": lambda z, y: picked(cut(z.clone().add_(torch.linspace(0, 1, V))), y),
    "plus equals": lambda z, y: plus_equals(z / 2),
    "autograd.Function": lambda z, y: Squared.apply(z[:, 1:] / 0.7),
    "two readings of autograd.Function": lambda z, y: Squared.apply(z).sum(-1) + z.logsumexp(-1),
    "Function that scales": lambda z, y: Doubled.apply(z).logsumexp(-1) + z.logsumexp(-1),
}


def set_item(z, index, value):
    z[index] = value
    return z


def plus_equals(z):
    z += torch.linspace(0, 1, V)
    return z.log_softmax(-1)[..., 4]


class Squared(torch.autograd.Function):
    """Reads the memory of its argument, as kernels do."""

    @staticmethod
    def forward(ctx, x):
        values = torch.from_numpy(x.numpy().copy())
        ctx.save_for_backward(values)
        return values**2

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Doubled(torch.autograd.Function):
    """Its forward pass is one that lazy logits note; its gradient is another than they would have."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


def reading(read, rows: int = 3, length: int = 9):
    ids = torch.randint(3, V, (rows, length))
    return lambda model: read(model(input_ids=ids).logits, ids[:, 1:])


@pytest.mark.exhaustive(1, by=("name",), slow=3)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", [*READERS, *ROWWISE, *CAPS])
def test_an_op_answers(name, head):
    read = (READERS | ROWWISE | CAPS)[name]
    found = compare(made_by(head), reading(read), out_tolerance=2e-5, grad_tolerance=5e-5)
    made = (name in ROWWISE and head in ("bias", "soft cap")) or (name in CAPS and head == "soft cap")
    assert (found.fallbacks.total() > 0) == made and (found.answered.total() > 0) != made, found


@pytest.mark.exhaustive(1, by=("name",), slow=3)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", MAKERS)
def test_logits_are_made(name, head):
    found = compare(made_by(head), reading(MAKERS[name]), out_tolerance=2e-5, grad_tolerance=5e-5)
    assert found.fallbacks.total() >= 1, found
    if "_Function" not in name and "other" not in name and "learned" not in name and "scales" not in name:
        assert found.fallbacks.total() <= 2, found


@pytest.mark.parametrize(
    "name", ["selective_log_softmax", "log-probability and entropy", "OpenRLHF", "entropy of verl"]
)
def test_one_pass_serves(name):
    found = compare(made_by("plain"), reading(READERS[name]), out_tolerance=2e-5, grad_tolerance=5e-5)
    assert found.answered == {"linear_logprobs": 2 if name == "log-probability and entropy" else 1}  # of two slices


def test_a_loss_and_an_entropy_of_the_same_logits():
    """As PPO does: both have a gradient, the second is free."""

    def read(z, y):
        z = z[:, :-1] / 0.9
        return trl_selective_log_softmax(z, y) + 0.1 * verl_entropy_from_logits(z)

    found = compare(made_by("plain"), reading(read), out_tolerance=2e-5, grad_tolerance=5e-5)
    assert (found.answered.total(), found.fallbacks.total()) == (1, 0)


def test_ignored_rows_of_a_loss_have_an_entropy():
    """The op gives 0 for a row without a label; the next reading is of every row."""

    def read(z, y):
        z, y = cut(z).reshape(-1, V), y.reshape(-1)
        loss = F.cross_entropy(z, y.where(y > 40, -100), reduction="none")
        return torch.stack(
            [loss, verl_entropy_from_logits(z), z.logsumexp(-1), picked(z, y), z.gather(-1, y[:, None])[:, 0]]
        )

    found = compare(made_by("plain"), reading(read), out_tolerance=2e-5, grad_tolerance=5e-5)
    assert found.fallbacks.total() == 0


def test_token_accuracy():
    """argmax keeps no logits, and is that of the logits in their dtype."""
    model, ids = made_by("soft cap"), torch.randint(3, V, (3, 9))
    theirs = model(input_ids=ids).logits
    with lazy_head(model):
        logits = model(input_ids=ids).logits
        for ours, wanted in (
            (logits.argmax(-1), theirs.argmax(-1)),
            (torch.argmax(input=logits[:, :-1], dim=2, keepdim=True), theirs[:, :-1].argmax(2, keepdim=True)),
            (logits.softmax(-1).argmax(-1), theirs.argmax(-1)),
            (logits.bfloat16().argmax(-1), theirs.bfloat16().argmax(-1)),
        ):
            assert torch.equal(ours, wanted)
    assert status(model).fallbacks.total() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["gather", "entropy of TRL", "cross_entropy", "cross_entropy none", "max", "nll_loss"])
def test_dtypes(name, dtype):
    """The answer has the dtype that torch's would have, and is no less exact."""
    model = made_by("plain").to(dtype)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-12 if "cross" not in name and "nll" not in name else 1e-7
    compare(model, reading((READERS | MAKERS)[name]), out_tolerance=tolerance, grad_tolerance=2 * tolerance)


def test_float32_of_bfloat16_logits_is_not_rounded():
    model, ids = made_by("plain").bfloat16(), torch.randint(3, V, (3, 9))
    with lazy_head(model), torch.no_grad():
        logits = model(input_ids=ids).logits
        ours = logits.float().logsumexp(-1)
        exact = (logits.rows.hidden.double() @ model.lm_head.weight.double().T).logsumexp(-1).view(3, 9)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 1e-5


# -- modes of gradients ------------------------------------------------------------------------------------------------


def test_logits_made_without_a_gradient_do_not_serve_with_one():
    """A metric first, under no_grad; then a loss that no op answers."""

    def read(z, y):
        with torch.no_grad():
            assert not z.max().requires_grad and not (z.float().softmax(-1) + 0).requires_grad
            cut(z).logsumexp(-1)
        return z.square().sum(-1) + z.logsumexp(-1)

    compare(made_by("plain"), reading(read), out_tolerance=2e-5, grad_tolerance=5e-5)


def test_logits_after_the_optimizers_step():
    """TRL's PPO reads an entropy after the step: statistics of the pass before it answer. What would have to be
    computed with other weights is an error."""
    model, ids = made_by("bias"), torch.randint(3, V, (3, 9))
    theirs = verl_entropy_from_logits(model(input_ids=ids).logits[:, :-1] / 0.9)
    with lazy_head(model):
        whole = model(input_ids=ids).logits
        logits = whole[:, :-1]
        logits /= 0.9
        trl_selective_log_softmax(logits, ids[:, 1:]).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        with torch.no_grad():
            assert_close(verl_entropy_from_logits(logits), theirs.detach(), 1e-5)
            for read in (
                lambda z: z.max(),
                lambda z: (z / 2).logsumexp(-1),
                lambda z: z[:1].logsumexp(-1),
                lambda z: z + 0,
                lambda z: z.argmax(-1),
                lambda z: z.mean(-1),
                lambda z: z.gather(-1, ids[:, 1:, None]),
            ):
                with pytest.raises(RuntimeError, match=r"head's weight changed between .*test_lazy_logits.py:\d+"):
                    read(logits)
    assert (status(model).answered.total(), status(model).fallbacks.total()) == (1, 0)


def test_statistics_with_a_gradient_serve_without():
    model, ids = made_by("plain"), torch.randint(3, V, (3, 9))
    with lazy_head(model):
        logits = model(input_ids=ids).logits
        first = logits.logsumexp(-1)
        with torch.no_grad():
            second = logits.logsumexp(-1)
        third = logits.detach().logsumexp(-1)
        assert first.requires_grad and not second.requires_grad and not third.requires_grad
        assert torch.equal(first, second) and torch.equal(first, third)
    assert status(model).answered.total() == 1


def test_logits_taken_under_no_grad_have_no_gradient():
    model, ids = made_by("plain"), torch.randint(3, V, (3, 9))
    with lazy_head(model):
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        kept = model(input_ids=ids).logits
        with torch.no_grad():
            parts = [kept[:, :-1], kept.float() / 2, kept.clone(), kept.view_as(kept), *kept.split(1), kept.detach()]
        for z in (logits, *parts, kept.detach(), kept.data):
            assert not z.requires_grad, z
            assert (
                not z.logsumexp(-1).requires_grad
                and not z.max().requires_grad
                and not z.log_softmax(-1)[0].requires_grad
            )
        assert kept.requires_grad and kept.grad_fn is not None and not kept.is_leaf
        assert kept.logsumexp(-1).requires_grad


def test_frozen_weights_get_no_gradient():
    model = made_by("bias")
    for p in model.parameters():
        p.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    compare(model, reading(READERS["selective_log_softmax"]), out_tolerance=2e-5, grad_tolerance=5e-5)
    assert len(grads_of(model)) == 1
    model.get_input_embeddings().weight.requires_grad_(False)
    with lazy_head(model):
        assert not model(input_ids=torch.randint(3, V, (3, 9))).logits.requires_grad


def test_backward_from_the_logits():
    """A gradient of the logits themselves goes to the head."""
    model, ids = made_by("bias"), torch.randint(3, V, (3, 9))
    factors = torch.randn(3, 9, V)
    model(input_ids=ids).logits.backward(factors)
    theirs = grads_of(model)
    for backward in (lambda z: z.backward(factors), lambda z: torch.autograd.backward([z / 1], [factors])):
        model.zero_grad()
        with lazy_head(model):
            backward(model(input_ids=ids).logits)
        for name, grad in grads_of(model).items():
            assert_close(grad, theirs[name], 1e-5, name)


def test_a_second_backward_pass():
    model = made_by("plain")

    def read(z, y):
        out = picked(cut(z), y)
        out.sum().backward(retain_graph=True)
        return out

    compare(model, reading(read), out_tolerance=2e-5, grad_tolerance=5e-5)


def test_a_second_derivative_is_an_error():
    model, ids = made_by("plain"), torch.randint(3, V, (3, 9))
    with lazy_head(model):
        out = picked(model(input_ids=ids).logits[:, :-1], ids[:, 1:])
        (grad,) = torch.autograd.grad(out.sum(), model.lm_head.weight, create_graph=True)
        with pytest.raises(RuntimeError):
            grad.square().sum().backward()


WRITES_OF_INFERENCE_MODE = {
    "through a view": lambda z: (z[:, :, 3].fill_(-1e9), z)[1],
    "by a function": lambda z: (F.relu(z, inplace=True), z)[1],
    "into all": lambda z: z.__setitem__((..., 4), -50.0) or z.add_(1),
    "none": lambda z: z,
}


@pytest.mark.parametrize("write", WRITES_OF_INFERENCE_MODE)
def test_inference_mode(write):
    """It counts no writes, so that the layer gives its own logits."""
    model, ids = made_by("plain"), torch.randint(4, V, (3, 9))
    with torch.inference_mode():
        theirs = WRITES_OF_INFERENCE_MODE[write](model(input_ids=ids).logits)
        with lazy_head(model):
            ours = WRITES_OF_INFERENCE_MODE[write](model(input_ids=ids).logits)
            assert type(ours) is torch.Tensor and status(model).direct == 1
        assert torch.equal(F.cross_entropy(cut(ours).transpose(1, 2), ids[:, 1:]),
                           F.cross_entropy(cut(theirs).transpose(1, 2), ids[:, 1:]))  # fmt: skip


def test_hidden_states_of_inference_mode():
    model = made_by("plain")
    with torch.inference_mode():
        hidden = torch.randn(3, 9, model.lm_head.in_features)
    with lazy_head(model), torch.no_grad():
        assert type(model.lm_head(hidden)) is torch.Tensor
        assert type(model.lm_head(hidden.clone())) is LazyLogits


def test_targets_that_were_written_in_inference_mode():
    """A reused buffer: the second log-probabilities are of the second targets."""
    model, ids = made_by("plain"), torch.randint(3, V, (3, 9))
    with torch.inference_mode():
        targets = ids.clone()
    with lazy_head(model), torch.no_grad():
        logits = model(input_ids=ids).logits
        picked(logits, targets)
        with torch.inference_mode():
            targets.copy_(ids.flip(1))
        assert_close(picked(logits, targets), picked(logits.make(), ids.flip(1)), 1e-5)


@pytest.mark.parametrize(
    ("factor", "number"),
    [
        (2, 2.0), (0.7, 0.7), (T(0.5), 0.5), (T([[3]]), 3.0), (torch.full((3, 1), 0.7, dtype=torch.float64), 0.7),
        (torch.ones(2, 1, dtype=torch.bool), 1.0), (torch.full((3, 1, 1), 4), 4.0), (T([[0.5], [0.25]]), None),
        (torch.full((2, 1), torch.nan), None), (torch.empty(0, 1), None), (T(0.5, requires_grad=True), None),
    ],
)  # fmt: skip
def test_a_factor_is_one_number(factor, number):
    assert lazy_scales._number(factor) == number


def test_row_temperatures_of_a_bfloat16_model():
    """Hidden states are divided in float32; the weight's dtype is another then."""
    scales = torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    for read in (lambda z, y: picked(cut(z).float() / scales, y), lambda z, y: (z / scales).square()):
        compare(made_by("plain").bfloat16(), reading(read), out_tolerance=2e-2, grad_tolerance=4e-2)


@pytest.mark.parametrize("cast", ["no cast", "double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_row_temperatures_in_float64(dtype, cast):
    """The ops take them with a float64 model; others make logits."""
    scales = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64 if cast == "no cast" else torch.float32)[:, None, None]

    def read(z, y):
        return picked((cut(z) if cast == "no cast" else cut(z).double()) / scales, y)

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float64: 1e-6}[dtype]
    found = compare(made_by("plain").to(dtype), reading(read), out_tolerance=tolerance, grad_tolerance=tolerance)
    assert found.fallbacks.total() == (dtype != torch.float64)


def test_nothing_keeps_their_memory():
    """Without a garbage collection: hidden states and the graph behind them are large."""
    model, ids = made_by("plain"), torch.randint(3, V, (3, 9))
    gc.collect()
    gc.disable()
    try:
        with lazy_head(model):
            logits = model(input_ids=ids).logits
            kept = [weakref.ref(logits), weakref.ref(logits.rows), weakref.ref(logits.rows.hidden)]
            (passed,) = Same.apply(logits)
            loss = (
                trl_selective_log_softmax(passed[:, :-1] / 0.7, ids[:, 1:]).sum()
                + passed.max()
                + Squared.apply(logits).sum()
            )
            with torch.no_grad():
                trl_entropy_from_logits(passed).sum()
            loss.backward()
            del logits, passed, loss
        assert [ref() is None for ref in kept] == [True] * 3
    finally:
        gc.enable()


class Same(torch.autograd.Function):
    """Returns its inputs, as DDP's sink does."""

    @staticmethod
    def forward(ctx, *inputs):
        return inputs

    @staticmethod
    def backward(ctx, *grads):
        return grads


# -- the object --------------------------------------------------------------------------------------------------------


@pytest.fixture
def both():
    """A model's logits, and its lazy ones; the model says how often they were made."""
    model, ids = made_by("plain"), torch.randint(3, V, (3, 9))
    theirs = model(input_ids=ids).logits
    with lazy_head(model):
        yield model(input_ids=ids).logits, theirs, model


METADATA = [
    lambda z: z.shape, lambda z: z.size(), lambda z: z.size(-1), lambda z: z.dtype, lambda z: z.device,
    lambda z: z.ndim,
    lambda z: z.dim(), lambda z: z.numel(), lambda z: z.nelement(), lambda z: len(z), lambda z: z.is_floating_point(),
    lambda z: torch.is_floating_point(z), lambda z: torch.is_tensor(z), lambda z: isinstance(z, torch.Tensor),
    lambda z: z.requires_grad, lambda z: z.is_leaf, lambda z: z.layout, lambda z: z.is_cuda,
    lambda z: z.is_contiguous(),
    lambda z: z.stride(), lambda z: z.element_size(), lambda z: z.itemsize, lambda z: z.nbytes,
    lambda z: z.get_device(),
    lambda z: z.grad, lambda z: torch.numel(z), lambda z: z[:, 1:].shape, lambda z: z[..., None, :].shape,
    lambda z: torch.zeros_like(z), lambda z: z.new_zeros(3), lambda z: torch.empty_like(z, dtype=torch.int64).shape,
    lambda z: z.new_full((2,), 3.0), lambda z: torch.ones_like(z, dtype=torch.bool), lambda z: z.new_tensor([1]),
    lambda z: z.softmax(-1).shape, lambda z: z.transpose(1, 2).shape, lambda z: z.bfloat16().dtype,
]  # fmt: skip


def test_metadata_costs_nothing(both):
    ours, theirs, model = both
    for number, ask in enumerate(METADATA):
        a, b = ask(ours), ask(theirs)
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, number
    assert "LazyLogits(logits, shape=(3, 9, 97)" in repr(ours) and hash(ours) == hash(ours) and ours in {ours}
    assert (status(model).answered.total(), status(model).fallbacks.total()) == (0, 0)


def test_values_leave_python(both):
    ours, theirs, _ = both
    ours, theirs = ours.detach(), theirs.detach()
    assert (ours.numpy() == theirs.numpy()).all() and ours.tolist() == theirs.tolist()
    assert ours[0, 0, 0].item() == theirs[0, 0, 0].item() and f"{ours[1, 1, 1]:.4f}" == f"{theirs[1, 1, 1]:.4f}"
    assert torch.equal(pickle.loads(pickle.dumps(ours)), theirs) and torch.equal(copy.deepcopy(ours), theirs)
    assert ours.storage_offset() == 0 and torch.equal(torch.utils.dlpack.from_dlpack(ours), theirs)
    assert torch.equal(ours, theirs) and bool((ours == theirs).all()) and torch.allclose(theirs, ours)
    assert torch.equal(torch.stack(list(ours)), theirs) and type(ours + 0) is torch.Tensor


def test_they_are_made_once(both):
    ours, _, model = both
    parts = [ours, ours[...], ours.view(-1, V), ours.unsqueeze(0), *ours]
    assert all(torch.isfinite(part.max()) for part in parts) and ours.make().data_ptr() == ours.make().data_ptr()
    assert status(model).fallbacks.total() == 2  # ours[...] is another slice


def test_writes_are_seen_or_refused(both):
    """Torch shows a write in every view. Here the one that was written has it, and the others say so."""
    ours, theirs, _ = both
    view, taken = ours[:, :-1], ours.view(-1, V)
    view /= 2
    after = view[0]
    assert_close(view.logsumexp(-1), (theirs[:, :-1] / 2).logsumexp(-1), 1e-6)
    assert_close(after.logsumexp(-1), (theirs[0, :-1] / 2).logsumexp(-1), 1e-6)
    for stale in (ours, taken):
        for read in (lambda z: z.logsumexp(-1), lambda z: z.max(), lambda z: z[0]):
            with pytest.raises(
                RuntimeError, match=r"written in place through another view, at .*test_lazy_logits.py:\d+"
            ):
                read(stale)


def test_a_write_of_some_tokens_is_kept(both):
    ours, theirs, _ = both
    theirs = theirs.clone()
    ours[..., :5] = -7.0
    theirs[..., :5] = -7.0
    for read in (
        lambda z: z.logsumexp(-1),
        lambda z: z[:, 1:].log_softmax(-1),
        lambda z: z.argmax(-1),
        lambda z: z.max(),
    ):
        assert_close(read(ours).float(), read(theirs).float(), 1e-6)
    ours.div_(3)
    assert torch.equal(ours + 0, theirs / 3)


def test_a_write_past_them_is_noticed(both):
    """A part of the vocabulary is a plain tensor, which is a view of the logits that were made."""
    ours, _, _ = both
    part = ours.detach()[..., :5]
    assert type(part) is torch.Tensor
    part.zero_()
    for read in (lambda z: z.logsumexp(-1), lambda z: z.max(), lambda z: z[:, 1:]):
        with pytest.raises(RuntimeError, match="written in place through a view"):
            read(ours)


def test_a_copy_is_independent(both):
    ours, theirs, _ = both
    ours.max()
    for other in (ours.clone(), ours.double().float(), ours / 1.0, ours.softmax(-1)):
        other[..., 0] = 5.0
        assert (other[..., 0] == 5.0).all()
    assert torch.equal(ours + 0, theirs) and torch.equal(ours.logsumexp(-1), ours.clone().logsumexp(-1))


def test_an_in_place_scale_after_the_logits_were_made(both):
    ours, theirs, _ = both
    part = ours[..., 3]
    ours.mul_(2)
    assert_close(part, theirs[..., 3] * 2, 1e-6)
    assert_close(ours.logsumexp(-1), (theirs * 2).logsumexp(-1), 1e-6)


def past_python(call):
    def without_torch_function(z):
        with torch._C.DisableTorchFunctionSubclass():
            return call(z)

    return without_torch_function


def write_after_a_part_was_taken(z):
    z = z.detach()
    part = z[:, :-1][..., 3]
    z.div_(2)
    return part


REFUSED = {
    "a part before a write": write_after_a_part_was_taken,
    "out": lambda z: torch.add(torch.ones(3, 9, V), 1, out=z),
    "out in a tuple": lambda z: torch.max(torch.ones(3, 9, V), 1, out=(z, z)),
    "retain_grad": lambda z: z.retain_grad(),
    "requires_grad": lambda z: z.requires_grad_(False),
    "requires_grad set": lambda z: setattr(z, "requires_grad", False),
    "grad set": lambda z: setattr(z, "grad", torch.ones(z.shape)),
    "data set": lambda z: setattr(z, "data", torch.ones(z.shape)),
    "set_": lambda z: z.set_(torch.ones(2)),
    "hook": lambda z: z.register_hook(lambda grad: grad * 2),
    "a write of C++": past_python(lambda z: z.zero_()),
    "a view of C++": past_python(lambda z: z[..., :3]),
    "an output of C++": past_python(lambda z: torch.exp(torch.ones(3, 9, V), out=z.detach())),
    "write under no_grad": lambda z: torch.no_grad()(lambda: z.zero_())(),
    "scale under no_grad": lambda z: torch.no_grad()(lambda: z.div_(2))(),
}


def test_operators_past_python(both):
    """C++ gets the logits; their gradient goes to the head."""
    ours, theirs, model = both
    read = past_python(lambda z: torch.exp(z).sum(-1) + torch.logsumexp(2 * z, -1))
    results = []
    for z in (ours, theirs):
        model.zero_grad()
        out = read(z)
        out.sum().backward()
        results.append((out, grads_of(model)))
    assert_close(results[0][0], results[1][0], 1e-5)
    for name, grad in results[1][1].items():
        assert_close(results[0][1][name], grad, 2e-5, name)
    assert status(model).fallbacks.total() == 1


def test_reading_under_autocast(both):
    """Logits of a float32 pass stay float32 where autocast began after it."""
    ours, theirs, _ = both
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(ours.mean(-1), theirs.mean(-1), 1e-5, floor=1e-6)
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
        assert_close(ours.max(-1).values, theirs.max(-1).values, 1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, both):
    ours, _, _ = both
    with pytest.raises(NotImplementedError, match=r"lazy_head: .*logits\.make\(\)"):
        REFUSED[name](ours)


def test_a_function_that_reads_logits_that_were_scaled_in_place(both):
    ours, _, _ = both
    out = ours.div_(2)
    with pytest.raises(NotImplementedError, match=r"written in place were read by an autograd\.Function"):
        Squared.apply(out).sum().backward()


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda z, y: z.gather(-1, y[..., None] + V), (RuntimeError, IndexError)),
        (lambda z, y: z.gather(-1, y[..., None] - 200), (RuntimeError, IndexError)),
        (lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1)[1:]), ValueError),
        (lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1).double()), RuntimeError),
        (lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1), reduction="avg"), ValueError),
        (lambda z, y: z[:, :, :, 0], IndexError),
        (lambda z, y: z.view(-1, V + 1), RuntimeError),
        (lambda z, y: z.log_softmax(3), IndexError),
        (lambda z, y: z.split([1, 1]), RuntimeError),
        (lambda z, y: z.nothing, AttributeError),
    ],
)
def test_what_torch_refuses_is_refused(call, kind, both):
    ours, theirs, _ = both
    labels = torch.randint(V, (3, 9))
    for z in (theirs, ours):
        with pytest.raises(kind):
            call(z, labels)


def test_no_rows():
    model = made_by("plain")
    reader = reading(
        lambda z, y: (
            F.cross_entropy(z[:0].reshape(-1, V), y[:0].reshape(-1), reduction="sum") + z[:, :0].logsumexp(-1).sum()
        )
    )
    compare(model, lambda m: reader(m) + m(input_ids=torch.ones(1, 2, dtype=torch.int64)).logits.logsumexp(-1).sum())
