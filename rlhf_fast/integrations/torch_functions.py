"""Functions of torch by how lazy logits take them."""

import torch
from torch import Tensor

COMMUTATIVE = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__}
"""Functions whose arguments may change places."""
GATHERS = {"c10d::allgather_", "c10d::_allgather_base_", "c10d::gather_"}
"""Collectives that write into their first argument alone."""
WRITES = {f"__{name}__" for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")}
"""Methods that write into their object, beside those whose name ends with an underscore."""
IDENTITIES = {torch.ops.aten.view.default, torch.ops.aten.alias.default, torch.ops.aten.detach.default}
"""Operators that torch calls on the output of an autograd.Function which returns its input."""
NATIVE = {
    *(getattr(Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_sparse", "is_nested", "is_quantized",
        "is_meta", "is_mps", "is_xpu", "itemsize", "nbytes", "requires_grad", "grad_fn", "is_leaf", "retains_grad",
        "grad", "output_nr", "_version", "_base", "is_mkldnn", "is_sparse_csr", "is_vulkan",
    )),
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.__len__,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.element_size, Tensor.get_device,
    Tensor.is_inference, Tensor.is_signed, Tensor.storage_offset, Tensor.__hash__, torch.is_floating_point,
    torch.is_complex, torch.numel, torch.is_inference, torch.is_signed,
}  # fmt: skip
"""Functions that shape, dtype and place alone answer."""
REFUSED = {
    Tensor.retain_grad: "retain_grad()",
    Tensor.requires_grad.__set__: "setting requires_grad",  # type: ignore[attr-defined]
    Tensor.requires_grad_: "requires_grad_()",
    Tensor.grad.__set__: "setting grad",  # type: ignore[union-attr]
    Tensor.data.__set__: "setting data",  # type: ignore[attr-defined]
    Tensor.set_: "set_()",
}
"""Functions that would have no effect on logits that are not made."""
