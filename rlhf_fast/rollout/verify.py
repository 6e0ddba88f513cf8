"""Whether a decoder computes what its model computes: tried once, before anything is sampled with it."""

from __future__ import annotations

import torch

from rlhf_fast.model.model import Model
from rlhf_fast.rollout.decoder import Decoder, Packed, Unsupported
from rlhf_fast.rollout.kv_cache import Arena

PAGE = 4
LENGTH = 12


@torch.no_grad()
def prove(model: Model, decoder: Decoder) -> None:
    """Ragged rows, prefilled in two calls, then decoded together: Unsupported unless every hidden state is the one
    that the module's own forward gives."""
    limit = min(model.max_positions or LENGTH, LENGTH)
    if limit < 4:
        raise Unsupported(f"{limit} positions are too few to try it")
    tokens = model.probe_tokens(3, limit)
    starts = [limit - 3, 1, limit // 2]
    pages = -(-limit // PAGE)
    arena = Arena(decoder.shapes, decoder.dtype, tokens.device, 3 * pages, 3, pages, PAGE)
    for slot in range(3):
        arena.seat(slot, arena.take(pages))
    cut = starts[0] + 1 + starts[2] // 2
    places = [(slot, position) for slot, start in enumerate(starts) for position in range(start)]
    calls = [places[:cut], places[cut:]]
    calls += [[(slot, start + i) for slot, start in enumerate(starts)] for i in range(limit - max(starts))]
    found = torch.full((3, limit, model.head_weight.shape[1]), torch.nan, dtype=torch.float32, device=tokens.device)
    for call in calls:
        slots, positions = torch.tensor(call, device=tokens.device).unbind(1)
        packed = Packed(tokens[slots, positions], positions.int(), slots.int(), arena.block_table)
        found[slots, positions] = decoder.hidden(arena, packed).float()
    for slot, start in enumerate(starts):
        length = start + limit - max(starts)
        wanted = model.hidden(tokens[slot : slot + 1, :length])[0].float()
        gaps = (found[slot, :length] - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-6)
        # in half precision a single token may be far off by rounding, most of them not
        most, usual = (1e-4, 1e-4) if decoder.dtype == torch.float32 else (0.3, 0.1)
        if not (gaps.max() <= most and gaps.median() <= usual):
            raise Unsupported(f"its hidden states over our cache are off by {gaps.max():.1%}")
