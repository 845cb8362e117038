"""A Llama-like decoder whose layers attend to a window and a few far distances, or to everything."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, GenerationMixin, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from fibattn.attention.checks import check_for_tokens
from fibattn.errors import InputError
from fibattn.model import batching
from fibattn.model.cache import CACHE_NAME, only_cache
from fibattn.model.configuration import FibAttnConfig, FoundByShim
from fibattn.model.feed_forward import is_plain
from fibattn.model.gate import FibAttnGate
from fibattn.model.layers import FibAttnAttention, FibAttnDecoderLayer
from fibattn.model.loss import IGNORED, linear_cross_entropy
from fibattn.model.norm import FibAttnRMSNorm
from fibattn.model.positions import (
    TAKES_MASKS,
    Shard,
    document_lengths,
    document_positions,
    full_mask,
    packed_positions,
    says_nothing,
)
from fibattn.model.rotary import FibAttnRotaryEmbedding


class FibAttnPreTrainedModel(FoundByShim, PreTrainedModel):
    """What the models share: initialisation, and what Transformers may do with them."""

    config_class = FibAttnConfig
    config: FibAttnConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FibAttnDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": FibAttnDecoderLayer}  # noqa: RUF012

    def __init__(self, config: FibAttnConfig):
        super().__init__(config)
        if any(map(config.learns_alpha, range(config.num_hidden_layers))):
            self._keep_in_fp32_modules_strict = {"theta"}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights, residual outputs scaled by 1 / sqrt(2 layers) (paper, section 4).

        Buffers that are not saved must be filled here too: loading a checkpoint leaves them uninitialised.
        """
        std = self.config.initializer_range or 0.0
        if isinstance(module, nn.Linear | nn.Embedding):
            if getattr(module, "writes_residual", False):
                std *= 0.0 if self.config.zero_init_outputs else (2 * self.config.num_hidden_layers) ** -0.5
            initialization.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            initialization.ones_(module.weight)
        elif isinstance(module, FibAttnAttention):
            if module.theta is not None:
                initialization.zeros_(module.theta)
            if module.trust is not None:
                initialization.ones_(module.trust)
            if module.kv_convolution is not None:
                initialization.zeros_(module.kv_convolution)
        elif isinstance(module, FibAttnGate):
            initialization.zeros_(module.weight)
        elif isinstance(module, FibAttnDecoderLayer) and module.skip is not None:
            initialization.copy_(module.skip, module.skip.new_tensor([1.0, 0.0]))
        elif isinstance(module, FibAttnRotaryEmbedding):
            initialization.copy_(module.inv_freq, module.frequencies())
            initialization.copy_(module.original_inv_freq, module.frequencies())

    def _resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As Transformers', and the value embeddings with it."""
        decoder: Any = self.base_model
        for layer in decoder.layers:
            if layer.self_attn.value_embedding is not None:
                self._get_resized_embeddings(layer.self_attn.value_embedding, *args, **kwargs)
        return super()._resize_token_embeddings(*args, **kwargs)


