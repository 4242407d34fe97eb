"""Settings of vLLM under which pruning would be wrong, or would not happen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenprune.errors import UnsupportedModelError
from tokenprune.registry import find
from tokenprune_vllm.positions import known_positions, rope_types
from tokenprune_vllm.settings import INTERLEAVED, ServerSettings

_WITHOUT_HIDDEN_STATES = ("ngram", "ngram_gpu", "suffix")
"""Ways to guess the next tokens from the text alone; others read positions of their own."""


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
    readers = [name for name in settings.methods if "query_attention" in find(name).needs]
    reads = bool(readers)
    reading = (
        f"together with {readers[0]}, which runs the model's first layers itself" if reads else ""
    )
    table: list[tuple[bool, str]] = [
        (
            lora is not None and lora.enable_tower_connector_lora,
            "--enable-tower-connector-lora (it counts an image's tokens by its rows)",
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
            multimodal.mm_encoder_tp_mode == "data",
            "--mm-encoder-tp-mode data (ranks would each choose for their own images)",
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
            reads and parallel.tensor_parallel_size > 1,
            f"--tensor-parallel-size above 1 {reading}",
        ),
        (
            reads and parallel.pipeline_parallel_size > 1,
            f"--pipeline-parallel-size above 1 {reading}",
        ),
        (
            # The layers of experts wait for all ranks, and the others read nothing just then.
            reads and parallel.data_parallel_size > 1 and vllm_config.model_config.is_moe,
            f"--data-parallel-size above 1 for a mixture of experts {reading}",
        ),
        (reads and vllm_config.quant_config is not None, f"quantised weights {reading}"),
        (reads and lora is not None, f"--enable-lora {reading}"),
        (
            # Offsets are written for a whole batch, and each part of it would read the first ones.
            original and parallel.use_ubatching,
            "--enable-dbo or --ubatch-size above 1 with --positions original",
        ),
        (
            # Offsets come with the embeddings, which only the first stage has.
            original and parallel.pipeline_parallel_size > 1,
            "--pipeline-parallel-size above 1 with --positions original",
        ),
        (
            # They would be given the columns that travel behind rows.
            (original or not known)
            and speculative is not None
            and speculative.method not in _WITHOUT_HIDDEN_STATES,
            f"--speculative-config with method {getattr(speculative, 'method', None)!r} and "
            + ("--positions original" if known else "a model of no known family"),
        ),
    ]
    refused = [setting for applies, setting in table if applies]
    if refused:
        raise UnsupportedModelError(
            f"tokenprune does not work together with {'; '.join(refused)}. Leave that out, or "
            "serve the model without tokenprune."
        )


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
