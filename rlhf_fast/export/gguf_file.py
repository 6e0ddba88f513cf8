"""Write a GGUF file, and read it back: the names, the shapes, and weights within the rounding of their type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.export.gguf_tensors import Contents, Weight
from rlhf_fast.export.gguf_vocabulary import TokenizerFacts

BLOCK = 32
"""Elements of a row that share a scale in q8_0."""
ROUNDING = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": (0.5 + 127 * 2.0**-11) / 127}
"""Largest error of a type: relative to the element, for Q8_0 to the largest one of its block."""
SMALLEST = {"F32": 0.0, "F16": 2.0**-25, "BF16": 0.0, "Q8_0": 127 * 2.0**-25}
"""The same for numbers below a type's normal ones, absolute."""


def require_gguf() -> Any:
    """Return the package gguf."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("export: --gguf needs the package gguf; pip install gguf") from error
    return gguf


def write(path: Path, name: str, kind: str, contents: Contents, tokenizer: TokenizerFacts) -> None:
    """Write the file. kind: the type of matrices; vectors, and positions, are float32."""
    gguf = require_gguf()
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, contents.family.name)])
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"))
        for method, value in (*contents.metadata, *tokenizer.metadata):
            getattr(writer, method)(value)
        types = [_type(weight, kind, gguf) for weight in contents.weights]
        for weight, type_ in zip(contents.weights, types, strict=True):
            shape = tuple(weight.parameter.shape)[:: -1 if weight.transposed else 1]
            stored = gguf.quant_shape_to_byte_shape(shape, type_) if type_.name in ("Q8_0", "BF16") else shape
            dtype = {"F32": np.float32, "F16": np.float16}.get(type_.name, np.uint8)
            nbytes = int(np.prod(stored)) * np.dtype(dtype).itemsize
            writer.add_tensor_info(weight.name, stored, np.dtype(dtype), nbytes, raw_dtype=type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight, type_ in zip(contents.weights, types, strict=True):
            writer.write_tensor_data(_rounded(weight, type_, gguf))
    finally:
        writer.close()


def _type(weight: Weight, kind: str, gguf: Any) -> Any:
    """Return the type of a tensor: a row that is no multiple of q8_0's block is kept in f16, as llama.cpp's own
    converter does."""
    types = gguf.GGMLQuantizationType
    if weight.parameter.dim() < 2 or weight.name == "position_embd.weight":
        return types.F32
    length = weight.parameter.shape[0 if weight.transposed else 1]
    return types.F16 if kind == "q8_0" and length % BLOCK else getattr(types, kind.upper())


def _rounded(weight: Weight, type_: Any, gguf: Any) -> np.ndarray:
    """Return the tensor in its type."""
    value = weight.to_file().numpy()
    if not np.isfinite(value).all():
        raise UserError(
            f"{weight.name}: has weights that are not finite; train the model again, or give an earlier one"
        )
    if type_.name == "F16" and np.abs(value).max(initial=0) > np.finfo(np.float16).max:
        raise UserError(f"{weight.name}: has weights above 65504, which f16 cannot hold; choose --gguf bf16 or f32")
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(value, type_)


def read_back(path: Path, contents: Contents) -> dict[str, int]:
    """Compare the file with the model, whose parameters become those of the file; return the number of tensors of each
    type. UserError for a tensor that is missing, or whose error is above the rounding of its type."""
    gguf = require_gguf()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    expected = {weight.name: weight for weight in contents.weights}
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise UserError(f"{path}: reads back with other tensors than were written, for instance {odd[0]}")
    counts: dict[str, int] = {}
    for name, weight in expected.items():
        tensor = tensors[name]
        kind = tensor.tensor_type.name
        counts[kind] = counts.get(kind, 0) + 1
        value = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        wanted = weight.to_file()
        if value.shape != wanted.shape:
            raise UserError(f"{path}: {name} reads back as {tuple(value.shape)}, not {tuple(wanted.shape)}")
        if not bool(((value - wanted).abs() <= _allowed(wanted, kind)).all()):
            raise UserError(f"{path}: {name} reads back with errors above the rounding of {kind}; export it again")
        if weight.parameter.requires_grad:
            weight.parameter.data.copy_(weight.from_file(value).to(weight.parameter.device))
    return counts


def _allowed(value: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the largest error of each element, with a little for the sums in float32."""
    size = value.abs()
    if kind == "Q8_0":
        largest = size.view(*size.shape[:-1], -1, BLOCK).amax(-1, keepdim=True)
        size = largest.expand(*size.shape[:-1], -1, BLOCK).reshape(size.shape)
    return size * (ROUNDING[kind] * 1.001) + SMALLEST[kind]
