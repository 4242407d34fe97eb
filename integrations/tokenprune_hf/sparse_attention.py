"""`sparse`: a model of transformers that reads prompts with several images under sparse masks.

    with tokenprune_hf.sparse(model, "heads.json") as sparse:
        model.generate(**inputs)
    sparse.density

Every token stays in the prompt and in the cache; while the prompt is read, each head attends to
what its mask lets through, and whole blocks of the rest are never computed. Tokens that come after
the prompt attend to everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from tokenprune.errors import (
    ConfigError,
    PromptError,
    UnsupportedModelError,
    did_you_mean,
)
from tokenprune.masks import HeadCategories, ImageSpan, Mask, PromptLayout, category_mask
from tokenprune.masks.kernels import Kernel, Prepared
from tokenprune.masks.patterns import Category, per_head
from tokenprune_hf.attached import Attachment, ThreadState, named_arguments
from tokenprune_hf.engine import cache_of
from tokenprune_hf.interface import AttentionModule, Interception, Plain, check_logits
from tokenprune_hf.layout import (
    check_images_apart,
    decoder_of,
    identity_of,
    image_spans_of,
    own_mask,
)
from tokenprune_hf.prefix import sliding_window
from tokenprune_hf.vision import vision_model

if TYPE_CHECKING:
    from tokenprune.masks.pooled import PooledBlocks

_WHAT = "sparse masks"
"""As refusals name it."""


_Heads = tuple[tuple[Category, ...], int | None, torch.device]
"""What layers have in common that share a mask: their heads' categories, the window, the device."""


@dataclass(eq=False)
class _Sample:
    """One prompt of a batch.

    Attributes
    ----------
    layout
        Of its tokens, padding left out.
    columns
        Where they stand in the batch.
    both_ways
        See `tokenprune_hf.layout.own_mask`.
    prepared
        Masks made ready and their densities, by the categories of a layer's heads and its window.
    masks
        Each category's mask, by the layer's window: one object for all layers, so that what a
        kernel has to find out about it is found out once.
    densities
        Of layers that are left to the model, by their window.
    """

    layout: PromptLayout
    columns: slice
    both_ways: bool
    prepared: dict[_Heads, tuple[Prepared, float]] = field(default_factory=dict)
    masks: dict[tuple[Category, int | None], Mask] = field(default_factory=dict)
    densities: dict[int | None, float] = field(default_factory=dict)


@dataclass(eq=False)
class _Prompts:
    """What was read in one call.

    Attributes
    ----------
    layouts
        Of its prompts; empty where none had an image.
    densities
        Of its masks, one for each prompt and layer.
    """

    layouts: list[PromptLayout] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)


class _Call(ThreadState):
    """The call that is running in a thread.

    Attributes
    ----------
    samples
        Its prompts; empty where attention is left to the model, None where no call is running.
    last
        What the thread's last call with a prompt read; None before its first one.
    """

    samples: list[_Sample] | None = None
    last: _Prompts | None = None


