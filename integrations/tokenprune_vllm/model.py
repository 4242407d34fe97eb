"""PrunedModel: mixed in front of vLLM's own model of each family.

It overrides what vLLM calls when rows are made, embedded and given positions; the work is
`Pruner`'s. vLLM's forward runs as it is.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune_vllm import drafting
from tokenprune_vllm.adapters import modules_with_adapters
from tokenprune_vllm.encoder_inputs import family_of
from tokenprune_vllm.masks import Masks
from tokenprune_vllm.positions import check_tables
from tokenprune_vllm.processor import largest_items
from tokenprune_vllm.pruner import Pruner
from tokenprune_vllm.refusals import check_engine, check_masks, room_for_positions
from tokenprune_vllm.settings import ServerSettings
from tokenprune_vllm.stages import hand_on, taken_over, with_room


class PrunedModel:
    """Mixed in front of vLLM's model of a family; see the top of this file."""

    overrides: ClassVar[tuple[str, ...]] = ("embed_multimodal", "embed_input_ids", "forward")
    """Methods of vLLM's that must be there to be overridden."""

    supports_mrope: ClassVar[bool] = True
    # A captured encoder would run past `embed_multimodal`, and so unpruned.
    supports_encoder_cudagraph: ClassVar[bool] = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        settings = ServerSettings.from_config(config)
        family = family_of(config, causal=not vllm_config.model_config.is_mm_prefix_lm)
        check_engine(vllm_config, settings, family.known)
        masks = None
        if settings.masks is not None or settings.weighs:
            check_masks(vllm_config, family, settings)
            masks = None if settings.masks is None else settings.masks.load()
        with room_for_positions(config, settings):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        if not family.known and settings.default.positions == "original":
            check_tables(self.get_language_model(), config.get_text_config())  # type: ignore[attr-defined]
        if drafting.is_drafted(vllm_config):
            drafting.prepare(self, settings.default.positions == "original")
        self._masks: Masks | None = None
        if masks is not None or settings.weighs:
            own: Any = self
            weighs, counts = settings.weighs, settings.proportional
            self._masks = Masks(own, family, masks, vllm_config, weighs, counts)
            self._masks.say()
        reach = None if self._masks is None else self._masks.reach
        self._pruner = Pruner(self, family, settings, vllm_config, reach)
        pipeline = vllm_config.parallel_config.pipeline_parallel_size > 1
        self._hands_on = pipeline and settings.default.positions == "original"
        if self._hands_on:
            make: Any = self.make_empty_intermediate_tensors  # type: ignore[has-type]
            self.make_empty_intermediate_tensors = with_room(make, 3 if family.mrope else 1)
        self._pruner.say(largest_items(vllm_config.model_config))

    def load_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights as vLLM does, and look whether masks are theirs."""
        loaded = super().load_weights(*args, **kwargs)  # type: ignore[misc]
        if self._masks is not None:
            self._masks.check_weights()
        return loaded

    # Adapters ----------------------------------------------------------------------------------

    @property
    def supports_tower_connector_lora(self) -> bool:
        """Whether vLLM tells which adapter is whose before it encodes; see `adapters`."""
        return self._pruner.adapters is not None

    def get_mm_mapping(self) -> Any:
        """Return which modules belong to what, for vLLM's LoRA."""
        own = getattr(super(), "get_mm_mapping", None)
        return modules_with_adapters(self, own and own(), self._pruner.adapters)

    def get_mm_lora_token_counts(
        self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int
    ) -> tuple[int, int | None]:
        """Return how many tokens an item has in the tower that `get_mm_mapping` names."""
        adapters = self._pruner.adapters
        if adapters is None:
            raise RuntimeError("vLLM asks for tokens of a tower that takes no adapters")
        return adapters.announce(mm_kwargs, num_mm_embeds)

    # Rows --------------------------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """Run the encoder; return each item's kept rows, their positions behind them in memory."""
        return self._pruner.embed(super().embed_multimodal, kwargs)  # type: ignore[misc]

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Embed a batch; the rows' positions are kept for `forward`."""
        input_ids, rows, is_row = self._pruner.take_columns(
            input_ids, multimodal_embeddings, is_multimodal
        )
        embedded: Tensor = super().embed_input_ids(  # type: ignore[misc]
            input_ids, rows, is_multimodal=is_row
        )
        return embedded

    # Positions ---------------------------------------------------------------------------------

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Return positions [3, L] of a pruned prompt, and how far the next token is from L."""
        return self._pruner.prompt_positions(input_tokens, mm_features)

    def engine_positions(self, tokens: list[int], features: list[Any]) -> tuple[Tensor, int]:
        """Return what vLLM itself would say about an unpruned prompt."""
        if self._pruner.mrope:
            found: tuple[Tensor, int] = super().get_mrope_input_positions(  # type: ignore[misc]
                tokens, features
            )
            return found
        return torch.arange(len(tokens)).expand(3, -1), 0

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Run vLLM's forward with each kept token at its own position."""
        if self._hands_on and intermediate_tensors is not None:
            intermediate_tensors, positions = taken_over(intermediate_tensors)
        else:
            positions = self._pruner.positions(positions)
        if self._masks is not None:
            self._masks.begin()
        output = super().forward(  # type: ignore[misc]
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )
        if self._hands_on:
            hand_on(output, positions)
        return output
