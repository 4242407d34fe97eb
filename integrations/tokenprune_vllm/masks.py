"""Masks: the attention of a served model under sparse masks, and over keys that are weighted.

Layers keep vLLM's own attention for whatever the masks leave whole: decoding, text, prompts without
images, and layers all of whose heads are dense. Where a chunk of a prompt has image tokens among
its queries, our kernels compute that prompt's attention, over the keys that the masks let through:
on CPUs as here, on GPUs as in `gpu_masks`. Where keys of a prompt are hidden or count several
times, all queries from there on are ours.

vLLM's platform for CPUs takes no other attention backend than its own, so none is registered: what
stands in is the `forward` of a layer's implementation, and metadata and cache are vLLM's.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import extract_layer_index

from tokenprune.errors import TokensError, UnsupportedModelError
from tokenprune.families.base import Family
from tokenprune.masks import HeadCategories, Mask, ModelIdentity, PromptLayout, category_mask
from tokenprune.masks.gathered import fused
from tokenprune.masks.heads import sampled
from tokenprune.masks.kernels import Prepared
from tokenprune.masks.mask import BLOCK
from tokenprune.masks.paged import PagedChunk
from tokenprune.masks.patterns import Category, layer_mask, per_head
from tokenprune.masks.pooled import PooledBlocks
from tokenprune.masks.weighted import HIDDEN, log_counts, weighted
from tokenprune.transfer import to_device
from tokenprune_vllm import gpu_masks
from tokenprune_vllm.paged import keys_and_values, of_requests
from tokenprune_vllm.positions import RowNumbers
from tokenprune_vllm.tags import Codes, Tags, edges, from_codes, layout_of

logger = init_logger("vllm.tokenprune")  # vLLM shows loggers below its own name

_CHUNKS = 8
"""Chunks of prompts whose masks are kept for the next layers, and the next prompts like them."""

_UNSEEN = ("alibi_slopes", "logits_soft_cap", "sinks")
"""Attributes of vLLM's implementations that change logits."""

