"""Share options, rows saved as they are made, and a deadline among decode_step and ppo_step, whole-program benches."""

import argparse
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from rlhf_fast.bench import report
from rlhf_fast.bench.timing import CLOCKS, Cpu, Gpu

FILES = {
    "prompts": ("FILE.jsonl", "prompts of the PPO step's real case, in a format that `rlhf-fast ppo` reads"),
    "rankings": ("FILE.jsonl", "ranked responses of the real case, in a format that `rlhf-fast reward` reads"),
    "tokenizer": ("FOLDER", "a tokenizer for --prompts and --rankings"),
}
"""Options of a real case: metavar and help."""


def parser_of(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=tuple(CLOCKS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a model of no size: whether the bench runs, not how fast")
    parser.add_argument("--save", metavar="PATH.json", help="rewritten after each row")
    parser.add_argument("--deadline", type=float, default=0, help="seconds after which no other row is started")
    return parser


class Run:
    """A bench's rows and notes. A row that fails is a note, and the others go on."""

    def __init__(self, bench: str, options: argparse.Namespace):
        if options.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch sees no CUDA device")
        self.start = time.monotonic()
        self.bench, self.options = bench, options
        self.clock: Cpu | Gpu = CLOCKS[options.device]()
        self.bandwidth, self.product_rate = self.clock.copy_bandwidth(), self.clock.product_rate()
        self.facts = report.machine(options.device, self.bandwidth)
        self.facts["product_flops_per_second"] = self.product_rate
        self.rows: list[dict] = []
        self.notes: list[str] = []
        self.failed = False
        self.save()

    def synchronize(self) -> None:
        if self.options.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """Return the wall time of a call and of all that it leaves on the device."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def measure(self, name: str, call: Callable, *args) -> None:
        """Call unless the deadline is over. In place of what an error or the deadline leaves out, keep a note."""
        if self.options.deadline and time.monotonic() - self.start > self.options.deadline:
            self.notes.append(f"{name}: not measured: --deadline {self.options.deadline:g} is over")
            self.save()
            return
        try:
            call(*args)
        except Exception as error:  # one row's fault hides no other's
            self.failed = True
            traceback.print_exc()
            self.notes.append(f"{name}: not measured: {type(error).__name__}: {str(error).strip()[:400]}")
        finally:
            self.save()
        self.clock.empty_cache()

    def add(self, row: dict) -> None:
        """Keep a row, print it and save all."""
        self.rows.append(row)
        self.extend(row, {"after": round(time.monotonic() - self.start, 1)})

    def extend(self, row: dict, more: dict) -> None:
        """Add numbers to a row that is kept already, print it and save all."""
        row |= more
        header, line = report.whole_cells([row])
        shown = [f"{name}: {cell}" for name, cell in zip(header[1:], line[1:], strict=True) if cell]
        print(line[0], "; ".join(shown), sep=": ", flush=True)
        self.save()

    def save(self) -> None:
        """Write all that is known, if a path was given; a kill between two rows loses nothing."""
        if self.options.save:
            path = Path(self.options.save)
            path.parent.mkdir(parents=True, exist_ok=True)
            found = {"bench": self.bench, "machine": self.facts, "rows": self.rows, "notes": self.notes}
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)

    def finish(self) -> int:
        """Print what is left out; return the exit status."""
        print("\n".join([*self.notes, f"{time.monotonic() - self.start:.0f} s"]), flush=True)
        return 1 if self.failed else 0
