"""Tables of a bench: the machine it ran on, rows for the terminal, as Markdown and as JSON.

python -m rlhf_fast.bench.report FILE.json...              print runs in few columns
python -m rlhf_fast.bench.report --markdown FILE.json...   print them whole, as Markdown
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


def whole_cells(rows: list[dict]) -> list[list[str]]:
    """Return the rows of decode_step and ppo_step as a table. A ratio is the other's time over ours."""
    cells = [
        [
            "row", "ours", "on the device", "busy", "launches", "by the host", "floor", "of the floor", "tokens/s",
            "others", "peak, others'", "process's peak, others'", "checked",
        ]
    ]  # fmt: skip
    for row in rows:
        others = [
            f"{name} {duration(found['seconds'])}, {row['ratios'][name]:.2f}x"
            for name, found in row.get("others", {}).items()
        ]
        sides = [row, *row.get("others", {}).values()]
        peaks = [side.get("peak_bytes") for side in sides]
        processes = [side["process"]["peak_bytes"] for side in sides if "process" in side]
        floor = row.get("floor_seconds")
        cells.append(
            [
                row["row"], duration(row["seconds"]), duration(row.get("device_seconds")),
                duration(row.get("busy_seconds")), _number(row.get("launches")), _number(row.get("host_launches")),
                duration(floor), f"{100 * floor / row['seconds']:.0f} %" if floor else "",
                _number(row.get("tokens_per_second")), "; ".join(others),
                " / ".join(f"{peak / 2**30:.2f}" for peak in peaks if peak) + (" GiB" if any(peaks) else ""),
                " / ".join(f"{peak / 2**30:.2f}" for peak in processes) + (" GiB" if processes else ""),
                row.get("checked", ""),
            ]
        )  # fmt: skip
    return cells


def filled_columns(cells: list[list[str]]) -> list[list[str]]:
    """Return the table without the columns that are empty below the header; the first stays."""
    kept = [i for i in range(len(cells[0])) if i == 0 or any(line[i] for line in cells[1:])]
    return [[line[i] for i in kept] for line in cells]


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.0f}"


def kernel_cells(rows: list[dict], top: int) -> list[list[str]]:
    """Return the kernels that take the most device time in each row that was profiled."""
    cells = [["row", "kernel", "calls", "us", "of busy"]]
    for row in rows:
        for kernel in (row.get("kernels") or [])[:top]:
            share = 1e-4 * kernel["us"] / row["busy_seconds"]
            name = kernel["name"].replace("|", " ")
            cells.append([row["row"], name, f"{kernel['calls']:g}", f"{kernel['us']:.1f}", f"{share:.0f} %"])
    return cells


def whole_markdown(found: dict) -> str:
    """Return all of a run of decode_step or ppo_step."""
    facts = [f"- {name}: {value}" for name, value in found["machine"].items() if not name.endswith("_per_second")]
    rates = found["machine"]
    facts += [
        f"- measured copy, bytes read and written: {rates['copy_bytes_per_second'] / 1e9:.1f} GB/s; product:"
        f" {rates['product_flops_per_second'] / 1e12:.3g} TFLOP/s",
        "- ours: wall time, the host's included; on the device: the same queued behind a sleeping device; busy: time in"
        " which a kernel, copy or fill ran, and launches: their number, both by torch's profiler",
        "- others: their time, and it over ours, median of interleaved rounds",
    ]
    notes = ["", "Left out:", "", *(f"- {note}" for note in found["notes"]), ""] if found["notes"] else []
    kernels = kernel_cells(found["rows"], 12)
    cells = filled_columns(whole_cells(found["rows"]))
    tables = [markdown_table(cells)] + [markdown_table(kernels)] * (len(kernels) > 1)
    return "\n".join([*facts, "", *tables, *notes])


def few_columns(found: dict) -> list[str]:
    """Return a run's lines for the terminal."""
    if "bench" in found:
        lines = aligned(filled_columns(whole_cells(found["rows"])))
        kernels = kernel_cells(found["rows"], 5)
        lines += ["", *aligned([[cell[:70] for cell in line] for line in kernels])] if len(kernels) > 1 else []
        return lines + found["notes"]
    few = ("op and size", "pass", "backend", "a call", "on the device", "of the floor", "reference", "target")
    header, *lines = op_cells(found["rows"])
    kept = [header.index(name) for name in few]
    return aligned([[line[i] for i in kept] for line in [header, *lines]])


def facts_markdown(facts: dict) -> str:
    """Return the list of bench/gpu_facts.py's facts."""
    lines = []
    for name, value in facts.items():
        shown = ", ".join(f"{key} {number}" for key, number in value.items()) if isinstance(value, dict) else value
        lines.append(f"- {name}: {shown}")
    return "\n".join([*lines, ""])


def to_markdown(found: dict) -> str:
    """Return a file's contents as Markdown: of the ops, of a whole-program bench, or facts."""
    if "bench" in found:
        return whole_markdown(found)
    if "rows" in found:
        return op_markdown(found["machine"], found["rows"], found["notes"])
    return facts_markdown(found)


def main() -> int:
    whole = "--markdown" in sys.argv
    for path in [Path(argument) for argument in sys.argv[1:] if argument != "--markdown"]:
        found = json.loads(path.read_text(encoding="utf-8"))
        if whole:
            print(f"## {path.stem}\n\n{to_markdown(found)}")
        elif "rows" in found:
            print("\n".join(few_columns(found)))
            print(", ".join(f"{name} {value}" for name, value in found["machine"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
