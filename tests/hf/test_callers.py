"""However a pruned model is called, it answers alike: threads, copies, wrappers, second blocks.

What is right is always what the same call says on a model of its own, in one thread, in one block.
"""

from __future__ import annotations

import copy
import functools
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

import tokenprune_hf
from tests.hf import mllamas
from tests.hf.models import IMAGE, START, TINY, pixels, prompt
from tests.hf.test_lifecycle import state
from tokenprune.errors import PromptError, TokenPruneError, UnsupportedModelError
from tokenprune.masks import PooledBlocks
from tokenprune_eval.dominance import measure_dominance
from tokenprune_hf.mllama.trimmed import TrimmedAttention

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
# transformers 5.19 calls its own mllama so.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`hidden_state` is deprecated.*MllamaVisionEncoderLayer:FutureWarning"
)
MODELS = ["llava", "qwen2_5_vl", "internvl"]


def questions(name: str, count: int = 6) -> list[dict[str, Any]]:
    """Return prompts of one model with images of their own and different lengths."""
    result = []
    for number in range(count):
        one = prompt(TINY[name], ["tit" + "t" * (number % 3)])
        one["pixel_values"] = pixels(*one["pixel_values"].shape, seed=number)
        result.append(one)
    return result


def in_threads(work: Callable[[Any], Any], asked: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(work, asked))


# Threads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cls-attention", "zeroth-order", "flexselect"])
@pytest.mark.parametrize("name", MODELS)
def test_threads_get_their_own_answers_and_selections(name: str, method: str) -> None:
    model, asked = TINY[name].model(), questions(name)
    options: dict[str, Any] = {"layer": 1} if method == "flexselect" else {}

    def answer(inputs: dict[str, Any]) -> tuple[list[int], list[int], Tensor]:
        said = model.generate(**inputs, **GREEDY)[0].tolist()
        kept = pruning.selections[0].kept.tolist()
        return said, kept, model(**inputs).logits[0, -1]

    with torch.no_grad(), tokenprune_hf.prune(model, method, 5, **options) as pruning:
        alone = [answer(inputs) for inputs in asked]
        assert len({tuple(kept) for _, kept, _ in alone}) > 1
        for (said, kept, logits), right in zip(
            in_threads(answer_without_grad(answer), asked * 3), alone * 3, strict=True
        ):
            assert said == right[0]
            assert kept == right[1]
            assert torch.equal(logits, right[2])


