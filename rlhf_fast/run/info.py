"""The contents of run.json: settings, versions, machine, checksums of the data files and models that a run reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_fast import __version__

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft")
MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja", ".py")


def run_info(
    stage: str, cfg: DataclassInstance, files: Iterable[str | Path], models: Iterable[str | Path] = ()
) -> dict[str, Any]:
    """Return the contents of run.json: `files` are the data files that the run reads, `models` its model folders."""
    versions = {"rlhf-fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        if found := package_version(package):
            versions[package] = found
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "stage": stage,
        "config": json.loads(json.dumps(dataclasses.asdict(cfg))),
        "versions": versions,
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads(), "gpu": gpu},
        "command": sys.argv,
        "data": {str(file): sha256(file) for file in files},
        "models": {str(folder): model_sha256(folder) for folder in models},
    }


def package_version(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def model_sha256(folder: str | Path) -> str:
    """Return one checksum of a model folder's weights, configs, tokenizer and code. A run.json in it is left out."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).iterdir()):
        if file.suffix in MODEL_SUFFIXES and file.name != "run.json" and file.is_file():
            digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def sha256(file: str | Path) -> str:
    """Return the checksum of a file in hex, read block by block."""
    digest = hashlib.sha256()
    with Path(file).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
