"""Measure a decode step of the rollout, prefill and whole rollouts at the 135M and 1B shapes, with random weights.

    python -m rlhf_fast.bench.decode_step --device cuda --save PATH.json [--deadline SECONDS] [--tiny]

A step is one of `Rollout.generate`: scheduler, decoder, sampler, and the tokens' way to the host. `device` is the same
decoder and sampler queued behind a sleeping device, without the host; `busy` and the kernels are the profiler's. The
floor is the bytes of weights, keys and values over the measured copy, or prefill's operations over a measured product.
"""

import sys
import time
from dataclasses import dataclass

import torch

from rlhf_fast.batches import Prompts, pad_rows
from rlhf_fast.bench.device_profile import DeviceProfile, Profiler
from rlhf_fast.bench.shapes import SHAPES, TINY, prefill_flops, random_model, step_bytes
from rlhf_fast.bench.timing import interleaved, median_ratios
from rlhf_fast.bench.whole import Run, parser_of
from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.decoder import TokenBatch
from rlhf_fast.rollout.fused import FusedDecoder
from rlhf_fast.rollout.kv_cache import create_cache, page_size_for
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.rollout.sampler import Sampler

BASELINE = "transformers generate"
WARM, TIMED, PROFILED = 8, 24, 8  # steps of one rollout


@dataclass(frozen=True)
class Sizes:
    """Amounts that are measured."""

    context: int = 512
    steps: tuple = (("135M", 64), ("1B", 64), ("135M", 1), ("1B", 1), ("1B", 256), ("135M", 8), ("135M", 256))
    rollout: tuple[int, int, int] = (64, 128, 32)
    """prompts, tokens of each, new tokens"""
    prefill: tuple[int, int] = (64, 512)
    rounds: int = 1


TINY_SIZES = Sizes(context=48, steps=(("135M", 2), ("1B", 3)), rollout=(3, 5, 6), prefill=(3, 9))


