"""Settings of vLLM under which pruning would be wrong, or would not happen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenprune.errors import UnsupportedModelError
from tokenprune.families.any import TRACED
from tokenprune.families.base import Family
from tokenprune.registry import build
from tokenprune_vllm import gpu_masks
from tokenprune_vllm.drafting import is_drafted
from tokenprune_vllm.positions import known_positions, rope_types
from tokenprune_vllm.settings import INTERLEAVED, MARK, Pooled, ServerSettings


def check_engine(vllm_config: Any, settings: ServerSettings, known: bool = True) -> None:
    """Refuse settings of vLLM that do not go together with pruning.

    Parameters
    ----------
    vllm_config
        vLLM's.
    settings
        The server's.
    known
        Whether the model is of a family.

    Raises
    ------
    UnsupportedModelError
        Naming all of them.
    """
    multimodal = vllm_config.model_config.get_multimodal_config()
    parallel = vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    lora = vllm_config.lora_config
    original = settings.default.positions == "original"
    drafted = is_drafted(vllm_config)
    reads = bool(settings.readers)
    tracing = [
        name
        for name, options in settings.methods.items()
        if not known and TRACED & set(build(name, options).needs)
    ]
    reading = (
        f"together with {settings.readers[0]}, which runs the model's first layers itself"
        if reads
        else ""
    )
    table: list[tuple[bool, str]] = [
        (
            # Where a method reads with adapters it says something else, see `adapters`.
            lora is not None and lora.enable_tower_connector_lora and not reads,
            "--enable-tower-connector-lora (adapters are those of the language model)",
        ),
        (
            reads and lora is not None and not lora.enable_tower_connector_lora,
            f"--enable-lora without --enable-tower-connector-lora {reading}: add it, as "
            "`tokenprune serve` and `engine_args` do, so that vLLM keeps images of requests with "
            "other adapters apart",
        ),
        (
            not known and settings.default.scope == "image",
            "--scope image for a model of no known family (which rows are crops is not known)",
        ),
        (
            bool(multimodal.video_pruning_rate),
            "--video-pruning-rate (vLLM's own pruning of videos)",
        ),
        (
            bool((multimodal.mm_processor_kwargs or {}).get(INTERLEAVED)),
            f"{INTERLEAVED} (the sound of a video stands among its tokens)",
        ),
        (
            bool(tracing)
            and multimodal.mm_encoder_tp_mode == "data"
            and parallel.tensor_parallel_size > 1,
            "--mm-encoder-tp-mode data together with "
            f"{', '.join(tracing)} for a model of no known family (each rank sees its own images "
            "in the encoder, and where they are put together was not found)",
        ),
        (
            vllm_config.compilation_config.compile_mm_encoder,
            "compile_mm_encoder (the scoring layer could not be watched)",
        ),
        (
            settings.reads_prompt and multimodal.mm_processor_cache_type == "shm",
            "--mm-processor-cache-type shm with a method that reads the question",
        ),
        (
            reads and parallel.data_parallel_size > 1 and vllm_config.model_config.is_moe,
            f"--data-parallel-size above 1 for a mixture of experts {reading} (experts are spread "
            "over all ranks, which wait for each other in every layer, and only one reads)",
        ),
        (
            # Offsets are written for a whole batch, and each part of it would read the first ones.
            original and parallel.use_ubatching,
            "--enable-dbo or --ubatch-size above 1 with --positions original",
        ),
        (
            # Their queries meet the model's own keys, which stand where they stood unpruned.
            original and drafted and speculative.use_gemma4_mtp(),
            "--speculative-config with Gemma 4's own drafter, which reads the cache of the model "
            "but is told other positions, and --positions original",
        ),
        (
            # What `engine_args` and `tokenprune export` write for models that count on one axis.
            drafted and _marked(speculative.draft_model_config.hf_config),
            "--speculative-config with a drafter inside an exported checkpoint with original "
            "positions (`tokenprune serve` on the checkpoint it was made of takes the drafter)",
        ),
        (
            (original or not known) and drafted and vllm_config.ec_transfer_config is not None,
            "--ec-transfer-config (rows that are sent are wider than a drafter takes them) and "
            "--speculative-config with method "
            f"{getattr(speculative, 'method', None)!r}",
        ),
    ]
    refused = [setting for applies, setting in table if applies]
    if refused:
        raise UnsupportedModelError(
            f"tokenprune does not work together with {'; '.join(refused)}. Leave that out, or "
            "serve the model without tokenprune."
        )


def check_masks(vllm_config: Any, family: Family, settings: ServerSettings | None = None) -> None:
    """Refuse models, and settings of vLLM, under which attention of our own would be wrong.

    Parameters
    ----------
    vllm_config
        vLLM's.
    family
        Of the model.
    settings
        The server's, which say what that attention is for; None for sparse masks.

    Raises
    ------
    UnsupportedModelError
        Naming all of them.
    """
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import is_quantized_kv_cache

    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    text = family.config.get_text_config()
    layers = getattr(text, "layer_types", None) or ()
    table: list[tuple[bool, str]] = [
        (
            not current_platform.is_cpu() and not current_platform.is_cuda(),
            f"{current_platform.device_name} (they are for CPUs and GPUs with CUDA)",
        ),
        (
            not current_platform.is_cpu()
            and settings is not None
            and isinstance(settings.masks, Pooled),
            f"{current_platform.device_name} (blocks chosen from the data are for vLLM's CPU "
            "backend)",
        ),
        (not family.known, "a model of no known family (where its images stand is not known)"),
        (family.images_see_each_other, "a model whose images see each other in both directions"),
        (
            bool(getattr(text, "use_bidirectional_attention", False)),
            "a model whose text attends to what stands behind it",
        ),
        (
            "chunked_attention" in layers,
            "a model with layers that see one chunk of the prompt",
        ),
        (
            is_quantized_kv_cache(cache.cache_dtype),
            f"--kv-cache-dtype {cache.cache_dtype} (masks read keys as they were written)",
        ),
        (
            vllm_config.kv_transfer_config is not None or bool(cache.kv_offloading_size),
            "--kv-transfer-config or --kv-offloading-size (what is known of where images stand in "
            "the cache does not move with it)",
        ),
        (vllm_config.speculative_config is not None, "--speculative-config"),
        (
            bool(getattr(cache, "kv_sharing_fast_prefill", False)),
            "--kv-sharing-fast-prefill (layers without keys of their own see the last tokens of a "
            "prompt alone)",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "--pipeline-parallel-size above 1 (later stages are not told where images stand)",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "--decode-context-parallel-size or --prefill-context-parallel-size above 1",
        ),
        (parallel.use_ubatching, "--enable-dbo or --ubatch-size above 1"),
        (
            bool(vllm_config.use_v2_model_runner),
            f"vLLM's second model runner (set {gpu_masks.ONE_RUNNER})",
        ),
        *([] if current_platform.is_cpu() else gpu_masks.refused(vllm_config)),
    ]
    refused = [setting for applies, setting in table if applies]
    if refused:
        asked = ["sparse masks"] if settings is None or settings.masks is not None else []
        options = ["--masks"] if asked else []
        if settings is not None and settings.application == "mask":
            asked.append("hidden tokens")
            options.append("--apply mask")
        if settings is not None and settings.proportional:
            asked.append("proportional attention")
            options.append("--proportional-attention")
        raise UnsupportedModelError(
            f"{' and '.join(asked)} do not work together with {'; '.join(refused)}. Leave that "
            f"out, or serve the model without {' and '.join(options)}."
        )


def _marked(config: Any) -> bool:
    return list(getattr(config, "mrope_section", None) or ()) == list(MARK)


@contextmanager
def room_for_positions(config: Any, settings: ServerSettings) -> Iterator[None]:
    """Let the language model's rotary tables be twice as long while the model is built.

    Tokens keep the positions of the unpruned prompt, which may be as long as the model's context;
    what is generated comes after that, and may again be as long as the pruned prompt leaves room.

    Raises
    ------
    UnsupportedModelError
        If longer tables would have other numbers in them.
    """
    text = config.get_text_config()
    if settings.default.positions != "original":
        yield
        return
    kinds = rope_types(text) & {"dynamic", "longrope"}
    if kinds:
        raise UnsupportedModelError(
            f"this model's rotary embedding is of type {min(kinds)!r}, whose numbers depend on the "
            "length of the prompt, so kept tokens cannot stay at their own positions in vLLM. Use "
            "positions='compact'."
        )
    known = known_positions(text)
    text.max_position_embeddings = 2 * known
    try:
        yield
    finally:
        text.max_position_embeddings = known