class FibAttnModel(FibAttnPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: FibAttnConfig):
        config.check_offsets()
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(FibAttnDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = FibAttnRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.embed_norm = FibAttnRMSNorm(config.hidden_size, eps=config.rms_norm_eps) if config.embedding_skip else None
        self.rotary_emb = FibAttnRotaryEmbedding(config, scaled=False)
        scaled = config.rope_parameters["rope_type"] != "default"  # pyright: ignore
        self.scaled_rotary_emb = FibAttnRotaryEmbedding(config, scaled=True) if scaled else None
        self.gradient_checkpointing = False
        self.full_reach = config.full_reach
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every token; arguments as in every Transformers decoder.

        `position_ids` that restart mark packed documents (without a cache, as in Transformers), and so does
        `cu_seq_lens_q`, int32 (documents + 1): where each begins in the only row, and where the last ends. A 2-D
        `attention_mask` marks padding on either side, of rows that may be packed; one of ones says nothing.
        `past_key_values` is the older name of `cache`. No gradients pass through it but those of unbounded full layers.

        Raises:
            InputError: for input_ids of another shape, inputs_embeds where there are value embeddings, a mask with
                holes or more than two dimensions, which the sparse layers cannot apply, packed documents with a cache
                where there are full layers, `cu_seq_lens_q` that do not fit the row or come with a mask or a cache, a
                cache under gradient checkpointing, which would run its updates twice, or a `full_reach` that was
                changed after loading.
        """
        hidden = embedded = self._embedded(input_ids, inputs_embeds)
        if position_ids is not None:
            check_for_tokens("position_ids", position_ids, *hidden.shape[:2])
        cache = only_cache(cache, past_key_values)
        past = 0 if cache is None or isinstance(cache, PagedAttentionCache) else cache.get_seq_length()
        cache_positions = torch.arange(hidden.shape[1], device=hidden.device)[None] + past
        masks, documents = self._masks_and_documents(hidden, attention_mask, position_ids, cache, kwargs)
        if position_ids is None:
            position_ids = cache_positions if documents is None else documents
        # Made after the masks: where there is a cache, even an empty one, Transformers looks for no packed documents.
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise InputError("a cache was given under gradient checkpointing; leave it out, or call eval() first")
        plain = self.rotary_emb(hidden, position_ids)
        scaled = plain if self.scaled_rotary_emb is None else self.scaled_rotary_emb(hidden, position_ids)
        # Fewer than there are where `assistant_early_exit` drafts with the first of them.
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden = layer(
                hidden,
                embedded=embedded,
                rotation=scaled if layer.self_attn.scales_rope else plain,  # pyright: ignore
                attention_mask=masks.get("full_attention"),
                positions=masks.get("positions"),
                cache=cache,
                cache_positions=cache_positions,
                position_ids=position_ids,
                token_ids=input_ids,
                **kwargs,
            )
        kept: dict[str, Any] = {CACHE_NAME: cache}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **kept)

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """What the first layer is given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None and input_ids.dim() != 2:
            raise InputError(f"input_ids have shape {tuple(input_ids.shape)}; expected (batch, tokens)")
        if input_ids is None and self.config.value_embeddings:
            raise InputError(
                "inputs_embeds are given, but this model has value_embeddings, which need ids: give input_ids"
            )
        if self.config.full_reach != self.full_reach:
            raise InputError(
                f"full_reach was {self.full_reach} when the model was made and is {self.config.full_reach} now; load "
                f"it anew: from_pretrained(…, full_reach={self.config.full_reach})"
            )
        hidden: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.embed_norm is not None:
            hidden = self.embed_norm(hidden)
        if self.config.autocast_residual and torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        if 0 in hidden.shape[:2]:
            raise InputError("there are no tokens; a prompt has at least one, such as the model's bos_token_id")
        return hidden

    def _masks_and_documents(
        self,
        hidden: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        cache: Cache | None,
        given: dict[str, Any],
    ) -> tuple[dict[str, Any], Tensor | None]:
        """What `prepare_masks` gives, and the position ids by which documents begin; `given` is for the layers, too."""
        if isinstance(cache, PagedAttentionCache):
            return {"full_attention": batching.mask_of_full_layers(attention_mask)}, position_ids
        shard: Shard | None = given.get("shard")
        if shard is not None:
            positions = shard.positions(attention_mask, position_ids)
            if "chosen_attention" in (self.config.layer_types or []):
                given["shard"] = shard.with_blocks(positions)
            return {"positions": positions}, position_ids
        if given.get("cu_seq_lens_q") is not None:
            position_ids = packed_positions(hidden, given["cu_seq_lens_q"], attention_mask, cache)
        if isinstance(attention_mask, dict):  # made ahead by `create_masks_for_generate`
            return attention_mask, position_ids
        masks = self.prepare_masks(self.config, hidden, attention_mask, position_ids, cache)
        if position_ids is not None and cache is None:
            self._tell_lengths(masks, hidden.shape[0], given)
        return masks, position_ids

    @staticmethod
    def prepare_masks(
        config: FibAttnConfig,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> dict[str, Any]:
        """What the layers are told of padding and documents: `positions` for sparse ones, a mask for full ones.

        `forward` takes the result for its `attention_mask`: its shapes stay the same while a static cache fills,
        so that a compiled step is compiled once.
        """
        past = cache.get_seq_length() if cache is not None else 0
        if attention_mask is not None and cache is not None:
            position_ids = None  # `generate` gives both; with a cache, only padding tells rows apart
        positions = document_positions(hidden, attention_mask, position_ids, past)
        masks: dict[str, Any] = {"positions": positions}
        if config.unbounded:
            if attention_mask is not None and position_ids is not None and says_nothing(attention_mask):
                attention_mask = None
            masks["full_attention"] = full_mask(config, hidden, attention_mask, position_ids, cache, positions)
        return masks

    def _tell_lengths(self, masks: dict[str, Any], batch: int, given: dict[str, Any]) -> None:
        """Put the lengths of documents into `given`, where the full layers' attention reads them and no mask."""
        if self.config._attn_implementation in TAKES_MASKS or "full_attention" not in masks:
            return
        masks["full_attention"] = None
        lengths = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        if any(given.get(name) is None for name in lengths):
            given.update(document_lengths(masks["positions"], batch))


class FibAttnForCausalLM(FibAttnPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head, tied to the embedding by default."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: FibAttnConfig):
        super().__init__(config)
        self.model = FibAttnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(
        config: FibAttnConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Called by `generate` outside of the compiled step where the cache is static."""
        cache = only_cache(cache, past_key_values)
        return FibAttnModel.prepare_masks(config, inputs_embeds, attention_mask, position_ids, cache)

    def _prepare_attention_mask_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs_tensor: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """As in Transformers, but a pad token among others is text, as is one at the end of what goes on from a cache,
        or of what an assistant is to go on with."""
        made = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        cache = only_cache(model_kwargs.get("cache"), model_kwargs.get("past_key_values"))
        begun = made.cumsum(1) > 0
        if not (generation_config.is_assistant or (cache is not None and cache.get_seq_length())):
            begun &= made.flip(1).cumsum(1).flip(1) > 0
        return begun.to(made.dtype)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> ContinuousBatchingManager:
        """As in Transformers, but for what `FibAttnConfig.check_engine` refuses."""
        self.config.check_engine("continuous batching")
        patterns = [self.config.layer_pattern(layer) for layer in range(self.config.num_hidden_layers)]
        return batching.start_batching(self, patterns, *args, **kwargs)

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in Transformers, but a request without tokens is refused; there it is logged, and nothing comes back."""
        batching.check_requests(inputs)
        return super().generate_batch(inputs, *args, **kwargs)

    def _loss_and_logits(self, hidden: Tensor, targets: Tensor, wanted: Any) -> tuple[Tensor, Tensor | None]:
        """The summed loss, and the wanted logits unless training: with all of them where the head is not plain."""
        if is_plain(self.lm_head, hidden.device):
            # Called while training, too, for nothing: a head that is sharded has its weight whole once it is called.
            logits = self.lm_head(hidden[:, slice(0) if self.training else wanted])
            total = self._summed_loss(hidden.flatten(0, 1), targets.flatten())
        else:
            logits = self.lm_head(hidden)
            every = logits.flatten(0, 1).float()
            total = functional.cross_entropy(every, targets.flatten(), reduction="sum", ignore_index=IGNORED)
            logits = logits[:, wanted]
        return total, None if self.training else logits

    def _summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, self.lm_head.weight, targets)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the mean loss where targets are given.

        Args:
            labels: (batch, tokens), the input shifted inside by one; the last token has no target.
            shift_labels: (batch, tokens), the target of every token, taken as it is; goes before `labels`.
            logits_to_keep: logits of the last so many tokens (all for 0), or of these indices.
            num_items_in_batch: divides the summed loss; the number of targets when None.

        While training with targets, `logits` is None: the loss never holds them all.

        Raises:
            InputError: as `FibAttnModel.forward`, and for targets of another shape than the tokens.
        """
        # Not in the signature: the Trainer evaluates only what has all arguments with "label" in their names.
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=only_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden, loss = outputs.last_hidden_state, None
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            if given is not None and given.shape != hidden.shape[:2]:
                raise InputError(f"{name} have shape {tuple(given.shape)}; expected {tuple(hidden.shape[:2])}")
        if shift_labels is None and labels is not None:
            shift_labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if shift_labels is None:
            logits = self.lm_head(hidden[:, wanted])
        else:
            total, logits = self._loss_and_logits(hidden, shift_labels, wanted)
            loss = total / ((shift_labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
