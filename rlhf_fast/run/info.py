"""The contents of run.json: settings, versions and machine; and the checksum of a file or model."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_fast import __version__
from rlhf_fast.config.resolve import to_plain
from rlhf_fast.config.rewards import FunctionOfRun, reward_specs
from rlhf_fast.config.run_file import FUNCTIONS_FROM, REWARDS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft")
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "*.model", "*.spm"),
    *("*.tiktoken", "bpe.codes", "chat_template*", "*.jinja"),
)
"""Patterns of the names of files that make a tokenizer."""
MODEL_FILES = (
    *("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json"),
    *("config.json", "generation_config.json", "adapter_config.json", "*.py"),
    *TOKENIZER_FILES,
)
"""Patterns of the names of files that make a model. Any other file in its folder is a note."""


def run_info(stage: str, cfg: DataclassInstance) -> dict[str, Any]:
    """Return the contents of run.json but for the checksums of the run's inputs (identity.py)."""
    versions = {"rlhf-fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        if found := package_version(package):
            versions[package] = found
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    rewards = [spec for name in REWARDS for spec in reward_specs(getattr(cfg, name, ""))]
    elsewhere = {str(spec): spec.folder for spec in rewards if isinstance(spec, FunctionOfRun)}
    return {
        "stage": stage,
        "config": json.loads(json.dumps(to_plain(cfg))),
        "versions": versions,
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads(), "gpu": gpu},
        "command": sys.argv,
        "directory": str(Path.cwd()),
        **({FUNCTIONS_FROM: elsewhere} if elsewhere else {}),
    }


def package_version(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def model_sha256(folder: str | Path) -> str:
    """Return one checksum of a model folder's weights, configs, tokenizer and code. Any other file is a note."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).iterdir()):
        if file.is_file() and any(fnmatchcase(file.name, pattern) for pattern in MODEL_FILES):
            digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


_CHECKSUMS: dict[tuple[int, ...], str] = {}
"""Checksums of this process, by device, inode, size and times: several stages read the same models."""
SETTLED_NS = 2 * 10**9
"""Age from which on a file cannot be written again within the same tick of its clock."""


def sha256(file: str | Path) -> str:
    """Return the checksum of a file in hex, read block by block."""
    stat = Path(file).stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    settled = time.time_ns() - stat.st_ctime_ns > SETTLED_NS
    if settled and key in _CHECKSUMS:
        return _CHECKSUMS[key]
    digest = hashlib.sha256()
    with Path(file).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if settled:
        _CHECKSUMS[key] = digest.hexdigest()
    return digest.hexdigest()
