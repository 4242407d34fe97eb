"""Questions as a model of transformers is asked them: laid out, batched, and answered greedily."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenprune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tokenprune.budget import Keep
    from tokenprune.media.sizes import Content
    from tokenprune.selection import Selection
    from tokenprune.selectors.base import Selector
    from tokenprune_hf.encoding import Encoded
    from tokenprune_hf.resized import Resized
    from tokenprune_hf.vision import VisionModel

_PIXELS = "pixel"
"""How the names of the processor's arguments begin that only the encoder reads."""

GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}
"""Arguments of ``generate`` for the likeliest token at every step, whatever the model's own are."""


def answer(
    model: Any, processor: Any, inputs: Any, *, max_new_tokens: int, **arguments: Any
) -> str:
    """Return what a model says to one prompt, greedily, on one line.

    Parameters
    ----------
    model, processor
        As `tokenprune_hf.loading.load` returns them; the model may be pruned.
    inputs
        A batch of one prompt, as `tokenprune_hf.ask` returns it.
    max_new_tokens
        Of the answer.
    **arguments
        Further ones of ``generate``, such as ``encoded``.
    """
    output = model.generate(**inputs, **arguments, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    text: str = processor.batch_decode(new, skip_special_tokens=True)[0]
    return " ".join(text.split())


def laid_out(
    model: Any, processor: Any, text: str, content: Content | Resized | list[Any]
) -> dict[str, Any]:
    """Return what a processor makes of a question about one image or video, or several images.

    Parameters
    ----------
    model, processor
        As `tokenprune_hf.loading.load` returns them.
    text
        The question.
    content
        An image, what `read_video` or `tokenprune_hf.resize` returned, or a list of images.

    Raises
    ------
    UnsupportedModelError
        If there are several images and the processor has no chat template.
    """
    import tokenprune_hf
    from tokenprune.media.video import Video
    from tokenprune_hf.any_model import vision_model_of_any_type
    from tokenprune_hf.encoder_inputs import VIDEO_FRAMES
    from tokenprune_hf.resized import Resized

    if not isinstance(content, list):
        medium = content.content if isinstance(content, Resized) else content
        asked: dict[str, Any] = {"video" if isinstance(medium, Video) else "image": content}
        return dict(tokenprune_hf.ask(processor, text, **asked))
    if not getattr(processor, "chat_template", None):
        raise UnsupportedModelError(
            "the processor has no chat template, which says how several images are laid out. "
            "Ask about one image at a time."
        )
    said = [*({"type": "image"} for _ in content), {"type": "text", "text": text}]
    message = {"role": "user", "content": said}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = dict(processor(text=[prompt], images=content, return_tensors="pt"))
    if not vision_model_of_any_type(model).family.tells_videos:
        # Else they may be the frames of a video, which methods that read the question refuse.
        inputs[VIDEO_FRAMES] = [1] * inputs["pixel_values"].shape[:-3].numel()
    return inputs


def without_pixels(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """Return a prompt without what only the encoder reads."""
    return {name: value for name, value in prompt.items() if not name.startswith(_PIXELS)}


def on_device(model: Any, prompt: Mapping[str, Any]) -> dict[str, Any]:
    """Return a prompt with its tensors where the model takes them."""
    import torch

    return {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in prompt.items()
    }


def padding_of(processor: Any) -> int:
    """Return the token that prompts are filled up with."""
    tokenizer = processor.tokenizer
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def batched(prompts: Sequence[Mapping[str, Any]], padding: int) -> dict[str, Any]:
    """Put prompts together: text padded on the left, the rest one behind the other."""
    import torch

    length = max(int(prompt["input_ids"].shape[1]) for prompt in prompts)
    result: dict[str, Any] = {}
    for name, value in prompts[0].items():
        own = [prompt[name] for prompt in prompts]
        if isinstance(value, torch.Tensor) and value.shape == prompts[0]["input_ids"].shape:
            fill = padding if name == "input_ids" else 0
            result[name] = torch.cat(
                [
                    torch.nn.functional.pad(one, (length - one.shape[1], 0), value=fill)
                    for one in own
                ]
            )
        elif isinstance(value, torch.Tensor):
            result[name] = torch.cat(own)
        else:
            result[name] = [entry for one in own for entry in one]
    return result


def selected(
    vision: VisionModel,
    inputs: Mapping[str, Any],
    encoded: Encoded,
    selector: Selector,
    keep: Keep,
) -> list[Selection]:
    """Return what a method chooses of every item of a call, as a pruned model's calls do it.

    To time selecting by itself: the language model is run as far as the method reads it.

    Parameters
    ----------
    vision
        The model's.
    inputs
        The call's, by name, with input_ids [B, L].
    encoded
        What the encoder made of its images or videos.
    selector, keep
        The method and the budget of each item.
    """
    from tokenprune.selecting import select_many
    from tokenprune_hf.reading import prompt_items

    items = prompt_items(vision, inputs, encoded, selector.needs)
    return select_many([one for of in items.values() for one in of], selector, keep)
