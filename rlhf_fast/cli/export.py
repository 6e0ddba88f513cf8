"""`rlhf-fast export`: print a line for each check of the files that it writes."""

from __future__ import annotations

from pathlib import Path

from rlhf_fast.cli.options import ExportOptions
from rlhf_fast.export.export import Request, export


def write(options: ExportOptions) -> None:
    """Write the files that the options ask for."""
    run = Path(options.run)
    beside = run.parent if run.exists() else Path()  # a hub name has no folder here
    out = options.out or str(beside / f"{run.resolve().name}-export")
    request = Request(
        options.run, out, options.gguf, options.ollama, options.safetensors_dtype, options.merge_lora
    )  # fmt: skip
    for line in export(request):
        print(f"export: {line}", flush=True)