def answer_without_grad(answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Threads begin with gradients on."""

    def inside(inputs: Any) -> Any:
        with torch.no_grad():
            return answer(inputs)

    return inside


def test_threads_under_proportional_attention() -> None:
    model, asked = TINY["internvl"].model(), questions("internvl")

    def answer(inputs: dict[str, Any]) -> list[int]:
        return list(model.generate(**inputs, **GREEDY)[0].tolist())

    with tokenprune_hf.prune(model, "divprune", 4, proportional_attention=True):
        assert in_threads(answer, asked * 3) == [answer(inputs) for inputs in asked] * 3


def test_threads_under_sparse_masks() -> None:
    model, asked = TINY["llava"].model(), questions("llava")

    def answer(inputs: dict[str, Any]) -> tuple[list[int], int, float]:
        said = model.generate(**inputs, **GREEDY)[0].tolist()
        return said, sparse.layouts[0].length, sparse.density

    with tokenprune_hf.sparse(model, PooledBlocks(keep=0.5, block=8)) as sparse:
        alone = [answer(inputs) for inputs in asked]
        assert in_threads(answer, asked * 3) == alone * 3


def test_threads_under_trimmed_attention() -> None:
    model = mllamas.tiny()
    asked = [mllamas.prompt(["t2t"], seed=seed) for seed in range(6)]

    def answer(inputs: dict[str, Any]) -> tuple[list[int], list[int]]:
        said = model.generate(**inputs, **GREEDY)[0].tolist()
        return said, trimming.selections[0].kept.tolist()

    with TrimmedAttention(model, 0.1) as trimming:
        alone = [answer(inputs) for inputs in asked]
        assert in_threads(answer, asked * 3) == alone * 3


def test_threads_encode_and_measure_apart() -> None:
    model, asked = TINY["internvl"].model(), questions("internvl")

    def features(inputs: dict[str, Any]) -> Tensor:
        tokens = tokenprune_hf.encode(model, **inputs).modalities["image"].items[0].tokens
        assert tokens.features is not None
        assert isinstance(tokens.cls_attention, Tensor)
        return torch.cat([tokens.features.flatten(), tokens.cls_attention.flatten()])

    alone = [features(inputs) for inputs in asked]
    for one, right in zip(in_threads(features, asked * 3), alone * 3, strict=True):
        assert torch.equal(one, right)

    with measure_dominance(model) as measured:
        for inputs in asked:
            model.generate(**inputs, **GREEDY)
    with measure_dominance(model) as together:
        in_threads(lambda inputs: model.generate(**inputs, **GREEDY), asked)
    of_prompt = [
        sorted(one.layers[0].text_share for one in result.result.prompts)
        for result in (measured, together)
    ]
    assert of_prompt[0] == pytest.approx(of_prompt[1])


def test_selections_are_those_of_the_asking_thread_or_else_of_the_last_call() -> None:
    """A thread that only waits for a streamer reads what the thread that generates chose."""
    model, (first, second, *_) = TINY["llava"].model(), questions("llava")
    with tokenprune_hf.prune(model, "feature-norm", 3) as pruning:
        worker = threading.Thread(target=model.generate, kwargs={**first, **GREEDY})
        worker.start()
        worker.join()
        of_worker = pruning.selections[0].kept.tolist()
        model.generate(**second, **GREEDY)
        of_main = pruning.selections[0].kept.tolist()
        worker = threading.Thread(target=model.generate, kwargs={**first, **GREEDY})
        worker.start()
        worker.join()
        assert pruning.selections[0].kept.tolist() == of_main != of_worker
        assert pruning.selecting_seconds > 0


def test_a_block_that_ends_while_another_thread_generates_gives_no_wrong_answer() -> None:
    class Ends(BaseStreamer):
        """Takes pruning off when the prompt has been handed over, before it is read."""

        def put(self, value: Tensor) -> None:
            tokenprune_hf.remove(model)

        def end(self) -> None:
            pass

    model, (inputs, *_) = TINY["llava"].model(), questions("llava")
    with tokenprune_hf.prune(model, "feature-norm", 3) as pruning:
        with pytest.raises(TokenPruneError, match="taken off the model while generate"):
            model.generate(**inputs, **GREEDY, streamer=Ends())
        assert not pruning.is_attached


# Copies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", MODELS)
def test_a_copy_of_a_pruned_model_is_pruned_by_itself(name: str, how: str) -> None:
    model, (inputs, *_) = TINY[name].model(), questions(name)
    with tokenprune_hf.prune(model, "zeroth-order", 5):
        other = copy.deepcopy(model) if how == "deepcopy" else saved(model)
        right = model.generate(**inputs, **GREEDY)
        later = copy.deepcopy(model)  # with what a call leaves on the model
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(other.generate(**inputs, **GREEDY), right)
        assert torch.equal(later.generate(**inputs, **GREEDY), right)
        assert other(**inputs).logits.shape[1] < inputs["input_ids"].shape[1]
    assert torch.equal(other.generate(**inputs, **GREEDY), right)
    tokenprune_hf.remove(other)
    plain = TINY[name].model()
    assert torch.equal(other.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))
    # Hooks of transformers itself are there after a call, and none of ours.
    assert [part[:2] for part in state(other)] == [part[:2] for part in state(plain)]


def saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_copy_under_proportional_attention_sparse_masks_or_trimming() -> None:
    inputs = questions("llava")[0]
    ways: list[Callable[[Any], Any]] = [
        lambda model: tokenprune_hf.prune(model, "divprune", 4, proportional_attention=True),
        lambda model: tokenprune_hf.sparse(model, PooledBlocks(keep=0.2, block=4)),
    ]
    for way in ways:
        model = TINY["llava"].model()
        plain = model(**inputs).logits[0, -1]
        with way(model):
            right = model(**inputs).logits[0, -1]
            other = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
        assert not torch.equal(right, plain)
        assert torch.equal(other(**inputs).logits[0, -1], right)
        tokenprune_hf.remove(other)
        assert torch.equal(other(**inputs).logits[0, -1], plain)
    llama, asked = mllamas.tiny(), mllamas.prompt(["t2t"])
    with TrimmedAttention(llama, 0.1):
        right = llama(**asked).logits
        other = copy.deepcopy(llama)
        with torch.no_grad():
            for parameter in llama.parameters():
                parameter.zero_()
    assert torch.equal(other(**asked).logits, right)
    tokenprune_hf.remove(other)
    assert not torch.equal(other(**asked).logits, right)


def test_a_replica_of_a_pruned_model_is_refused() -> None:
    model, (inputs, *_) = TINY["llava"].model(), questions("llava")
    with tokenprune_hf.prune(model, "uniform", 3):
        replica = model._replicate_for_data_parallel()
        with pytest.raises(PromptError, match="replica"):
            replica(**inputs)


# Blocks and other people's methods ----------------------------------------------------------------


def test_a_block_entered_again_prunes_again() -> None:
    model, (inputs, *_) = TINY["llava"].model(), questions("llava")
    model.generate(**inputs, **GREEDY)  # transformers lays hooks of its own
    before = state(model)
    pruning = tokenprune_hf.prune(model, "feature-norm", 5)
    with pruning:
        first = model.generate(**inputs, **GREEDY)
    assert state(model) == before
    with pruning:
        with pruning:  # inside itself: the inner end is not the outer one
            assert torch.equal(model.generate(**inputs, **GREEDY), first)
        assert torch.equal(model.generate(**inputs, **GREEDY), first)
    assert state(model) == before
    with (
        tokenprune_hf.prune(model, "random", 3),
        pytest.raises(TokenPruneError, match="already"),
        pruning,
    ):
        pass
    assert state(model) == before


def test_a_models_own_generate_and_forward_come_back() -> None:
    model, (inputs, *_) = TINY["llava"].model(), questions("llava")
    length = inputs["input_ids"].shape[1]
    calls: list[str] = []
    plain_forward = model.forward

    @functools.wraps(plain_forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append("forward")
        return plain_forward(*args, **kwargs)

    model.generate = functools.partial(model.generate, max_length=length + 3, do_sample=False)
    model.forward = forward
    own = model.generate, model.forward
    assert model.generate(**inputs).shape[1] == length + 3
    with tokenprune_hf.prune(model, "feature-norm", 5) as pruning:
        calls.clear()
        assert model.generate(**inputs).shape[1] == length + 3
        assert len(calls) == 3
        assert len(pruning.selections[0]) == 5
    assert (model.generate, model.forward) == own


def test_what_somebody_puts_in_front_inside_the_block_stays() -> None:
    model, (inputs, *_) = TINY["llava"].model(), questions("llava")
    plain = model.generate(**inputs, **GREEDY)
    with tokenprune_hf.prune(model, "feature-norm", 5):
        model.generate = functools.partial(model.generate, **GREEDY)
        assert not torch.equal(model.generate(**inputs), plain)
    assert torch.equal(model.generate(**inputs), plain)
    del model.generate


def test_the_inner_model_is_not_called_unpruned() -> None:
    model, (inputs, *_) = TINY["llava"].model(), questions("llava")
    with tokenprune_hf.prune(model, "feature-norm", 5):
        with pytest.raises(PromptError, match="Call that one"):
            model.model(**inputs)
        model.model(input_ids=torch.tensor([[5, 6]]))
    model.model(**inputs)


def test_text_that_spells_a_placeholder_is_answered_as_the_plain_model_does() -> None:
    model = TINY["llava"].model()
    ids = torch.tensor([[2, 11, START, IMAGE, 12, 13]])
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(**call, **GREEDY)
    with tokenprune_hf.prune(model, "feature-norm", 5) as pruning:
        assert torch.equal(model.generate(**call, **GREEDY), plain)
        assert pruning.selections == []


@pytest.mark.parametrize("proportional", [False, True])
def test_a_call_inside_a_call_is_pruned_by_itself(proportional: bool) -> None:
    """A logits processor that asks the model about another image, by either of its calls."""
    model, (first, second, *_) = TINY["llava"].model(), questions("llava")
    said: list[Any] = []

    def ask(_ids: Tensor, scores: Tensor) -> Tensor:
        said.append((model(**second).logits[0, -1], model.generate(**second, **GREEDY)[0]))
        return scores

    with (
        torch.no_grad(),
        tokenprune_hf.prune(model, "divprune", 5, proportional_attention=proportional) as pruning,
    ):
        right = model(**second).logits[0, -1], model.generate(**second, **GREEDY)[0]
        alone = model.generate(**first, **GREEDY)
        assert torch.equal(model.generate(**first, **GREEDY, logits_processor=[ask]), alone)
        assert len(pruning.selections[0]) == 5
    assert len(said) == 5
    for logits, sequence in said:
        assert torch.equal(logits, right[0])
        assert torch.equal(sequence, right[1])


# Wrappers -----------------------------------------------------------------------------------------


# PEFT asks the newest transformers by a name that it has deprecated.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")


@PEFT_WARNS
def test_peft_models_are_pruned_inside() -> None:
    model, (inputs, *_) = TINY["llava"].model(), questions("llava")
    target = r".*language_model.*q_proj"
    lora = peft.LoraConfig(r=4, target_modules=target, init_lora_weights=False)
    adapted: Any = peft.get_peft_model(model, lora).eval()
    inside = adapted.base_model.model
    plain = adapted.generate(**inputs, **GREEDY)
    with tokenprune_hf.prune(inside, "cls-attention", 5):
        right = inside.generate(**inputs, **GREEDY)
        logits = inside(**inputs).logits
    with tokenprune_hf.prune(adapted, "cls-attention", 5) as pruning:
        assert pruning.model is inside
        assert torch.equal(adapted.generate(**inputs, **GREEDY), right)
        assert torch.equal(adapted(**inputs).logits, logits)  # LoRA calls forward itself
    assert torch.equal(adapted.generate(**inputs, **GREEDY), plain)
    tokenprune_hf.apply(adapted, "cls-attention", 5)
    tokenprune_hf.remove(adapted)
    assert torch.equal(adapted.generate(**inputs, **GREEDY), plain)


@PEFT_WARNS
@pytest.mark.filterwarnings("ignore:method 'zeroth-order' cannot use the weights:UserWarning")
@pytest.mark.parametrize(
    "method", ["cls-attention", "zeroth-order", "information", "flexselect", "relevant-information"]
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_images_are_chosen_with_the_adapter_that_is_active(name: str, method: str) -> None:
    options: dict[str, Any] = {
        "flexselect": {"layer": 1},
        "relevant-information": {"layer": 1},
        "zeroth-order": {"directions": 4096},  # all there are, whether by calls or by weights
    }.get(method, {})
    plain, (inputs, *_) = TINY[name].model(), questions(name)
    target = r".*language_model.*_proj|.*(projector|merger).*(linear_\d|mlp\.[02])"
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=target, init_lora_weights=False)
    torch.manual_seed(0)
    adapted: Any = peft.get_peft_model(copy.deepcopy(plain), lora, "one").eval()
    adapted.add_adapter("another", lora)

    def answer(model: Any) -> tuple[list[int], list[int]]:
        said = model.generate(**inputs, **GREEDY)[0].tolist()
        return said, kept_by[id(model)].selections[0].kept.tolist()

    models = {"none": plain}
    for active in ("one", "another"):
        adapted.set_adapter(active)
        models[active] = copy.deepcopy(adapted).merge_and_unload().eval()
    kept_by: dict[int, Any] = {}
    with torch.no_grad(), ExitStack() as stack:
        for model in (adapted, *models.values()):
            pruning = tokenprune_hf.prune(model, method, 5, **options)
            kept_by[id(model)] = stack.enter_context(pruning)
        right = {active: answer(model) for active, model in models.items()}
        for active in ("one", "another", "one"):
            adapted.set_adapter(active)
            assert answer(adapted) == right[active], active
        with adapted.disable_adapter():
            assert answer(adapted) == right["none"]
    if method not in ("cls-attention",):
        assert len({str(kept) for _, kept in right.values()}) > 1, "adapters do not matter here"


@PEFT_WARNS
def test_peft_prompt_tuning_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=32)
    config.num_layers, config.num_attention_heads = 2, 4
    adapted: Any = peft.get_peft_model(TINY["llava"].model(), config)
    with pytest.raises(UnsupportedModelError, match="learned embeddings"):
        tokenprune_hf.prune(adapted, "uniform", 3)


def test_compiled_models() -> None:
    """The backend that compiles nothing shows what torch.compile would be given."""
    inputs = questions("llava")[0]
    model = TINY["llava"].model()
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5):
        right, said = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad(), tokenprune_hf.prune(compiled, "feature-norm", 5) as pruning:
        assert pruning.model is model
        torch.testing.assert_close(compiled(**inputs).logits, right)
        assert torch.equal(compiled.generate(**inputs, **GREEDY), said)
    model = TINY["llava"].model()
    model.forward = torch.compile(model.forward, backend="eager")
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5):
        torch.testing.assert_close(model(**inputs).logits, right)
    model = TINY["llava"].model()
    model.compile(backend="eager")
    with torch.no_grad(), tokenprune_hf.prune(model, "feature-norm", 5):
        torch.testing.assert_close(model(**inputs).logits, right)


def test_wrappers_that_run_something_else_are_refused() -> None:
    class Holds(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.vlm, self.config, self.model = model, model.config, model.model

        def generate(self, **kwargs: Any) -> Any:
            return self.vlm.generate(**kwargs)

    model = TINY["llava"].model()
    for wrapper, message in (
        (nn.DataParallel(model), "DataParallel copies the model"),
        (Holds(model), "no vision-language model of transformers"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            tokenprune_hf.prune(wrapper, "uniform", 3)
