"""A Hugging Face causal language model, or one with a scalar head, as the stages use it.

The head is ours: a fused op takes the decoder's hidden states and the output embedding, so that no logits are stored.
When a model is created, a few tokens are run through both heads; a model whose head does more than a linear map, a
scale and a soft cap is refused.

Forward passes run our own layers on packed rows where they serve the model (model/packed_decoder.py), else the model's
own decoder: there rows are padded on the right and attention is causal, so no real token sees padding and no mask is
needed. All dropout is off, unless `train_mode(dropout)` turns residual dropout on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_fast import ops
from rlhf_fast.batches import last_columns, response_mask
from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.errors import UserError, writing
from rlhf_fast.model import checks, lora, packed_decoder, packing, pretrained
from rlhf_fast.model.adjacent_weights import make_adjacent
from rlhf_fast.model.architectures import read_decoder
from rlhf_fast.model.dropout import ResidualDropout, config_without_dropout, disable_dropout
from rlhf_fast.model.end_tokens import in_generation_config
from rlhf_fast.model.logit_scales import SOFTCAPS
from rlhf_fast.model.modules import set_training_modes, training_modes
from rlhf_fast.model.packed_graphs import PackedGraphs
from rlhf_fast.model.pad_token import give_pad_token, pad_ends_rows
from rlhf_fast.model.vocabulary import Vocabulary, probe_tokens

Head = Literal["lm", "scalar"]


class Model:
    """`module` (a transformers model, or a peft model around one), its `tokenizer`, and the kind of its `head`."""

    def __init__(self, module: nn.Module, tokenizer=None, head: Head = "lm", cfg: ModelConfig | None = None):
        """Wrap a module that is in memory. UserError if its head is not one that the fused ops can compute."""
        lora.check_mergeable(pretrained.require_module(module))
        self.module, self.tokenizer = module, tokenizer
        self.head: Head = head
        self.cfg = cfg or ModelConfig()
        self.adapter_enabled = True
        self.exact = False  # True: repeat the arithmetic of the rollout's compiled decode step (rollout/exact.py)
        self._vocabulary: Vocabulary | None = None
        # transformers warns if the input holds padding and no mask; with padding on the right none is needed
        self.decoder.warn_if_padding_and_no_attention_mask = _no_warning
        disable_dropout(self.base)
        self._residual_dropout = ResidualDropout()
        self._packing_checked = False
        self._packed_refusals: dict[tuple[Any, ...], str | None] = {}
        self._packed_graphs = PackedGraphs()
        caps = (pretrained.config_number(self.name, self.text_config, name) for name in SOFTCAPS)
        self.softcap = next(filter(None, caps), 0.0)
        self.logit_scale = 1.0
        self.score_bias = pretrained.config_number(self.name, self.base.config, pretrained.SCORE_BIAS)
        self.score_pad = self.text_config.pad_token_id if head == "scalar" else None
        if hasattr(self.base.config, pretrained.SCORE_BIAS) and not hasattr(self.base.config, pretrained.SCORE_TOKEN):
            self.score_pad = None  # written before reward models had a padding token that ends nothing
        self._always_eval: set[nn.Module] = set()
        if head == "scalar":
            pretrained.check_score_layer(self.base, self.name)
        module.eval()
        try:
            self._always_eval = checks.check_decoder(self)
            if head == "lm":
                self.logit_scale = checks.find_logit_scale(self)
            else:
                checks.check_score_head(self)
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the code of an architecture may fail in any way
            raise UserError(
                f"{self.name}: {type(self.base).__name__} cannot be used here, a forward of plain tokens fails:"
                f" {type(error).__name__} {' '.join(str(error).split())[:200]}"
            ) from error

    @classmethod
    def load(
        cls, cfg: ModelConfig | str | Path, head: Head = "lm", *, tokenizer: bool = True, fresh_head: bool = False,
        seed: int = 0, device: str | torch.device | None = None,
    ) -> Model:  # fmt: skip
        """Load a model from a folder or hub name, which may be given alone, without a ModelConfig. A scalar head must
        have been trained, unless `fresh_head` is set: then a missing one is a row of N(0, 1 / (D + 1)) on a language
        model's decoder, drawn with `seed`, as in Stiennon et al. 2020."""
        cfg = pretrained.model_config(cfg)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        module, is_new_head = pretrained.load_module(cfg, head, fresh_head, seed, device)
        loaded_tokenizer = pretrained.load_tokenizer(cfg, module) if tokenizer else None
        older = hasattr(module.config, pretrained.SCORE_BIAS) and not hasattr(module.config, pretrained.SCORE_TOKEN)
        if is_new_head or (older and pad_ends_rows(module, loaded_tokenizer)):
            with pretrained.quiet():
                give_pad_token(module, loaded_tokenizer)
        if cfg.gradient_checkpointing:
            with pretrained.quiet():
                module.gradient_checkpointing_enable({"use_reentrant": False})
        model = cls(module, loaded_tokenizer, head, cfg)
        if cfg.lora.rank:
            with pretrained.quiet():
                model.module = lora.attach(module, cfg.lora, head, seed)
            model.module.eval()
        return model

    @property
    def base(self) -> PreTrainedModel:
        """transformers' own module, its layers wrapped by adapters if there are any."""
        return lora.unwrap(self.module)

    @property
    def decoder(self) -> Any:
        """The module that maps tokens to hidden states. Its attributes depend on the architecture."""
        base: Any = self.base
        return base.model if base.base_model is base else base.base_model  # Llama4ForCausalLM has no base_model

    @property
    def text_config(self) -> Any:
        """transformers' config of the language model. Its attributes depend on the architecture."""
        return self.base.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def name(self) -> str:
        return self.cfg.path or type(self.base).__name__

    @property
    def head_weight(self) -> Tensor:
        """The output embedding's rows up to the last token (num_tokens, D), or the score row (1, D)."""
        weight = self.head_layer.weight
        return weight if self.head == "scalar" else self.vocabulary.head_weight(weight)

    @property
    def head_bias(self) -> Tensor | None:
        """The bias (num_tokens,) of these rows, which also masks those without a token; or the score's bias."""
        bias = getattr(self.head_layer, "bias", None)
        return bias if self.head == "scalar" else self.vocabulary.head_bias(bias, self.head_layer.weight)

    @property
    def head_layer(self) -> Any:
        """transformers' own layer: the output embedding with all its rows, or the score row."""
        return self.base.get_output_embeddings() if self.head == "lm" else lora.active_layer(self.base.score)

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids that have a token."""
        if self._vocabulary is None or self._vocabulary.tokenizer is not self.tokenizer:
            self._vocabulary = Vocabulary(self.tokenizer, self.num_rows, self.name)
        return self._vocabulary

    @property
    def num_tokens(self) -> int:
        """Last id of a token, plus 1; all sampled ids are below it. A model that reads them needs so many `num_rows`.
        Without a tokenizer, the number of rows."""
        return self.vocabulary.num_tokens

    @property
    def num_rows(self) -> int:
        """Number of ids that the model can read, and with a language head predict."""
        base: Any = self.base
        layers = [base.get_input_embeddings(), base.get_output_embeddings() if self.head == "lm" else None]
        return min(layer.weight.shape[0] for layer in layers if layer is not None)

    @property
    def max_positions(self) -> int:
        """Maximum number of tokens in a row; 0 if the config names no limit."""
        return max(int(getattr(self.text_config, "max_position_embeddings", None) or 0), 0)

    def prepare_training(self) -> None:
        """Move weights for which one product serves next to one another, on a CPU; on a GPU a rollout does."""
        if self.device.type == "cpu":
            make_adjacent(self.decoder)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters to train, by name: all, or with LoRA the adapters (and the score row)."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def reference(self) -> Model:
        """Return this model without its adapter. It shares all memory. Only with LoRA."""
        if self.module is self.base:
            raise ValueError("Model.reference: only a model with an adapter contains its own reference")
        lora.check_unchanged_base(self.module)
        twin = object.__new__(Model)
        twin.__dict__ = {**self.__dict__, "adapter_enabled": False}
        return twin

    @contextmanager
    def train_mode(self, dropout: float | None = None) -> Iterator[None]:
        """Set training mode within the block. `dropout` is the probability of residual dropout: on the outputs that
        attention and MLP add to the residual stream. None turns the adapters' dropout off too, which PPO needs. The
        architecture's own dropouts (embedding, attention weights and so on) are always off."""
        modes = training_modes(self.module)
        in_eval = nn.modules.dropout._DropoutNd if dropout is None else ()
        set_training_modes([(m, m not in self._always_eval and not isinstance(m, in_eval)) for m, _ in modes])
        try:
            with config_without_dropout(self.base), self._residual_dropout.enabled(self.decoder, dropout or 0.0):
                yield
        finally:
            set_training_modes(modes)

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Set evaluating mode within the block, in `train_mode` too."""
        modes = training_modes(self.module)
        set_training_modes([(module, False) for module, _ in modes])
        try:
            with self._residual_dropout.enabled(self.decoder, 0.0):
                yield
        finally:
            set_training_modes(modes)

    def hidden(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the hidden states (B, T, D) of the last layer after the final norm. `positions` (B, T) that start
        again at 0 inside a row split it into several rows that do not see one another."""
        kwargs = {} if positions is None else {"position_ids": positions.to(self.device)}
        return self.run_decoder(input_ids=tokens.to(self.device), use_cache=False, **kwargs).last_hidden_state

    def run_decoder(self, **kwargs):
        """Call the decoder's forward, with the adapter only if `adapter_enabled`."""
        with self._adapter_context():
            return self.decoder(**kwargs)

    @property
    def packs_rows(self) -> bool:
        """True where forward passes run our own layers on packed rows."""
        return self.packed_refusal is None

    @property
    def packed_refusal(self) -> str | None:
        """Why forward passes run the module's own decoder on padded rows. None if they run ours on packed rows."""
        return self._find_packed_refusal(packed_decoder.inspect(self.decoder))

    def _find_packed_refusal(self, found: packed_decoder.Inspection) -> str | None:
        if why := packed_decoder.find_obstacle(self, found, self._residual_dropout, self._packed_graphs.failed):
            return why
        trains = any(p.requires_grad for p in (*found.parameters, self.head_layer.weight))
        key = (found.kinds, self.device, self.head_layer.weight.dtype, trains, self.adapter_enabled, self.exact)
        if key not in self._packed_refusals:
            self._packed_refusals[key] = packed_decoder.find_refusal(self)
        return self._packed_refusals[key]

    def run_packed(
        self, rows: packing.PackedRows, kept: Tensor, found: packed_decoder.Inspection | None = None,
        graphs: bool = True,
    ) -> Tensor:  # fmt: skip
        """Return the hidden states (n, D) after the final norm of the tokens at index `kept` (n,) of packed rows,
        computed by our own layers. found: the decoder as it is now; None = it is looked at here. graphs: as CUDA
        graphs, where that is possible."""
        found, dropout = found or packed_decoder.inspect(self.decoder), self._residual_dropout.p
        with self._adapter_context():
            if graphs and not found.checkpoints:
                states = self._packed_graphs.run(self, found, rows, kept, dropout)
                if states is not None:
                    return states
            options = (dropout, found.checkpoints, self.exact)
            return packed_decoder.packed_hidden(read_decoder(self.decoder), rows, kept, *options)

    def hidden_and_targets(
        self, tokens: Tensor, first: Tensor, lengths: Tensor, keep: Tensor | None = None, pack: bool = False
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return, for the N tokens first <= t < length of all rows, in row order: the hidden states (N, D) that predict
        them, scaled as the head expects; the tokens (N,); and their rows (N,) and columns t - first (N,), on the CPU.

        `keep` (B, R) bool selects tokens. `pack` joins several rows into one before the module's own forward pass.
        Rows whose tokens before `first` are equal share them, where our own layers run.
        `first` must be at least 1, because nothing predicts a row's first token.
        """
        tokens, first, lengths = tokens.cpu(), first.cpu().long(), lengths.cpu().long()
        if len(first) and int(first.min()) < 1:
            raise ValueError(
                "Model.hidden_and_targets: `first` must be at least 1, a row's first token has nothing before it"
            )
        valid = response_mask(first, lengths)
        if keep is not None:
            valid &= keep.cpu()
        rows, columns = valid.nonzero(as_tuple=True)
        last = first[rows] + columns - 1  # the token that predicts each
        targets = packing.to_device(tokens[rows, last + 1], self.device)
        hidden = self._hidden_at(tokens, first, lengths, rows, last, pack)
        return self.for_head(hidden), targets, (rows, columns)

    def for_head(self, hidden: Tensor) -> Tensor:
        """Return hidden states as the output embedding's ops read them: scaled, and where `exact` in its dtype."""
        scaled = hidden if self.logit_scale == 1 else hidden * self.logit_scale
        return scaled.to(self.head_layer.weight.dtype) if self.exact else scaled

    def _hidden_at(
        self, tokens: Tensor, prompt_lengths: Tensor | None, lengths: Tensor, rows: Tensor, columns: Tensor,
        pack: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return the hidden states (N, D) of the tokens at `columns` of `rows`, by our own layers where they run."""
        found = packed_decoder.inspect(self.decoder)
        if (why := self._find_packed_refusal(found)) and self.exact:
            raise UserError(f"{self.name}: a pass cannot be exact, because {why}; set exact to false")
        if why:
            return self._module_hidden(tokens, lengths, pack, rows, columns)
        needed = torch.zeros_like(lengths).scatter_reduce(0, rows, columns + 1, "amax")
        prompts = None if prompt_lengths is None else torch.minimum(prompt_lengths, needed)
        packed_rows = packing.pack_rows(tokens, needed, prompts)
        return self.run_packed(packed_rows, packed_rows.locate(rows, columns), found)

    def _module_hidden(self, tokens: Tensor, lengths: Tensor, pack: bool, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the module's own hidden states (N, D) of the tokens at `columns` of `rows`."""
        if pack and len(tokens) > 1:
            if not self._packing_checked:
                checks.check_packing(self)
                self._packing_checked = True
            one_row = self.cfg.attention == "flash_attention_2"
            packed = packing.pack(tokens, lengths, capacity=int(lengths.sum()) if one_row else int(lengths.max()))
            hidden = self.hidden(packed.tokens, packed.positions)
            starts = packed.starts
        else:
            hidden = self.hidden(tokens)
            starts = torch.arange(len(tokens)) * tokens.shape[1]
        return hidden.reshape(-1, hidden.shape[-1])[packing.to_device(starts[rows] + columns, self.device)]

    def logprobs(
        self, tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor, temperature: float = 1.0,
        sampled_tokens_only: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the log-probability of each response token and the entropy of its distribution, both (B, R) float32
        nats at `temperature`, 0 outside the response. sampled_tokens_only: of the distribution that a rollout samples
        from, without a share for the embedding's rows that have no token; transformers counts all rows."""
        hidden, targets, where = self.hidden_and_targets(tokens, prompt_lengths, lengths)
        weight, bias = self.head_layer.weight, getattr(self.head_layer, "bias", None)
        if sampled_tokens_only:
            weight, bias = self.head_weight, self.head_bias
        logprobs, entropy, _, _ = ops.linear_logprobs(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=self.softcap
        )
        shape = response_mask(prompt_lengths, lengths).shape
        return self._scatter(logprobs, where, shape), self._scatter(entropy, where, shape)

    def values(self, tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
        """Return the scalar head's output (B, R) float32 before each response token, at the position that predicts it;
        0 outside the response."""
        hidden, _, where = self.hidden_and_targets(tokens, prompt_lengths, lengths)
        return self._scatter(self.score_hidden(hidden), where, response_mask(prompt_lengths, lengths).shape)

    def _scatter(self, values: Tensor, where: tuple[Tensor, Tensor], shape: torch.Size) -> Tensor:
        """Return (B, R) float32 with `values` (N,) at (rows, columns), 0 elsewhere."""
        index = tuple(packing.to_device(x, self.device) for x in where)
        return torch.zeros(shape, device=self.device).index_put(index, values.float())

    def last_scores(self, tokens: Tensor, lengths: Tensor, prompt_lengths: Tensor | None = None) -> Tensor:
        """Return the scalar head's output (B,) float32 at the last token of each row that is not padding: transformers'
        rule, which a head that was trained elsewhere may have learned with its end token as padding.

        prompt_lengths (B,): rows with equal prompts share them, where our own layers run."""
        tokens, lengths = tokens.cpu(), lengths.cpu().long()
        rows, last = torch.arange(len(tokens)), last_columns(tokens, lengths, self.score_pad)
        prompts = None if prompt_lengths is None else prompt_lengths.cpu().long()
        return self.score_hidden(self._hidden_at(tokens, prompts, lengths, rows, last))

    def score_hidden(self, hidden: Tensor) -> Tensor:
        """Return the scalar head's output (...) float32 on hidden states (..., D)."""
        with self._adapter_context():
            bias = None if self.head_bias is None else self.head_bias.float()
            linear = ops.linear if self.exact else F.linear  # the former's bits depend on the row alone
            return linear(hidden.float(), self.head_weight.float(), bias)[..., 0] + self.score_bias

    def save(self, folder: str | Path) -> float:
        """Write a Hugging Face folder that plain transformers loads. With LoRA, its weights have the adapter merged,
        and `adapter/` inside it holds the adapter alone. Return the share of the adapter's change that the merged
        weights keep: in half precision a small one is partly rounded away. It is 1 without an adapter."""
        with writing(folder), pretrained.quiet():
            if self.head == "scalar":
                setattr(self.base.config, pretrained.SCORE_BIAS, self.score_bias)
                setattr(self.base.config, pretrained.SCORE_TOKEN, "last that is not padding")
            with in_generation_config(self):
                share = lora.save(self.module, Path(folder))
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
        return share

    def probe_tokens(self, rows: int, length: int) -> Tensor:
        """Return fixed tokens (rows, length), none of them padding, to compare two forward passes. They do not change
        torch's random state."""
        left_out = self.text_config.pad_token_id, *self.vocabulary.unused
        return probe_tokens(self.num_tokens, left_out, rows, length).to(self.device)

    def _adapter_context(self):
        return nullcontext() if self.adapter_enabled else lora.adapter_disabled(self.module)


def _no_warning(*_) -> None:
    """Replace transformers' warning."""