class Sparse(Attachment):
    """A model under sparse masks: made by `sparse`, undone by leaving the block.

    Attributes
    ----------
    model, masks, kernel
        What was asked for.
    layouts
        Of the prompts that were read last; empty where none had an image.

    Raises
    ------
    UnsupportedModelError
        If the model's attention cannot take a mask for each head, or the masks are another model's.
    InputFileError
        If the heads file cannot be read.
    TokenPruneError
        If the model is under masks or pruned already.
    """

    def __init__(
        self,
        model: Any,
        masks: str | Path | HeadCategories | PooledBlocks,
        kernel: Kernel | None = None,
    ) -> None:
        super().__init__(model)
        self.masks = HeadCategories.load(masks) if isinstance(masks, str | Path) else masks
        self.kernel: Kernel | None = kernel
        if kernel is not None and kernel not in get_args(Kernel):
            raise ConfigError(
                f"kernel={kernel!r} is no kernel. {did_you_mean(str(kernel), get_args(Kernel))}"
            )
        if not hasattr(self.masks, "block"):
            raise ConfigError(
                f"masks is a {type(masks).__name__}. Give the path of a heads file, a "
                "HeadCategories or a PooledBlocks."
            )
        model = self.model
        self._vision = vision_model(model)
        check_images_apart(model)
        decoder = decoder_of(model)
        self._decoder = decoder
        self._modules = [layer.self_attn for layer in decoder.layers]
        self._number_of = {module: number for number, module in enumerate(self._modules)}
        _check_attention(self._modules, model.config.get_text_config())
        if isinstance(self.masks, HeadCategories):
            differences = self.masks.model.differences(identity_of(model))
            if differences:
                raise UnsupportedModelError(
                    f"these heads are not those of this {type(model).__name__}: in the file "
                    f"{'; '.join(differences)}. Calibrate this model: tokenprune calibrate-heads."
                )
        self._call = _Call()
        self._last = _Prompts()
        self.begin()

    @property
    def layouts(self) -> list[PromptLayout]:
        """Layouts of the prompts that this thread read last or, if it read none, any thread."""
        return (self._call.last or self._last).layouts

    @property
    def density(self) -> float:
        """Share of the causal blocks in which the last prompts' masks leave something to compute.

        The mean over prompts, layers and heads. 1.0 where nothing was left out, or nothing was
        read yet. Kernel ``"dense"`` computes everything whatever it is.
        """
        densities = (self._call.last or self._last).densities
        return sum(densities) / len(densities) if densities else 1.0

    # Attaching and taking off ------------------------------------------------------------------

    def _attach(self) -> None:
        inner = getattr(self.model, "model", self.model)
        # The interception may refuse, so it comes first. Hooks on the inner model see a call before
        # its layers do, however the call came in: the whole model, `generate` or a wrapper.
        self._interception = Interception(self._modules, self._attend)
        self._hooks = [
            inner.register_forward_pre_hook(self._before, with_kwargs=True),
            inner.register_forward_hook(self._after, always_call=True),
        ]

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._interception.remove()
        self._call.samples = None

    # Calls -------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        """Run before the model reads tokens: see where the prompts' images stand."""
        named = named_arguments(module, args, kwargs)
        cache = cache_of(named)
        if cache is not None and cache.get_seq_length() > 0:
            self._check_continued(named.get("input_ids"))
            self._call.samples = []  # what comes after a prompt attends to everything
            return
        # Noted first, and filled in as layers run: a call that raises leaves no older numbers.
        self._call.last = self._last = _Prompts()
        self._call.samples = self._read(named)
        self._call.last.layouts += [sample.layout for sample in self._call.samples]

    def _after(self, _module: nn.Module, _args: object, _output: object) -> None:
        """Run when the call is over, also after an exception."""
        self._call.samples = None

    def _check_continued(self, input_ids: Tensor | None) -> None:
        """Raise if images come behind a cache: their attention would not be sparse."""
        if input_ids is None or input_ids.shape[1] == 1:
            return
        for modality in ("image", "video"):
            if bool((input_ids == self._vision.token_id(modality)).any()):
                raise PromptError(
                    f"{modality}s come behind tokens that the cache holds already, and sparse "
                    "masks are for a prompt that is read at once. Pass the whole prompt without a "
                    "cache, and no prefill_chunk_size."
                )

    def _read(self, named: dict[str, Any]) -> list[_Sample]:
        """Return the prompts of a call; none where no prompt has an image."""
        input_ids = named.get("input_ids")
        if input_ids is None:
            raise PromptError(
                "sparse masks find images by the ids of their placeholders, and this call has "
                "inputs_embeds alone. Pass input_ids."
            )
        spans = image_spans_of(self.model, input_ids, named)
        if not any(spans):
            return []
        self._check_call(named)
        mask = named.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(input_ids)
        if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
            given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise PromptError(
                f"attention_mask is {given}; under sparse masks it has one value per prompt token: "
                f"{list(input_ids.shape)}. Pass the mask that the processor returned, and no "
                "static cache."
            )
        # Gemma makes its mask see images both ways only where token types come with the call.
        types = named.get("token_type_ids", named.get("mm_token_type_ids"))
        both_ways = types is not None and bool((types > 0).any())
        samples = []
        for row, images in enumerate(spans):
            # Layouts count without padding, which stands at one end of the row.
            real = mask[row].nonzero()[:, 0].tolist()
            first, last = (real[0], real[-1] + 1) if real else (0, 1)
            inside = all(first <= image.start and image.stop <= last for image in images)
            if not inside or len(real) < last - first:
                raise PromptError(
                    f"the attention_mask of prompt {row + 1} hides tokens between others, or of an "
                    "image. Sparse masks know padding at either end only: leave hidden tokens out."
                )
            moved = [ImageSpan(image.start - first, image.stop - first) for image in images]
            length = last - first
            if isinstance(self.masks, HeadCategories):
                layout = self.masks.layout(length, moved)
            else:
                layout = PromptLayout(length, tuple(moved))
            samples.append(_Sample(layout, slice(first, last), both_ways))
        return samples

    def _check_call(self, named: dict[str, Any]) -> None:
        """Raise for calls in which attention under masks would not be what was asked for."""
        config = self.model.config.get_text_config()
        if named.get("output_attentions", getattr(config, "output_attentions", False)):
            raise PromptError(
                "output_attentions asks for attention maps, which sparse kernels never make. Leave "
                "it out, or call the model without masks."
            )
        self._interception.check_call(self._decoder, _WHAT)
        positions, mask = named.get("position_ids"), named.get("attention_mask")
        if isinstance(positions, Tensor) and mask is None and cache_of(named) is None:
            # M-RoPE: the first of four axes counts text; three have no such axis.
            text = positions[0] if positions.ndim == 3 and len(positions) == 4 else positions
            if text.ndim == 2 and bool((text.diff(dim=-1) != 1).any()):
                raise PromptError(
                    "position_ids without an attention_mask begin anew inside a row, as those of "
                    "packed prompts do. Pass one prompt a row, and an attention_mask."
                )

    def _attend(
        self,
        module: AttentionModule,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        plain: Plain,
    ) -> tuple[Tensor, Tensor | None]:
        """Stand in for the attention of one layer."""
        # A single query is a step behind a prompt, and attends to everything: it needs no layout.
        samples, last = self._call.samples, self._call.last
        if samples is None and query.shape[2] > 1:
            raise PromptError(
                f"the decoder of {type(self.model).__name__} was called by itself, where sparse "
                "masks do not see the prompt. Call the whole model."
            )
        if not samples or last is None:
            return plain()
        if query.shape[2] != key.shape[2]:
            raise PromptError(
                f"a prompt of {query.shape[2]} tokens came with a cache of {key.shape[2]} places. "
                "Use a cache that grows: leave cache_implementation and the static cache out."
            )
        dropout: float = getattr(module, "attention_dropout", 0.0)
        if module.training and dropout:
            raise PromptError(
                "attention dropout and sparse masks do not go together. Call model.eval()."
            )
        # A layer all of whose heads are dense is left to the model and its own kernel.
        masks = self.masks
        categories: Sequence[Category] = ()
        if isinstance(masks, HeadCategories):
            categories = masks.categories[self._number_of[module]]
            if set(categories) == {"dense"}:
                last.densities += [self._dense(sample, module) for sample in samples]
                return plain()
        # [B, L, H, d]; rows of padding are never looked at.
        size = (*query.shape[:3], value.shape[-1])
        output = query.new_zeros(size).transpose(1, 2)
        # Prompt by prompt: each has a mask of its own, and kernels take no padding.
        for row, sample in enumerate(samples):
            of_sample = (row, slice(None), sample.columns)
            q, k, v = query[of_sample], key[of_sample], value[of_sample]
            if isinstance(masks, HeadCategories):
                ready, density = self._by_category(sample, module, categories, query.device)
            elif not sample.layout.images:  # a prompt of text alone in a batch with images
                ready, density = self._by_category(sample, module, ("dense",), query.device)
            else:
                layer = own_mask(self.model, module, sample.layout, both_ways=sample.both_ways)
                mask = masks.mask(q, k, sample.layout, scale=scale, model=layer)
                ready, density = self._ready(mask, query.device)
            output[row, sample.columns] = ready(q, k, v, scale).transpose(0, 1)
            last.densities.append(density)
        return output, None

    def _dense(self, sample: _Sample, module: AttentionModule) -> float:
        """Return the density of a layer that is left to the model."""
        window = sliding_window(module)  # by which alone the layers' own masks differ
        if window not in sample.densities:
            mask = own_mask(self.model, module, sample.layout, both_ways=sample.both_ways)
            sample.densities[window] = mask.density(self.masks.block)
        return sample.densities[window]

    def _by_category(
        self,
        sample: _Sample,
        module: AttentionModule,
        categories: Sequence[Category],
        device: torch.device,
    ) -> tuple[Prepared, float]:
        """Return the mask of a layer with these heads, made once for all layers like it."""
        window = sliding_window(module)
        heads = (tuple(categories), window, device)
        if heads not in sample.prepared:
            layer = own_mask(self.model, module, sample.layout, both_ways=sample.both_ways)
            for category in set(categories):
                if (category, window) not in sample.masks:
                    mask = category_mask(sample.layout, category, layer)
                    sample.masks[category, window] = mask
            masks = {category: sample.masks[category, window] for category in set(categories)}
            sample.prepared[heads] = self._ready(per_head(categories, masks), device)
        return sample.prepared[heads]

    def _ready(self, mask: Mask, device: torch.device) -> tuple[Prepared, float]:
        block = self.masks.block
        return Prepared(mask, device, self.kernel, block), mask.density(block)