Own = Callable[..., Tensor]
"""vLLM's `forward` of a layer's implementation."""


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer whose attention is ours where masks or weights say so.

    Attributes
    ----------
    name
        vLLM's.
    attention
        Its attention.
    categories
        Of the heads that this rank has.
    window
        How many tokens up to itself a query sees; None for all.
    on_gpu
        Whether `gpu_masks` computes its masks.
    """

    name: str
    attention: Any
    categories: tuple[Category, ...]
    window: int | None
    on_gpu: bool = False

    @property
    def dense(self) -> bool:
        """Whether masks leave it whole."""
        return set(self.categories) == {"dense"}


class _Chunk:
    """Masks of a part of a prompt, made when a layer asks for them and kept for the next ones.

    Parameters
    ----------
    layout
        Of the prompt up to the part's end.
    queries
        Which tokens the part is.
    block
        Queries, and keys, of a block.
    """

    def __init__(self, layout: PromptLayout, queries: range, block: int) -> None:
        self.layout, self.queries, self._block = layout, queries, block
        self._masks: dict[tuple[Category, int | None], Mask] = {}
        self._ready: dict[tuple[tuple[Category, ...], int | None], Prepared] = {}

    def chosen(
        self, blocks: PooledBlocks, layer: _Layer, query: Tensor, key: Tensor, scale: float
    ) -> Prepared:
        """Return the mask of blocks that are chosen from the data, made ready.

        Parameters
        ----------
        blocks
            How they are chosen.
        layer
            Which one.
        query
            [H, n, d], of the part.
        key
            [G, L, d], up to its end.
        scale
            Factor on q kᵀ.
        """
        own = layer_mask(self.layout, layer.window)
        first = self.queries.start
        try:
            mask = blocks.mask(query, key, self.layout, scale=scale, model=own, first=first)
        except TokensError as error:
            # One image whose numbers overflowed must not end the server for everybody.
            logger.error("tokenprune: %s They count as 0 where blocks are chosen.", error)
            query, key = query.nan_to_num(0.0, 0.0, 0.0), key.nan_to_num(0.0, 0.0, 0.0)
            mask = blocks.mask(query, key, self.layout, scale=scale, model=own, first=first)
        return Prepared(mask, torch.device("cpu"), block=self._block, queries=self.queries)

    def ready(self, categories: tuple[Category, ...], window: int | None) -> Prepared:
        """Return the mask of a layer with these heads, made ready."""
        if (categories, window) not in self._ready:
            # vLLM's kernels for CPUs let no image see what stands behind, in any model.
            own = layer_mask(self.layout, window)
            for category in set(categories):
                if (category, window) not in self._masks:
                    self._masks[category, window] = category_mask(self.layout, category, own)
            masks = {category: self._masks[category, window] for category in set(categories)}
            self._ready[categories, window] = Prepared(
                per_head(categories, masks),
                torch.device("cpu"),
                block=self._block,
                queries=self.queries,
            )
        return self._ready[categories, window]


@dataclass(frozen=True)
class _Masked:
    """A request of a batch that is read under masks, or whose keys are weighted.

    Attributes
    ----------
    request
        Its number in the batch.
    rows
        Its tokens in the batch.
    first
        Position of the first of them in the prompt.
    length
        Tokens of the prompt up to the last of them.
    chunk
        Their masks.
    logs
        float32 [length], what is added to the logits of each key; None for nothing.
    sparse
        Whether masks leave something out.
    """

    request: int
    rows: slice
    first: int
    length: int
    chunk: _Chunk
    logs: Tensor | None = None
    sparse: bool = True

    def paged(self) -> PagedChunk:
        """Return what the kernel for GPUs computes of it."""
        counts, visible = self.logs, None
        if counts is not None:
            shown = counts > HIDDEN
            visible = None if bool(shown.all()) else shown
            counts = counts.where(shown, 0.0) if bool(counts[shown].any()) else None
        return PagedChunk(
            self.chunk.layout, self.chunk.queries, self.rows.start, self.request, self.length,
            bias=counts, visible=visible,
        )  # fmt: skip


@dataclass(eq=False)
class _Step:
    """One batch, for the layers that share vLLM's metadata of it.

    Attributes
    ----------
    masked
        Requests that are read under masks.
    others
        Numbers of the other requests.
    rows
        LongTensor, the tokens of those.
    starts
        First token of each request, and one behind the last.
    metadata
        vLLM's of those, made when the first layer asks for it.
    plans
        What a GPU computes of the masked ones.
    """

    masked: list[_Masked]
    others: list[int]
    rows: Tensor
    starts: list[int] = field(default_factory=list)
    metadata: Any = field(default=None)

    @functools.cached_property
    def plans(self) -> gpu_masks.Plans:
        masked, whole = (
            [one.paged() for one in self.masked if one.sparse is sparse] for sparse in (True, False)
        )
        return gpu_masks.Plans(masked, whole)


class Masks:
    """Sparse masks, and weights of keys, on a served model.

    Parameters
    ----------
    model
        vLLM's model, before its weights are loaded.
    family
        Of that model.
    masks
        The heads file, or blocks that are chosen from the data; None where there are weights alone.
    vllm_config
        vLLM's.
    weighs
        Whether keys may be hidden, or count several times.
    counts
        Whether they may count several times.

    Attributes
    ----------
    reach
        What each token of the batch at hand has in `tags.around`, and its code (`tags.to_codes`);
        written before the forward.

    Raises
    ------
    UnsupportedModelError
        If the heads are another model's, or a layer's attention is more than softmax(q kᵀ) v.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        masks: HeadCategories | PooledBlocks | None,
        vllm_config: Any,
        weighs: bool = False,
        counts: bool = False,
    ) -> None:
        self._model = model
        self._heads = masks if isinstance(masks, HeadCategories) else None
        self._pooled = masks if isinstance(masks, PooledBlocks) else None
        self._weighs, self._counts = weighs, counts
        self._block = BLOCK if masks is None else masks.block
        self._sinks = () if self._heads is None else self._heads.sinks
        self._checked = False
        text = family.config.get_text_config()
        all_heads = int(text.num_attention_heads)
        self._identity = ModelIdentity(
            model_type=str(family.config.model_type),
            layers=int(text.num_hidden_layers),
            heads=all_heads,
            key_heads=int(getattr(text, "num_key_value_heads", None) or all_heads),
            hidden_size=int(text.hidden_size),
            # Looked at when there are weights.
            sample=() if self._heads is None else self._heads.model.sample,
        )
        if self._heads is not None:
            self._refuse_others(self._heads.model.differences(self._identity))
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.reach = RowNumbers(3, tokens, torch.get_default_device())
        self._layers = self._find_layers(vllm_config)
        self._steps: dict[int, dict[bool, _Step]] = {}
        self._metadata: list[Any] = []  # of the steps, so that their ids stay theirs
        self._tags: dict[str, Tags] = {}
        self._codes: dict[str, Codes] = {}
        self._chunks: OrderedDict[tuple[PromptLayout, range], _Chunk] = OrderedDict()
        self._stand_in()

    def _stand_in(self) -> None:
        for layer in self._layers:
            impl = layer.attention.impl
            impl.forward = functools.partial(self._attend, layer, impl.forward)

    def exchange(self, heads: HeadCategories, vllm_config: Any) -> None:
        """Take other heads of the same model between two batches, as a measurement needs it.

        Parameters
        ----------
        heads
            The other ones.
        vllm_config
            vLLM's.
        """
        self._refuse_others(heads.model.differences(self._identity))
        for layer in self._layers:
            del layer.attention.impl.forward  # that of its class is vLLM's
        self._heads, self._pooled = heads, None
        self._block, self._sinks = heads.block, heads.sinks
        self._chunks.clear()
        self._layers = self._find_layers(vllm_config)
        self._stand_in()

    def say(self) -> None:
        """Say at the start which masks there are."""
        if get_tensor_model_parallel_rank() != 0:
            return
        if self._heads is not None:
            counts = ", ".join(f"{count} {name}" for name, count in self._heads.counts().items())
            logger.info(
                "tokenprune: sparse masks in %d of %d layers; heads: %s",
                sum(not layer.dense for layer in self._layers),
                self._heads.model.layers,
                counts,
            )
        if self._pooled is not None:
            logger.info("tokenprune: sparse masks of blocks chosen from the data: %s", self._pooled)
        if self._weighs:
            logger.info(
                "tokenprune: attention of our own where tokens are hidden%s",
                " or count several times" if self._counts else "",
            )

    # The model ---------------------------------------------------------------------------------

    def _find_layers(self, vllm_config: Any) -> list[_Layer]:
        """Return the layers whose attention may be ours."""
        every: dict[str, Any] = {
            name: one
            for name, one in vllm_config.compilation_config.static_forward_context.items()
            if isinstance(one, AttentionLayerBase)
        }
        found = {extract_layer_index(name): (name, one) for name, one in every.items()}
        plain = len(found) == len(every) and all(type(one) is Attention for one in every.values())
        if not plain or sorted(found) != list(range(self._identity.layers)):
            raise UnsupportedModelError(
                f"the language model of {type(self._model).__name__} has layers of a kind that no "
                "mask reaches, such as those that keep a state, or latent states, in place of "
                f"keys. Serve it without {self._options()}."
            )
        layers = []
        for number, (name, attention) in sorted(found.items()):
            for unseen in _UNSEEN:
                value = getattr(attention.impl, unseen, None)
                if value is not None and value != 0:
                    raise UnsupportedModelError(
                        f"the attention of {type(self._model).__name__} has {unseen}, which does "
                        f"not go together with attention of our own. Serve it without "
                        f"{self._options()}."
                    )
            if self._counts and attention.sliding_window is not None:
                raise UnsupportedModelError(
                    f"layers of {type(self._model).__name__} see a window of tokens, where "
                    "proportional attention is refused as in transformers. Serve it without "
                    "--proportional-attention."
                )
            own, rank = attention.num_heads, get_tensor_model_parallel_rank()
            if self._heads is None:
                # Blocks leave something out in every head, which is all that is asked of this.
                kind: Category = "dense" if self._pooled is None else "intra"
                window, on_gpu = attention.sliding_window, gpu_masks.on_gpu(attention)
                layers.append(_Layer(name, attention, (kind,) * own, window, on_gpu))
                continue
            categories = self._heads.categories[number]
            ranks = vllm_config.parallel_config.tensor_parallel_size
            if own * ranks != len(categories):
                raise UnsupportedModelError(
                    f"layer {number} has {own} heads on each of {ranks} ranks, and the heads file "
                    f"{len(categories)}. Serve with another --tensor-parallel-size, or without "
                    "--masks."
                )
            of_rank = categories[rank * own : (rank + 1) * own]
            window, on_gpu = attention.sliding_window, gpu_masks.on_gpu(attention)
            layer = _Layer(name, attention, of_rank, window, on_gpu)
            if self._weighs or not layer.dense:
                layers.append(layer)
        return layers

    def _options(self) -> str:
        """Return the options without which attention would be vLLM's own."""
        masks = self._heads is not None or self._pooled is not None
        named = {
            "--masks": masks,
            "--apply mask": self._weighs and not self._counts,
            "--proportional-attention": self._counts,
        }
        return " and ".join(name for name, given in named.items() if given)

    def check_weights(self) -> None:
        """Raise if the weights that were loaded are another model's; looked at once.

        Raises
        ------
        UnsupportedModelError
            If they are.
        """
        if self._checked or self._heads is None:
            return
        self._checked = True
        whole: Any = self._model.get_language_model()  # type: ignore[operator]
        tables = [
            module
            for module in whole.modules()
            if isinstance(module, VocabParallelEmbedding)
            and not isinstance(module, ParallelLMHead)
            and module.weight.is_floating_point()
        ]
        if not tables:
            raise UnsupportedModelError(
                f"the embeddings of {type(self._model).__name__} are quantized, so it is not known "
                "whether the heads file is this model's. Serve it without --masks."
            )
        table: Any = tables[0]
        width = int(table.weight.shape[1])
        places = torch.arange(int(table.org_vocab_size) * width, device="cpu")
        places = places[sampled(len(places))]
        shard = table.shard_indices
        row = places // width
        # A rank has some rows of the table, and compares what it has.
        here = (row >= shard.org_vocab_start_index) & (row < shard.org_vocab_end_index)
        if not bool(here.any()):
            return
        weights = table.weight.detach()
        own = weights[
            (row - shard.org_vocab_start_index)[here].to(weights.device),
            (places % width)[here].to(weights.device),
        ]
        said = self._heads.model
        if len(said.sample) == len(here):
            given = torch.tensor(said.sample, dtype=torch.float64)[here].tolist()
        else:
            given = []
        one = ModelIdentity("", 0, 0, 0, 0, tuple(given))
        other = ModelIdentity("", 0, 0, 0, 0, tuple(own.double().tolist()))
        self._refuse_others(one.differences(other))

    def _refuse_others(self, differences: Sequence[str]) -> None:
        if differences:
            raise UnsupportedModelError(
                f"these heads are not those of this {type(self._model).__name__}: in the file "
                f"{'; '.join(differences)}. Calibrate this model: tokenprune calibrate-heads."
            )

    # Batches -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Look at the batch that vLLM's forward is about to read: which requests have masks."""
        self.check_weights()
        context = get_forward_context()
        self._steps, self._metadata = {}, []
        if not isinstance(context.attn_metadata, dict):
            return  # vLLM measures memory
        slots: Any = context.slot_mapping
        for layer in self._layers:
            metadata: Any = context.attn_metadata[layer.name]
            if metadata is not None and id(metadata) not in self._steps:
                self._metadata.append(metadata)
                masked, requests = self._step(layer, metadata, slots[layer.name])
                weighted = [one for one in masked if one.logs is not None]
                self._steps[id(metadata)] = {
                    dense: _step_of(ours, requests, slots[layer.name].device)
                    for dense, ours in ((False, masked), (True, weighted))
                }

    def _step(
        self, layer: _Layer, metadata: Any, slots: Tensor
    ) -> tuple[list[_Masked], list[slice]]:
        """Write the tags of a batch, and return which requests are ours, and the rows of all.

        Parameters
        ----------
        layer
            The first of those that share `metadata`, and with it the places of their caches.
        metadata
            vLLM's.
        slots
            LongTensor, the place of each token in the cache.
        """
        blocks, _, block, _ = layer.attention.kv_cache.shape
        if layer.name not in self._tags or not self._tags[layer.name].fits(blocks, block):
            self._tags[layer.name] = Tags(blocks, block, slots.device)
            if self._weighs:
                self._codes[layer.name] = Codes(blocks, block, slots.device)
        tags, codes = self._tags[layer.name], self._codes.get(layer.name)
        count = int(metadata.num_actual_tokens)
        if not self.reach.written and codes is None:  # of text; nothing is read of a device
            tags.write(slots[:count], torch.zeros(count, 2, device=slots.device))
            return [], []
        starts: list[int] = metadata.query_start_loc.tolist()
        lengths: list[int] = metadata.seq_lens.tolist()
        counts = metadata.query_start_loc.diff()
        ends = metadata.seq_lens - metadata.query_start_loc[1:]
        reach = self.reach.read(count)
        positions = torch.arange(count, device=slots.device) + ends.repeat_interleave(counts)
        written = edges(reach, positions)
        tags.write(slots[:count], written)
        if codes is not None:
            codes.write(slots[:count], reach[2])
        has_image = (reach[1] > 0).cpu()
        requests = [slice(*ends) for ends in itertools.pairwise(starts)]
        weighed = (
            [False] * len(lengths) if codes is None else codes.any(metadata.block_table, lengths)
        )
        masked = []
        for request, (rows, length) in enumerate(zip(requests, lengths, strict=True)):
            if rows.start == rows.stop:
                continue
            table = metadata.block_table[request]
            # Text attends to everything before it: only tokens of images have masks.
            sparse = bool(has_image[rows].any())
            if not sparse and not weighed[request]:
                continue
            logs: Tensor | None = None
            if codes is not None and weighed[request]:
                logs = log_counts(from_codes(codes.of(table, length)))
            first = length - (rows.stop - rows.start)
            images = tags.images(table, length) if sparse else []
            layout = layout_of(images, length, self._sinks)
            chunk = self._chunk(layout, range(first, length))
            masked.append(_Masked(request, rows, first, length, chunk, logs, sparse))
        return masked, requests

    def _chunk(self, layout: PromptLayout, queries: range) -> _Chunk:
        """Return the masks of a part of a prompt, those made before if there are any."""
        name = (layout, queries)
        if name not in self._chunks:
            self._chunks[name] = _Chunk(layout, queries, self._block)
            if len(self._chunks) > _CHUNKS:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(name)
        return self._chunks[name]

    # Attention ---------------------------------------------------------------------------------

    def _attend(
        self,
        layer: _Layer,
        own: Own,
        module: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        **more: Any,
    ) -> Tensor:
        """Stand in for vLLM's `forward` of one layer.

        Parameters
        ----------
        layer
            Which one.
        own
            vLLM's.
        module, query, key, value, kv_cache, attn_metadata, output
            Its arguments: queries [n, H, d], keys and values [n, G, d] of the batch, the cache
            [blocks, G, block, 2 * d], and where the result goes [n, H, d]. A layer that reads the
            cache of an earlier one has no keys and values of its own.
        **more
            Its other arguments.
        """
        steps = None if attn_metadata is None else self._steps.get(id(attn_metadata))
        if attn_metadata is not None and steps is None:
            raise RuntimeError("the language model was called with a batch that has no masks yet")
        step = None if steps is None else steps[layer.dense]
        if step is None or not step.masked:
            return own(module, query, key, value, kv_cache, attn_metadata, output=output, **more)
        impl = layer.attention.impl
        if step.others:
            if step.metadata is None:
                step.metadata = (
                    gpu_masks.of_requests(attn_metadata, step.others, step.starts)
                    if layer.on_gpu
                    else of_requests(attn_metadata, step.others, impl, layer.attention)
                )
            rows = step.rows
            found = torch.empty_like(output[rows])
            states = [None if one is None else one[rows] for one in (key, value)]
            own(module, query[rows], *states, kv_cache, step.metadata, output=found, **more)
            output[rows] = found
        if layer.on_gpu:
            step.plans.attend(layer, query, kv_cache, attn_metadata, output)
            return output
        for one in step.masked:
            if one.first or key is None or value is None:
                table = attn_metadata.block_table[one.request]
                keys, values = keys_and_values(kv_cache, table, one.length, layer.attention.isa)
            else:
                keys, values = key[one.rows].transpose(0, 1), value[one.rows].transpose(0, 1)
            queries = query[one.rows].transpose(0, 1)
            output[one.rows] = self._attended(layer, one, queries, keys, values).transpose(0, 1)
        return output

    def _attended(
        self, layer: _Layer, one: _Masked, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Return the attention of a request that is ours [H, n, d].

        Parameters
        ----------
        layer, one
            Where, and whose.
        query
            [H, n, d].
        key, value
            [G, L, d], up to the last of the queries.
        """
        scale = layer.attention.impl.scale
        ready: Prepared | None = None
        if one.sparse and self._pooled is not None:
            ready = one.chunk.chosen(self._pooled, layer, query, key, scale)
        elif one.sparse or query.shape[1] > 1:
            dense: Category = "dense"
            categories = layer.categories if one.sparse else (dense,) * len(layer.categories)
            ready = one.chunk.ready(categories, layer.window)
        width = value.shape[-1]
        if one.logs is not None:
            query, key, value = weighted(query, key, value, one.logs, scale)
        if ready is None:  # a step behind a prompt sees all, or all of its window
            seen = slice(0 if layer.window is None else max(0, one.length - layer.window), None)
            attended = fused(query, key[:, seen], value[:, seen], None, scale)
        else:
            attended = ready(query, key, value, scale)
        return attended[..., :width]


def _step_of(masked: list[_Masked], requests: Sequence[slice], device: torch.device) -> _Step:
    """Return what layers do with a batch of which some requests are ours.

    Parameters
    ----------
    masked
        Those.
    requests
        The tokens of each request.
    device
        Where they are.
    """
    ours = {one.request for one in masked}
    others = [
        request
        for request, rows in enumerate(requests)
        if request not in ours and rows.start < rows.stop
    ]
    starts = [rows.start for rows in requests] + [rows.stop for rows in requests[-1:]]
    return _Step(masked, others, to_device(gpu_masks.rows_of(others, starts), device), starts)