def prompts(shape: dict, batch: int, length: int) -> Prompts:
    """Return prompts that share no token's cache."""
    tokens = torch.randint(1, shape["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(batch))
    return Prompts(list(range(batch)), tokens.tolist(), [""] * batch)


def settings(batch: int, new: int) -> SamplingConfig:
    return SamplingConfig(max_new_tokens=new, batch=batch)


class StepTimes:
    """A progress callback: it notes the tokens and the time after each step. Several steps may end in one call."""

    def __init__(self, batch: int):
        self.batch, self.tokens = batch, 0
        self.stamps: list[tuple[int, float]] = []

    def __call__(self, tokens: int, finished: int) -> None:
        self.tokens += tokens
        if self.tokens >= WARM * self.batch:
            self.stamps.append((self.tokens, time.perf_counter()))

    @property
    def seconds(self) -> float:
        """Seconds a step."""
        (first, start), (last, end) = self.stamps[0], self.stamps[-1]
        return (end - start) * self.batch / (last - first)


class StepProfile:
    """A progress callback that profiles the steps after the first WARM."""

    def __init__(self, device: str, batch: int):
        self.batch, self.tokens, self.first = batch, 0, 0
        self.profiler: Profiler | None = Profiler(device)
        self.found: DeviceProfile | None = None

    def __call__(self, tokens: int, finished: int) -> None:
        self.tokens += tokens
        steps = self.tokens // self.batch
        if steps >= WARM and not self.first:
            self.first = steps
            self.profiler.start()
        elif self.first and self.profiler and steps >= self.first + PROFILED:
            self.found, self.profiler = self.profiler.stop(steps - self.first), None


def queued_step(run: Run, model: Model, batch: int, context: int) -> float | None:
    """Return seconds of the device alone for decoder and sampler, on a cache full of noise; None on a CPU."""
    decoder, device = FusedDecoder.make(model), model.device
    lengths = [context] * batch
    pages = -(-context // page_size_for(device))
    cache = create_cache(decoder.shapes, decoder.dtype, device, lengths, batch * pages, batch)
    cache.memory.normal_()
    for slot in range(batch):
        cache.assign(slot, cache.allocate(cache.pages_for(context)))
    rows = torch.arange(batch, device=device)
    tokens = TokenBatch(rows + 1, torch.full_like(rows, context - 1).int(), rows.int(), cache.block_table)
    sampler = Sampler(model, settings(batch, 4), [], 1)
    steps = torch.zeros_like(rows)
    host_steps = steps.cpu().numpy()

    def step():
        return sampler(decoder.hidden(cache, tokens), rows, steps, host_steps)

    with torch.no_grad(), decoder.session():
        step()
        if run.options.device == "cpu":
            return None
        return sorted(run.clock.queued_seconds(step) for _ in range(5))[2]


def step_row(run: Run, name: str, model: Model, shape: dict, batch: int, sizes: Sizes) -> dict:
    """Return the row of a decode step at a mean context of `sizes.context`."""
    times, rollout = StepTimes(batch), Rollout(model, settings(batch, WARM + TIMED))
    rollout.generate(prompts(shape, batch, sizes.context - WARM - TIMED // 2), progress=times)
    weights = sum(p.nbytes for p in model.module.parameters())
    moved = step_bytes(shape, weights, batch, sizes.context, model.head_weight.element_size())
    return {
        "row": f"decode step {name}, B = {batch}, context {sizes.context}", "model": name, "batch": batch,
        "seconds": times.seconds, "bytes": moved, "floor_seconds": moved / run.bandwidth,
        "tokens_per_second": batch / times.seconds, "decode_path": rollout.decode_path,
    }  # fmt: skip


def step_profile(run: Run, model: Model, shape: dict, batch: int, sizes: Sizes) -> dict:
    """Return launches, busy seconds and kernels of a step. The profiler slows what is timed after it: it comes last."""
    attached = Profiler(run.options.device)  # before the step is captured: it sees the kernels of later graphs only
    attached.start()
    torch.zeros(1, device=model.device)
    attached.stop(1)
    profile = StepProfile(run.options.device, batch)
    given = prompts(shape, batch, sizes.context - WARM - PROFILED // 2)
    Rollout(model, settings(batch, WARM + PROFILED + 2)).generate(given, progress=profile)
    return profile.found._asdict() if profile.found else {}


def prefill_profile(run: Run, model: Model, shape: dict, sizes: Sizes) -> dict:
    """Return launches, busy seconds and kernels of prefill and the first token of each prompt."""
    batch, length = sizes.prefill
    rollout, given = Rollout(model, settings(batch, 1)), prompts(shape, batch, length)
    rollout.generate(given)
    profiler = Profiler(run.options.device)
    profiler.start()
    rollout.generate(given)
    found = profiler.stop(1)
    return found._asdict() if found else {}


def left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens (B, T) int64 with each row at the end, and the mask (B, T) int64 of its tokens."""
    reversed_rows, lengths = pad_rows([row[::-1] for row in rows])
    mask = torch.arange(reversed_rows.shape[1]) < lengths[:, None]
    return reversed_rows.flip(1), mask.flip(1).long()


def transformers_generate(model: Model, given: Prompts, new: int) -> None:
    """Sample exactly `new` tokens a prompt by transformers' own loop and cache, short prompts padded on the left."""
    ids, mask = (x.to(model.device) for x in left_padded(given.tokens))
    found = model.module.generate(
        ids, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, do_sample=True,
        temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    if found.shape[1] != ids.shape[1] + new:
        raise RuntimeError(f"generate returned {found.shape[1] - ids.shape[1]} new tokens, not {new}")


def rollout_row(run: Run, name: str, model: Model, shape: dict, sizes: Sizes) -> dict:
    """Return the row of a whole rollout beside transformers' generate on the same prompts."""
    batch, length, new = sizes.rollout
    given = prompts(shape, batch, length)
    rollout = Rollout(model, settings(batch, new))

    def ours() -> float:
        return run.seconds(lambda: rollout.generate(given))

    def theirs() -> float:
        return run.seconds(lambda: transformers_generate(model, given, new))

    Rollout(model, settings(batch, 4)).generate(given)
    transformers_generate(model, given, 1)
    times = interleaved({BASELINE: theirs, "ours": ours}, rounds=sizes.rounds)
    best = {provider: min(taken) for provider, taken in times.items()}
    return {
        "row": f"rollout {name}, {batch} prompts of {length} tokens, {new} new", "seconds": best["ours"],
        "tokens_per_second": batch * new / best["ours"], "ratios": median_ratios(times, "ours"),
        "others": {BASELINE: {"seconds": best[BASELINE], "tokens_per_second": batch * new / best[BASELINE]}},
    }  # fmt: skip


def prefill_row(run: Run, name: str, model: Model, shape: dict, sizes: Sizes) -> dict:
    """Return the row of prefill, with one sampled token, beside the model's own forward pass with a cache."""
    batch, length = sizes.prefill
    given = prompts(shape, batch, length)
    rollout, ids = Rollout(model, settings(batch, 1)), torch.tensor(given.tokens, device=model.device)

    def ours() -> float:
        """Time up to the first token; tokens are sorted into rows after it."""
        stamps: list[float] = []
        run.synchronize()
        start = time.perf_counter()
        rollout.generate(given, progress=lambda *_: stamps.append(time.perf_counter()))
        return stamps[0] - start

    @torch.no_grad()
    def theirs() -> float:
        return run.seconds(lambda: model.decoder(input_ids=ids, use_cache=True))

    ours(), theirs()
    times = interleaved({"transformers forward": theirs, "ours": ours}, rounds=3)
    flops, weights = prefill_flops(shape, batch, length), sum(p.nbytes for p in model.module.parameters())
    best = {provider: min(taken) for provider, taken in times.items()}
    return {
        "row": f"prefill {name}, {batch} prompts of {length} tokens", "seconds": best["ours"], "flops": flops,
        "bytes": weights, "floor_seconds": max(flops / run.product_rate, weights / run.bandwidth),
        "tokens_per_second": batch * length / best["ours"], "ratios": median_ratios(times, "ours"),
        "others": {"transformers forward": {"seconds": best["transformers forward"]}},
    }  # fmt: skip


class Bench:
    """The measurements, in the order of their worth. The profiler slows what is timed after it: it comes last."""

    def __init__(self, run: Run, sizes: Sizes, shapes: dict[str, dict]):
        self.run, self.sizes, self.shapes = run, sizes, shapes
        self.models: dict[str, Model] = {}

    def __call__(self) -> None:
        run = self.run
        for name, batch in self.sizes.steps:
            run.measure(f"decode step {name}, B = {batch}", self.step, name, batch)
        steps = list(run.rows)
        run.measure("prefill 1B", self.prefill, "1B")
        for row in steps[:2]:
            run.measure(f"{row['row']}, device", self.device_time, row)
        for name in self.shapes:
            run.measure(f"rollout {name}", self.rollout, name)
        for row in steps[:2]:
            run.measure(f"{row['row']}, profile", self.profile, row)
        run.measure("prefill 1B, profile", self.prefill_profile, "1B")
        for row in steps[2:]:
            run.measure(f"{row['row']}, profile", self.profile, row)

    def model_of(self, name: str) -> Model:
        if name not in self.models:
            self.models[name] = random_model(self.shapes[name], self.run.options.device, torch.bfloat16)
        return self.models[name]

    def step(self, name: str, batch: int) -> None:
        self.run.add(step_row(self.run, name, self.model_of(name), self.shapes[name], batch, self.sizes))

    def device_time(self, row: dict) -> None:
        seconds = queued_step(self.run, self.model_of(row["model"]), row["batch"], self.sizes.context)
        self.run.extend(row, {"device_seconds": seconds})

    def rollout(self, name: str) -> None:
        self.run.add(rollout_row(self.run, name, self.model_of(name), self.shapes[name], self.sizes))

    def prefill(self, name: str) -> None:
        self.run.add(prefill_row(self.run, name, self.model_of(name), self.shapes[name], self.sizes))

    def prefill_profile(self, name: str) -> None:
        row = next(row for row in self.run.rows if row["row"].startswith("prefill"))
        self.run.extend(row, prefill_profile(self.run, self.model_of(name), self.shapes[name], self.sizes))

    def profile(self, row: dict) -> None:
        model, shape = self.model_of(row["model"]), self.shapes[row["model"]]
        self.run.extend(row, step_profile(self.run, model, shape, row["batch"], self.sizes))


def main(arguments: list[str] | None = None) -> int:
    options = parser_of(__doc__.partition("\n")[0]).parse_args(arguments)
    run = Run("decode_step", options)
    Bench(run, *(TINY_SIZES, dict.fromkeys(SHAPES, TINY)) if options.tiny else (Sizes(), SHAPES))()
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