def _check_attention(modules: Sequence[AttentionModule], config: object) -> None:
    """Raise for attention that does more than softmax(q kᵀ) v over what stands before."""
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError(
            "this model's text attends to what stands behind it (use_bidirectional_attention), and "
            "masks are for decoders. Use the model without masks."
        )
    check_logits(modules, _WHAT)


def sparse(
    model: Any,
    masks: str | Path | HeadCategories | PooledBlocks,
    *,
    kernel: Kernel | None = None,
) -> Sparse:
    """Put a model under sparse masks inside a ``with`` block.

    Parameters
    ----------
    model
        A vision-language model of transformers of a family in `tokenprune_hf.supported_models()`.
    masks
        A heads file that ``tokenprune calibrate-heads`` wrote or its `HeadCategories`: BlindSight's
        masks; or `tokenprune.masks.PooledBlocks`: blocks chosen anew for each prompt.
    kernel
        What computes attention under a mask, see `tokenprune.masks.attend`.

    Returns
    -------
    Sparse
        With the `density` and the `layouts` of the last prompts. After the block the model is
        exactly as it was, also after an exception.

    Raises
    ------
    UnsupportedModelError
        If the model's attention cannot take a mask for each head, or the masks are another model's.
    InputFileError
        If the heads file cannot be read.
    TokenPruneError
        If the model is under masks or pruned already.
    """
    return Sparse(model, masks, kernel)
