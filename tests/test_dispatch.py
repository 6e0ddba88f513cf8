"""An op runs on a compiled kernel, then on Triton's, then on the reference, which is never chosen silently."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.kernels import _launch, _op
from rlhf_fast.kernels._backends import WHY_MISSING, strict
from rlhf_fast.kernels._launch import Unsupported

NOT_INSTALLED = "triton is not installed; `pip install triton` (Linux)"
ON_A_GPU = """
import torch
torch.cuda.is_available = lambda: True
from rlhf_fast.cli import env
from rlhf_fast import ops
from rlhf_fast.kernels import _op
print(*(op.name for op in _op.OPS.values() if op.chosen("cuda") not in ("cuda", "triton")), "end")
print(*(op.name for op in _op.OPS.values() if op.preference["cuda"][-1] != "reference"), "end")
torch.cuda.device_count = lambda: 0
print(*env.ops_report(), sep="\\n")
"""


def run(code, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RLHF_FAST_BACKEND")} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout


def test_every_op_has_a_kernel_on_a_gpu():
    pytest.importorskip("triton")
    without, no_reference, *report = run(ON_A_GPU).splitlines()
    # a GPU's products are torch's
    assert without == "linear linear_with_rounded_input linear_backward end", (
        f"plain torch would answer on a GPU for: {without}"
    )
    assert no_reference == "end"
    listed = report[report.index("who answers on cuda") + 1 :]
    answers = dict(line.split()[:2] for line in listed)
    assert answers.keys() == set(ops.__all__) and answers.pop("linear") == "reference"
    assert set(answers.values()) <= {"cuda", "triton"}
    assert any("Triton; no compiled kernel: " in line for line in listed)


@pytest.mark.slow
def test_without_a_gpu_the_reason_for_no_triton_is_given():
    code = "from rlhf_fast.kernels import _backends; print(_backends.WHY_MISSING['triton'])"
    output = run(code, CUDA_VISIBLE_DEVICES="")
    assert output.strip() in (
        "no CUDA device is visible to torch",
        "triton is not installed; `pip install triton` (Linux)",
    )
    hidden = "import sys; sys.modules['triton'] = None; import importlib.util as u; u.find_spec = lambda n: None\n"
    output = run(hidden + code)
    assert output.startswith(NOT_INSTALLED)


@pytest.mark.slow
def test_env_reports_ops_without_the_forced_backend():
    report = "from rlhf_fast.cli import env; print(*env.ops_report(), sep='\\n')"  # the rest imports other trainers
    output = run(report, RLHF_FAST_BACKEND="cuda", CUDA_VISIBLE_DEVICES="")
    assert "cuda is forced for every op; without it, and an error: decode_attention, gae, " in output
    assert "reference is forced for every op\n" in run(report, RLHF_FAST_BACKEND="reference")
    with pytest.raises(ValueError, match="gae: no backend 'nonsense' here; there are: reference, "):
        ops.gae.backend("nonsense")


def gae_inputs():
    return ops.gae.bind(*ops.gae.make_inputs(B=2, T=3, device="cpu", dtype=torch.float32))


def test_the_next_backend_runs_what_a_kernel_does_not_support(monkeypatch, caplog):
    called = []

    def unsupported(*_args):
        called.append("first")
        raise Unsupported("not this dtype")

    monkeypatch.setitem(ops.gae.implementations, "cpu:first", unsupported)
    monkeypatch.setitem(ops.gae.implementations, "cpu:second", lambda *_args: called.append("second"))
    monkeypatch.setitem(ops.gae.preference, "cpu", ["cpu:first", "cpu:second", "reference"])
    monkeypatch.setattr(ops.gae, "has_warned", False)
    with caplog.at_level(logging.WARNING, "rlhf_fast"):
        ops.gae._run_kernel("cpu", *gae_inputs())
        assert called == ["first", "second"] and not caplog.messages
        monkeypatch.setitem(ops.gae.preference, "cpu", ["cpu:first", "reference"])
        ops.gae._run_kernel("cpu", *gae_inputs())
    assert caplog.messages == ["gae runs on its plain-torch reference: not this dtype"]
    with strict(), pytest.raises(RuntimeError, match="gae: RLHF_FAST_STRICT=1 and no kernel answers: not this dtype"):
        ops.gae._run_kernel("cpu", *gae_inputs())


@pytest.mark.parametrize("first", ["grad", "jvp", "no kernel"])
def test_a_transform_does_not_hide_that_no_kernel_answers(first, monkeypatch, caplog):
    """Nor the other way round: each is reported once."""
    op = ops.ranking_loss
    scores, *rest = (
        a.detach() if isinstance(a, torch.Tensor) else a for a in op.make_inputs((3,), "cpu", torch.float32)
    )
    monkeypatch.setitem(op.preference, "cpu", ["reference"])
    monkeypatch.setattr(op, "has_warned", False)
    monkeypatch.setattr(op, "has_warned_of_transforms", False)

    def loss(x):
        return op(x, *rest)[0].sum()

    calls = {
        "grad": lambda: torch.func.grad(loss)(scores),
        "jvp": lambda: torch.func.jvp(loss, (scores,), (scores,)),
        "no kernel": lambda: op(scores, *rest),
    }
    with caplog.at_level(logging.WARNING, "rlhf_fast"):
        for name in (first, *calls, *calls):
            calls[name]()
    assert len(caplog.messages) == 2
    assert sum("torch.func" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    "message",
    [
        "no kernel image is available for execution on the device",
        "invalid device function",
        "the provided PTX was compiled with an unsupported toolchain.",
    ],
)
def test_the_next_backend_runs_on_a_gpu_without_compiled_code(message, monkeypatch, caplog):
    def fails(*args):
        raise RuntimeError(f"gae: {message}")

    def unsupported(*args):
        raise Unsupported("no compiled kernel for float32")

    monkeypatch.setitem(ops.gae.implementations, "cpu:first", fails)
    monkeypatch.setitem(ops.gae.implementations, "cpu:narrow", unsupported)
    monkeypatch.setitem(ops.gae.preference, "cpu", ["cpu:narrow", "cpu:first", "reference"])
    monkeypatch.setattr(ops.gae, "has_warned", False)
    monkeypatch.setitem(WHY_MISSING, "cpu", "")
    with caplog.at_level(logging.WARNING, "rlhf_fast"):
        ops.gae._run_kernel("cpu", *gae_inputs())
    assert "no compiled kernel for float32" in caplog.text  # the first reason
    assert ops.gae.preference["cpu"] == ["cpu:narrow", "reference"]  # what was not compiled is not tried again
    assert "csrc/cuda was not compiled for this GPU" in WHY_MISSING["cpu"]
    assert "RLHF_FAST_CUDA_ARCHS" in WHY_MISSING["cpu"]
    with pytest.raises(RuntimeError, match=message):
        ops.gae.backend("cpu:first")(*gae_inputs())


def test_other_errors_of_a_kernel_are_raised(monkeypatch):
    def fails(*args):
        raise RuntimeError("gae: an illegal memory access was encountered")

    monkeypatch.setitem(ops.gae.implementations, "cpu:first", fails)
    monkeypatch.setitem(ops.gae.preference, "cpu", ["cpu:first", "reference"])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ops.gae._run_kernel("cpu", *gae_inputs())
    assert ops.gae.preference["cpu"] == ["cpu:first", "reference"]


def test_ops_without_a_registered_gradient_have_none_on_any_backend():
    """Otherwise the reference would have a gradient, and kernels none."""
    for name in ("gae", "ppo_advantages"):
        op = getattr(ops, name)
        args = op.make_inputs(**op.small_sizes[0], device="cpu", dtype=torch.float32)
        args = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        assert not op.has_gradient
        for backend in op.backends:
            assert not any(x.requires_grad for x in op.backend(backend)(*args)), (name, backend)
        doubles = [a.detach().double().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                   for a in args]  # fmt: skip
        assert not any(x.requires_grad for x in op(*doubles)), name  # runs on the reference: no kernel serves float64


def test_a_backend_of_another_device_is_refused(monkeypatch):
    monkeypatch.setitem(ops.gae.implementations, "cuda", lambda *args: pytest.fail("CPU addresses on a GPU"))
    with pytest.raises(ValueError, match="gae: no backend 'cuda' here for cpu tensors; there are: reference"):
        ops.gae.backend("cuda")(*gae_inputs())


def test_a_variant_has_the_ops_parameters_between_its_own(monkeypatch):
    monkeypatch.setattr(_op, "OPS", dict(_op.OPS))

    @ops.gae.variant(outputs=2, tensors=("grad_advantages",), flags=("needs_grad",))
    def gae_variant_of_this_test(grad_advantages, *args):
        return grad_advantages.clone(), args[0].clone()

    assert str(gae_variant_of_this_test.torch_op._schema) == (
        "rlhf_fast::gae_variant_of_this_test(Tensor grad_advantages, Tensor rewards, Tensor values, Tensor mask,"
        " float gamma, float lam, Tensor? bootstrap, bool needs_grad, Tensor? gamma_rows=None, Tensor? lam_rows=None)"
        " -> (Tensor, Tensor)"
    )
    x = torch.ones(2, 3)
    for gamma in (1.0, x[:, 0]):
        args = x, x, x, x.bool(), gamma, 1.0, None, True
        assert torch.equal(gae_variant_of_this_test(*args)[0], x)
        assert torch.equal(gae_variant_of_this_test.dispatch(*args)[0], x)
    with pytest.raises(TypeError, match="gae_variant_of_this_test misses the argument 'gamma'"):
        gae_variant_of_this_test(x, x, x, x.bool())


def test_an_op_declares_which_numbers_may_be_a_tensor_of_rows(monkeypatch):
    """Without `rows`, `float | Tensor` is a tensor in the schema; the order of the two says nothing."""
    monkeypatch.setattr(_op, "OPS", dict(_op.OPS))

    @_op.op(rows=("scale",))
    def op_with_rows_of_this_test(
        x: torch.Tensor, scale: torch.Tensor | float, weight: float | torch.Tensor
    ) -> torch.Tensor:
        return x * torch.as_tensor(scale).unsqueeze(-1) * weight

    assert str(op_with_rows_of_this_test.torch_op._schema) == (
        "rlhf_fast::op_with_rows_of_this_test(Tensor x, float scale, Tensor? weight, Tensor? scale_rows=None) -> Tensor"
    )
    x, weight = torch.ones(2, 3), torch.tensor(2.0)
    for scale, expected in ((3.0, [6.0, 6.0]), (torch.tensor([3.0, 5.0]), [6.0, 10.0])):
        for call in (op_with_rows_of_this_test, op_with_rows_of_this_test.dispatch):
            assert call(x, scale, weight)[:, 0].tolist() == expected
    for name in ("scales", "x", "count"):
        with pytest.raises(
            ValueError, match=f"refused: rows names '{name}', which is no parameter of `float | Tensor`"
        ):

            @_op.op(rows=(name,))
            def refused(x: torch.Tensor, scale: torch.Tensor | float, count: float | None) -> torch.Tensor:
                return x


def test_a_signature_says_where_a_number_may_stand_for_a_tensor():
    """The schema has a tensor there: the normalizer makes one."""
    for op in (ops.sample_tokens, ops.linear_sample_tokens):
        kinds = {name: op.signature.parameters[name].annotation for name in op.names}
        assert all(kinds[name] == float | torch.Tensor | None for name in ("temperature", "top_p", "min_p"))
        assert kinds["top_k"] == kinds["steps"] == int | torch.Tensor | None and kinds["row_ids"] == torch.Tensor | None
        assert "Tensor? temperature=None, Tensor? top_k=None, Tensor? top_p=None" in str(op.torch_op._schema)


def test_the_docstring_names_every_shared_file():
    folder = Path(_op.__file__).parent
    shared = {path.stem for path in [*folder.glob("_*.py"), *folder.glob("triton/_*.py")]}
    assert set(re.findall(r"(?<!\w)_[a-z]\w*", _op.__doc__)) == shared


def test_launches_that_may_run_at_the_same_time_have_tickets_of_their_own(monkeypatch):
    """A stream has one; each launch that a graph captures has another, and zeroed memory once there are no more."""
    x = SimpleNamespace(device=torch.device("cpu"), is_cuda=True)
    state = SimpleNamespace(stream=1, capturing=False)
    monkeypatch.setattr(_launch, "_tickets", {})
    monkeypatch.setattr(_launch, "NUM_TICKETS", 4)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=state.stream))

    def address():
        numbers, index = _launch.ticket(x)
        assert numbers.dtype == torch.int32 and numbers[index] == 0
        kept.append(numbers)
        return _launch.ticket_ptr(numbers, index)

    kept = []
    state.capturing = True
    assert address() != address()  # nothing is kept of the memory of a graph
    state.capturing = False
    first = address()
    state.stream = 2
    second = address()
    assert second != first and address() == second
    state.capturing = True
    captured = [address() for _ in range(4)]
    assert len({first, second, *captured}) == 6
    state.capturing, state.stream = False, 1
    assert address() == first


@pytest.mark.parametrize("name", ops.__all__)
def test_dir_lists_what_a_caller_needs(name):
    op = getattr(ops, name)
    shown = {attribute for attribute in dir(op) if not attribute.startswith("_")}
    assert shown >= {"backend", "backends", "chosen", "why", "reference", "stats", "has_gradient"} and len(shown) < 12
    assert all(hasattr(op, attribute) for attribute in shown)
    assert op.__doc__ and "__call__" in dir(op)
