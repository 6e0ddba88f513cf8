"""Tables of a bench: the machine it ran on, rows for the terminal, as Markdown and as JSON.

python -m rlhf_fast.bench.report FILE.json    print the ops of a run in few columns
"""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from rlhf_fast.kernels._backends import COMPILED

PACKAGES = ("triton", "transformers", "liger-kernel", "cut-cross-entropy")


def duration(seconds: float | None) -> str:
    """Return a time with its unit; an empty string for None."""
    if seconds is None:
        return ""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def output_of(*command: str) -> str:
    """Return the first line that a program prints, or "unknown"."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    except OSError:
        lines = []
    return lines[0] if lines else "unknown"


def commit() -> str:
    """Return the commit; RLHF_FAST_COMMIT names it where there is no repository."""
    if named := os.environ.get("RLHF_FAST_COMMIT"):
        return named
    return output_of("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(device: str, bandwidth: float) -> dict:
    """Return the facts about the machine that the numbers depend on."""
    facts = {"device": processor(), "threads": torch.get_num_threads()}
    if device == "cuda":
        facts = {
            "device": torch.cuda.get_device_name(),
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "processor": processor(),
        }
    return facts | {
        "kernels": ", ".join(COMPILED) or "reference",
        "copy_bytes_per_second": bandwidth,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: installed(package) for package in PACKAGES if installed(package)},
        "commit": commit(),
        "date": time.strftime("%F"),
    }


def aligned(cells: list[list[str]]) -> list[str]:
    """Return the lines of a table for the terminal."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]


def markdown_table(cells: list[list[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:], ""])


def op_cells(rows: list[dict]) -> list[list[str]]:
    """Return the ops' rows as a table. A ratio is the other's time over ours."""
    cells = [
        [
            "op and size", "pass", "backend", "a call", "on the device", "rate", "of the floor", "peak, reference's",
            "reference", "torch.compile", "others", "target",
        ]
    ]  # fmt: skip
    for row in rows:
        ratios = {name: f"{ratio:.2f}x" for name, ratio in row["ratios"].items()}
        named = [ratios.pop(name, "") for name in ("reference", "torch.compile")]
        peaks = [row["peak_bytes"]]
        if "reference" in row["others"]:
            peaks.append(row["others"]["reference"]["peak_bytes"])
        verdict = {True: " met", False: " missed", None: ""}[row["met"]]
        others = ", ".join(f"{name} {ratio}" for name, ratio in ratios.items())
        cells.append(
            [
                f"{row['op']} {row['size']} {row['dtype']}", row["pass"], row["backend"], duration(row["seconds"]),
                duration(row["device_seconds"]), row["rate"], f"{100 * row['share']:.0f} %",
                " / ".join(f"{peak / 1e6:.1f}" for peak in peaks) + " MB", *named, others,
                (row["target"] or "") + verdict,
            ]
        )  # fmt: skip
    return cells


def op_markdown(facts: dict, rows: list[dict], notes: list[str]) -> str:
    head = [f"- {name}: {value}" for name, value in facts.items() if name != "copy_bytes_per_second"]
    head += [
        f"- measured copy, bytes read and written: {facts['copy_bytes_per_second'] / 1e9:.1f} GB/s",
        "- of the floor: the fewest bytes over that copy, or a head's bare matrix products, over the time on the device"
        " (of a whole call where it is longer than 2 ms)",
        "- ratios: the other's time / ours, median of interleaved rounds",
    ]
    left = ["", "Left out:", "", *(f"- {note}" for note in notes), ""] if notes else []
    return "\n".join([*head, "", markdown_table(op_cells(rows)), *left])


def save_ops(path: Path, facts: dict, rows: list[dict], notes: list[str]) -> None:
    """Write the table as Markdown, and every number beside it as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(op_markdown(facts, rows, notes), encoding="utf-8")
    path.with_suffix(".json").write_text(
        json.dumps({"machine": facts, "rows": rows, "notes": notes}, indent=1) + "\n", encoding="utf-8"
    )


def main() -> int:
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    few = ("op and size", "pass", "backend", "a call", "on the device", "of the floor", "reference", "target")
    header, *lines = op_cells(found["rows"])
    kept = [header.index(name) for name in few]
    print("\n".join(aligned([[line[i] for i in kept] for line in [header, *lines]])))
    print(", ".join(f"{name} {value}" for name, value in found["machine"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
