"""A Hugging Face causal language model, or one with a scalar head, as the stages see it.

Forward passes go through the model's own decoder; the head is ours: the decoder's hidden states and the output
embedding meet inside a fused op, so that logits are never kept. At load a few tokens are run both ways, and a model
whose head does more than a linear map, a scale and a soft cap is refused.

Rows are padded on the right and attention is causal, so no real token ever sees padding and no mask is needed.
Dropout is off everywhere unless `training(dropout)` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_fast import ops
from rlhf_fast.batches import response_mask
from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.errors import UserError, writing
from rlhf_fast.model import dropout, lora, packing
from rlhf_fast.model.pretrained import load_module, load_tokenizer, quiet

Head = Literal["lm", "scalar"]
SCORE_BIAS = "rlhf_fast_score_bias"
"""Key of config.json for what is added to the score: transformers' `score` layers have no bias. A program that does not
know the key reads the same scores shifted by a constant: rankings and differences stay."""


class Model:
    """`module` (transformers, or peft around it), its `tokenizer`, and `head`: "lm" or "scalar"."""

    def __init__(self, module: nn.Module, tokenizer=None, head: Head = "lm", cfg: ModelConfig | None = None):
        """Takes a module in memory; raises UserError if its head is not one that the fused ops can stand for."""
        self.module, self.tokenizer, self.head, self.cfg = module, tokenizer, head, cfg or ModelConfig()
        self.adapter = True
        # it asks for a mask where padding is read; ours is on the right of causal attention
        self.decoder.warn_if_padding_and_no_attention_mask = _no_warning
        dropout.switch_off(self.base)
        self._branches = dropout.ResidualDropout()
        self._packing_checked = False
        config = self.base.config.get_text_config()
        self.softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
        self.scale, self.score_bias = 1.0, float(getattr(self.base.config, SCORE_BIAS, 0.0))
        module.eval()
        self._check_causal()
        self._check_lm_head() if head == "lm" else self._check_score_head()

    @classmethod
    def load(
        cls, cfg: ModelConfig, head: Head = "lm", *, tokenizer: bool = True, fresh_head: bool = False, seed: int = 0,
        device: str | torch.device | None = None,
    ) -> Model:  # fmt: skip
        """From a folder or hub name. A scalar head must have been trained, unless `fresh_head` starts one: a row of
        N(0, 1 / (D + 1)) as in Stiennon et al. 2020, drawn by `seed`, on a language model's decoder."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        module = load_module(cfg, head, fresh_head, seed).to(device)
        if cfg.gradient_checkpointing:
            with quiet():
                module.gradient_checkpointing_enable({"use_reentrant": False})
        model = cls(module, load_tokenizer(cfg, module) if tokenizer else None, head, cfg)
        if cfg.lora.rank:
            with quiet():
                model.module = lora.attach(model.module, cfg.lora, head, seed)
            model.module.eval()
        return model

    @property
    def base(self) -> nn.Module:
        """transformers' own module, adapters and all."""
        return lora.base(self.module)

    @property
    def decoder(self) -> nn.Module:
        return self.base.base_model

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def name(self) -> str:
        return self.cfg.path or type(self.base).__name__

    @property
    def head_weight(self) -> Tensor:
        """The output embedding (V, D), or the score row (1, D)."""
        return (self.base.get_output_embeddings() if self.head == "lm" else self._score_layer()).weight

    @property
    def head_bias(self) -> Tensor | None:
        return getattr(self.base.get_output_embeddings() if self.head == "lm" else self._score_layer(), "bias", None)

    @property
    def max_positions(self) -> int:
        """Tokens a row may have; 0 = the config names no limit."""
        config = self.base.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 0)

    def trainable(self) -> dict[str, nn.Parameter]:
        """What a learner may change, by name: everything, or with LoRA the adapters (and the score row)."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def reference(self) -> Model:
        """This model as it was before its adapter: shares all memory. Only with LoRA."""
        if self.module is self.base:
            raise ValueError("Model.reference: only a model with an adapter contains its own reference")
        twin = object.__new__(Model)
        twin.__dict__ = {**self.__dict__, "adapter": False}
        return twin

    @contextmanager
    def training(self, dropout: float | None = None) -> Iterator[None]:
        """Training mode within the block. `dropout` is the residual dropout: on what each attention and MLP adds to the
        residual stream. None also switches the adapters' dropout off, as PPO must. The architecture's own dropouts
        (embedding, attention weights and so on) are off always."""
        was = self.module.training
        self.module.train()
        if dropout is None:
            for module in self.module.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
        try:
            with self._branches.on(self.decoder, dropout or 0.0):
                yield
        finally:
            self.module.train(was)

    def hidden(self, tokens: Tensor, lengths: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """(B, T, D) of the last layer, after the final norm. `lengths` is not needed: see the module's docstring.
        `positions` (B, T) that start again at 0 inside a row make it several rows that do not see one another."""
        arguments = {} if positions is None else {"position_ids": positions.to(self.device)}
        return self.run_decoder(input_ids=tokens.to(self.device), use_cache=False, **arguments).last_hidden_state

    def run_decoder(self, **arguments):
        """transformers' forward of the decoder, with or without the adapter as this model is."""
        with nullcontext() if self.adapter else self.module.disable_adapter():
            return self.decoder(**arguments)

    def predicting(
        self, tokens: Tensor, first: Tensor, lengths: Tensor, keep: Tensor | None = None, pack: bool = False
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """For the N tokens first <= t < length, row by row: the hidden states (N, D) that predict them, scaled as the
        head expects; the tokens themselves (N,); and where they stand: rows (N,) and slots t - first (N,), on the CPU.

        `keep` (B, R) bool leaves slots out. `pack` puts several rows end to end into one before the forward pass.
        A token without one before it cannot be predicted: `first` must be at least 1.
        """
        tokens, first, lengths = tokens.cpu(), first.cpu(), lengths.cpu()
        if len(first) and int(first.min()) < 1:
            raise ValueError("Model.predicting: `first` must be at least 1, a row's first token has nothing before it")
        wanted = response_mask(first, lengths)
        rows, slots = (wanted if keep is None else wanted & keep.cpu()).nonzero(as_tuple=True)
        if pack and len(tokens) > 1:
            self._check_packing()
            one_row = self.cfg.attention == "flash_attention_2"
            packed = packing.pack(tokens, lengths, capacity=int(lengths.sum()) if one_row else int(lengths.max()))
            hidden, start = self.hidden(packed.tokens, positions=packed.positions), packed.starts
        else:
            hidden, start = self.hidden(tokens), torch.arange(len(tokens)) * tokens.shape[1]
        index = (start[rows] + first[rows] + slots - 1).to(self.device)
        hidden = hidden.reshape(-1, hidden.shape[-1])[index]
        targets = tokens[rows, first[rows] + slots].to(self.device)
        return (hidden if self.scale == 1 else hidden * self.scale), targets, (rows, slots)

    def logprobs(
        self, tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each response token and the entropy it was drawn with, both (B, R) float32 nats at
        `temperature`, 0 where there is no token."""
        hidden, targets, where = self.predicting(tokens, prompt_lengths, lengths)
        logprobs, entropy = ops.linear_logprobs(
            hidden, self.head_weight, targets, bias=self.head_bias, temperature=temperature, softcap=self.softcap
        )
        shape, where = response_mask(prompt_lengths, lengths).shape, tuple(i.to(self.device) for i in where)
        zeros = torch.zeros(shape, device=self.device)
        return zeros.index_put(where, logprobs.float()), zeros.index_put(where, entropy.float())

    def values(self, tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
        """(B, R) float32: the scalar head before each response token, at the position that predicts it; 0 where there
        is no token."""
        hidden, _, where = self.predicting(tokens, prompt_lengths, lengths)
        zeros = torch.zeros(response_mask(prompt_lengths, lengths).shape, device=self.device)
        return zeros.index_put(tuple(i.to(self.device) for i in where), self.score(hidden))

    def scores(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, T) float32: the scalar head at every token."""
        return self.score(self.hidden(tokens, lengths))

    def last_scores(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B,) float32: the scalar head at the last token of each row."""
        hidden, lengths = self.hidden(tokens, lengths), lengths.to(self.device)
        return self.score(hidden[torch.arange(len(lengths), device=self.device), lengths - 1])

    def score(self, hidden: Tensor) -> Tensor:
        """The scalar head on hidden states (..., D): (...) float32."""
        with nullcontext() if self.adapter else self.module.disable_adapter():
            return F.linear(hidden.float(), self.head_weight.float())[..., 0] + self.score_bias

    def save(self, folder: str | Path) -> None:
        """An ordinary Hugging Face folder that plain transformers loads. With LoRA the adapter is merged into the
        weights there, and stands alone in `adapter/` beside them."""
        with writing(folder), quiet():
            if self.head == "scalar":
                setattr(self.base.config, SCORE_BIAS, self.score_bias)
            if self.head == "scalar" and self.tokenizer is not None and self.base.config.pad_token_id is None:
                self.base.config.pad_token_id = self.tokenizer.pad_token_id
            lora.save(self.module, Path(folder))
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)

    def _score_layer(self) -> nn.Linear:
        return lora.active(self.base.score)

    def _probe(self) -> Tensor:
        """(2, 8) tokens for the checks, none of them padding, without touching the random state."""
        config = self.base.config.get_text_config()
        tokens = (torch.arange(16, device=self.device).reshape(2, 8) * 7919 + 3) % config.vocab_size
        pad = -1 if config.pad_token_id is None else config.pad_token_id
        return torch.where(tokens == pad, (tokens + 1) % config.vocab_size, tokens)

    @torch.no_grad()
    def _check_causal(self) -> None:
        tokens = self._probe()
        if not self.hidden(tokens).isfinite().all():
            raise UserError(f"{self.name}: gives NaN or infinity on any input; its weights are spoiled")
        whole, prefix = self.hidden(tokens)[:, :5], self.hidden(tokens[:, :5])
        if not _same(whole.float(), prefix.float(), self.head_weight):
            raise UserError(f"{self.name}: its tokens see the ones after them; only causal models can be trained here")

    @torch.no_grad()
    def _check_lm_head(self) -> None:
        """Finds the scale under which our head gives the module's own logits."""
        head = self.base.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UserError(f"{self.name}: its head is a {type(head).__name__}; only a linear layer can be fused")
        tokens = self._probe()
        theirs = self.base(input_ids=tokens, use_cache=False).logits.float()
        hidden = self.hidden(tokens).float()
        for scale in _scales(self.base.config.get_text_config()):
            ours = F.linear(hidden * scale, head.weight.float(), None if head.bias is None else head.bias.float())
            ours = self.softcap * torch.tanh(ours / self.softcap) if self.softcap else ours
            if _same(ours, theirs, head.weight):
                self.scale = scale
                return
        raise UserError(
            f"{self.name}: its logits are not a linear map of the decoder's last hidden state (with a scale or soft"
            f" cap); the fused head cannot stand for {type(self.base).__name__}"
        )

    @torch.no_grad()
    def _check_score_head(self) -> None:
        layer = getattr(self.base, "score", None)
        if not isinstance(layer, nn.Linear) or layer.out_features != 1:
            raise UserError(f"{self.name}: {type(self.base).__name__} has no linear head `score` with one output")
        tokens = self._probe()[:1]
        theirs = self.base(input_ids=tokens, use_cache=False).logits.float()[0, 0] + self.score_bias
        ours = self.last_scores(tokens, torch.tensor([tokens.shape[1]]))[0]
        if not _same(ours, theirs, layer.weight):
            raise UserError(f"{self.name}: its score is not a linear map of the last token's hidden state")

    @torch.no_grad()
    def _check_packing(self) -> None:
        """Once a model: two rows packed into one must give what each gives alone."""
        if self._packing_checked:
            return
        tokens, mode = self._probe(), self.module.training
        self.module.eval()
        positions = torch.arange(8).repeat(2)[None]
        packed = self.hidden(tokens.reshape(1, 16), positions=positions).reshape(2, 8, -1).float()
        alone = self.hidden(tokens).float()
        self.module.train(mode)
        if not _same(packed, alone, self.head_weight):
            raise UserError(f"{self.name}: packed rows see one another in this architecture; set packing=false")
        self._packing_checked = True


def _no_warning(*_) -> None:
    """Stands in for transformers' warning."""


def _same(ours: Tensor, theirs: Tensor, weight: Tensor) -> bool:
    """Whether two ways to the same numbers agree as well as the weights' dtype allows."""
    tolerance = 1e-4 if weight.dtype == torch.float32 else 0.05
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1.0))


def _scales(config) -> Iterator[float]:
    """The factors on the logits that architectures are known to use (Cohere; Granite and HyperCLOVA X; Falcon-H1)."""
    yield 1.0
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if factor := getattr(config, name, None):
            yield from (float(factor), 1.0 / float(factor))
