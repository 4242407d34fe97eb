"""A pretrained language model behind the bundled encoder: dequantising, packing, going on, merging.

Everything runs on a Llama of two layers, written as the Q4_1 GGUF file that the package ships.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf", reason="reading GGUF files needs the package gguf")

import gguf
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers.utils import logging as of_transformers

from tests.script_modules import imported
from tokenprune_eval.bundled import scenes, smollm2
from tokenprune_eval.bundled.errors import BundledModelError

HIDDEN, HEADS, KV_HEADS, LAYERS, MLP = 64, 2, 1, 2, 96
logging: Any = of_transformers  # untyped
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *smollm2.RENAMED]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with imported("train_real_lm") as module:
        yield module


def rotary_pairs(matrix: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Put a head's row i beside its row i + half, as GGUF files of Llamas have them."""
    rows = []
    for head in np.split(matrix, heads):
        half = len(head) // 2
        for i in range(half):
            rows += [head[i], head[half + i]]
    return np.stack(rows)


def write_gguf(file: Path, special: list[str] = SPECIAL) -> dict[str, np.ndarray[Any, Any]]:
    """Write a tiny Llama; return its matrices as they are after quantising, not permuted."""
    rng = np.random.default_rng(0)
    vocabulary = [*special, *sorted(ByteLevel.alphabet()), "th"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    types = [gguf.TokenType.CONTROL] * len(special)
    writer.add_token_types([*types, *[gguf.TokenType.NORMAL] * (len(vocabulary) - len(special))])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)

    stored: dict[str, np.ndarray[Any, Any]] = {}
    kind = gguf.GGMLQuantizationType.Q4_1

    def add(name: str, known_as: str, shape: tuple[int, ...], heads: int = 0) -> None:
        values = rng.normal(size=shape).astype(np.float32) * (0.3 if len(shape) == 2 else 0.1)
        if len(shape) == 1:
            values += 1
            writer.add_tensor(name, values)
            stored[known_as] = values
            return
        packed = gguf.quantize(values, kind)
        stored[known_as] = gguf.dequantize(packed, kind)
        if heads:
            packed = rotary_pairs(packed, heads)
        writer.add_tensor(name, packed, raw_dtype=kind)

    add("token_embd.weight", "model.embed_tokens.weight", (len(vocabulary), HIDDEN))
    add("output_norm.weight", "model.norm.weight", (HIDDEN,))
    width = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        here, there = f"blk.{layer}.", f"model.layers.{layer}."
        add(here + "attn_norm.weight", there + "input_layernorm.weight", (HIDDEN,))
        add(here + "ffn_norm.weight", there + "post_attention_layernorm.weight", (HIDDEN,))
        add(here + "attn_q.weight", there + "self_attn.q_proj.weight", (HIDDEN, HIDDEN), HEADS)
        add(here + "attn_k.weight", there + "self_attn.k_proj.weight", (width, HIDDEN), KV_HEADS)
        add(here + "attn_v.weight", there + "self_attn.v_proj.weight", (width, HIDDEN))
        add(here + "attn_output.weight", there + "self_attn.o_proj.weight", (HIDDEN, HIDDEN))
        add(here + "ffn_gate.weight", there + "mlp.gate_proj.weight", (MLP, HIDDEN))
        add(here + "ffn_up.weight", there + "mlp.up_proj.weight", (MLP, HIDDEN))
        add(here + "ffn_down.weight", there + "mlp.down_proj.weight", (HIDDEN, MLP))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return file, write_gguf(file)


@pytest.fixture(scope="module")
def language_model(
    quantised: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return smollm2.language_model_path(tmp_path_factory.mktemp("cache"), quantised[0])


@pytest.fixture(scope="module")
def layout(script: Any, language_model: Path) -> Any:
    tokenizer = script.build_tokenizer(language_model)
    found = script.SubwordLayout(script.build_processor(tokenizer, scenes.IMAGE_SIZE))
    found.check_images()
    return found


@pytest.fixture
def model(script: Any, language_model: Path, layout: Any) -> Any:
    """Return a model whose LoRA changes something."""
    torch.manual_seed(0)
    built = script.build_model(language_model, layout.tokenizer, torch.float32)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return built


def a_scene(rng: np.random.Generator) -> scenes.Scene:
    kinds, colors = rng.permutation(scenes.KINDS)[:3], rng.permutation(list(scenes.COLORS))[:3]
    cells = np.sort(rng.choice(9, 3, replace=False))
    items = []
    for kind, color, cell in zip(kinds, colors, cells, strict=True):
        top, left = (int(cell) // 3 * 75 + 10, int(cell) % 3 * 75 + 10)
        place = scenes.PLACES[int(cell)]
        box = (left, top, left + 50, top + 50)
        items.append(scenes.Item(str(kind), str(color), place, box, ""))
    return scenes.Scene(np.zeros((0, 0, 3), np.uint8), tuple(items), "", (0, 0, 0, 0))


@pytest.fixture(scope="module")
def pictures(script: Any) -> Any:
    rng = np.random.default_rng(3)
    features = rng.normal(size=(12, 256, 384)).astype(np.float16)
    return script.Pictures((features,), tuple(a_scene(rng) for _ in range(12)))


# --- dequantising -------------------------------------------------------------------------------


def test_dequantised_weights_are_the_quantised_ones_with_queries_and_keys_in_order(
    quantised: tuple[Path, dict[str, Any]], language_model: Path
) -> None:
    found = load_file(language_model / "model.safetensors")
    assert found.keys() == quantised[1].keys()
    for name, expected in quantised[1].items():
        np.testing.assert_array_equal(found[name].numpy(), expected.astype(np.float16), name)
    config = json.loads((language_model / "config.json").read_text("utf-8"))
    assert config["tie_word_embeddings"]
    assert "quantization_config" not in config


def test_the_committed_configuration_names_no_folder() -> None:
    config = json.loads((smollm2.WEIGHTS / "config.json").read_text("utf-8"))
    assert "_name_or_path" not in config["text_config"].keys() | config.keys()


def test_dequantising_writes_nothing(
    quantised: tuple[Path, dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    enabled = logging.is_progress_bar_enabled()  # whoever loads a model switches them off
    logging.enable_progress_bar()
    try:
        smollm2.language_model_path(tmp_path, quantised[0])
        assert capfd.readouterr() == ("", "")
        assert logging.is_progress_bar_enabled()
    finally:
        if not enabled:
            logging.disable_progress_bar()


def test_dequantising_happens_once(
    quantised: tuple[Path, dict[str, Any]], language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_dequantise", None)
    assert smollm2.language_model_path(language_model.parent, quantised[0]) == language_model


def test_tokens_for_pictures_take_the_ids_of_those_they_are_named_after(layout: Any) -> None:
    tokenizer = layout.tokenizer
    ids = tokenizer.convert_tokens_to_ids(list(smollm2.RENAMED.values()))
    assert ids == [SPECIAL.index(name) for name in smollm2.RENAMED]
    assert tokenizer("<img><IMG_CONTEXT></img>")["input_ids"] == [3, 5, 4]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert tokenizer.decode(layout.ids("where is the 7?\n")) == "where is the 7?\n"


def test_files_that_are_not_smollm2_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundledModelError, match=r"no GGUF file .*none\.gguf\. Give another"):
        smollm2.language_model_path(tmp_path, tmp_path / "none.gguf")
    write_gguf(tmp_path / "other.gguf", [name for name in SPECIAL if name != "<filename>"])
    with pytest.raises(BundledModelError, match="has no <filename>, so it is not SmolLM2's"):
        smollm2.language_model_path(tmp_path / "cache", tmp_path / "other.gguf")
    assert not list((tmp_path / "cache").iterdir())


# --- packing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [{}, {"pairs": 1.0}])
def test_packed_questions_learn_what_single_ones_do(
    script: Any, layout: Any, model: Any, pictures: Any, shares: dict[str, float]
) -> None:
    drawing = script.Drawing(layout, pictures, script.Pictures((), ()), seed=1)
    (drawn,) = drawing.step(0, 4, script.Shares(**shares))
    prefix, rows, features = drawn
    assert features.shape[1] == (2 if shares else 1)
    assert min(map(len, rows)) > 3
    loss, count = script.loss_of(model, layout, drawn)
    loss.backward()
    packed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    projector, embed = model.model.multi_modal_projector, model.get_input_embeddings()
    total, tokens = torch.zeros(()), 0
    for branches, images in zip(rows, features, strict=True):
        for branch in branches:
            patches = torch.from_numpy(images).float().unflatten(1, (16, 16))
            visual = projector(model.model.pixel_shuffle(patches, 0.5).flatten(1, 2)).flatten(0, 1)
            ids = torch.tensor([*prefix, *branch.prompt, *branch.answer])
            embedded = embed(ids).clone()
            embedded[ids == layout.image_id] = visual
            hidden = model.model.language_model(inputs_embeds=embedded[None]).last_hidden_state[0]
            logits = model.lm_head(hidden)
            learnt = branch.learnt or (True,) * len(branch.answer)
            first = len(ids) - len(branch.answer)
            for i, (token, flag) in enumerate(zip(branch.answer, learnt, strict=True)):
                if flag:
                    total = total - logits[first + i - 1].log_softmax(-1)[token]
                    tokens += 1
    assert count == tokens
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-4)
    total.backward()
    single = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert packed.keys() == single.keys()
    assert any("lora_A" in n for n in single)
    assert any("multi_modal_projector" in n for n in single)
    for name, gradient in single.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(packed[name], gradient, rtol=0, atol=1e-3 * scale + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_change_has_the_values_and_gradients_of_the_sum_of_matrices(
    script: Any, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 40).half()
    layer = script.LowRank(weight, dtype)
    x = torch.randn(2, 5, 40).to(dtype).requires_grad_()
    torch.testing.assert_close(layer(x), x @ weight.to(dtype).T)  # no change to begin with
    with torch.inference_mode():
        layer(x)
    for step in range(2):  # a change in place is seen
        with torch.no_grad():
            layer.lora_A.weight.normal_()
            layer.lora_B.weight.normal_(std=1 + step)
        a, b, plain = (
            t.detach().float().requires_grad_()
            for t in (layer.lora_A.weight, layer.lora_B.weight, x)
        )
        expected = plain @ (weight.float() + script.SCALE * b @ a).T
        found = layer(x)
        least = 1e-5 if dtype == torch.float32 else 1e-2
        assert (
            float((found.detach().float() - expected.detach()).norm() / expected.detach().norm())
            < least
        )
        toward = torch.randn_like(expected)
        expected.backward(toward)
        layer.zero_grad()
        x.grad = None
        found.backward(toward.to(dtype))
        for mine, other in ((x, plain), (layer.lora_A.weight, a), (layer.lora_B.weight, b)):
            assert mine.grad is not None
            assert other.grad is not None
            assert float((mine.grad.float() - other.grad).norm() / other.grad.norm()) < least


def test_shuffled_captions_name_every_item_and_leave_out_what_cannot_be_known(
    layout: Any,
) -> None:
    scene = a_scene(np.random.default_rng(0))
    branch = layout.shuffled_caption(scene, np.random.default_rng(1))
    text = layout.tokenizer.decode(branch.answer)
    assert text.endswith("<|im_end|>")
    parts = [part.split() for part in text.removesuffix("<|im_end|>").split(" , ")]
    assert sorted(map(sorted, parts)) == sorted(
        sorted((i.place, i.color, i.kind)) for i in scene.items
    )
    known = layout.tokenizer.decode(
        [t for t, k in zip(branch.answer, branch.learnt, strict=True) if k]
    )
    assert known.split() == [w for p in parts[:-1] for w in p[1:]] + [
        parts[-1][1],
        parts[-1][2] + "<|im_end|>",
    ]


def test_a_step_follows_from_the_seed_and_its_number(
    script: Any, layout: Any, pictures: Any
) -> None:
    shares = script.Shares(pairs=0.5)
    drawings = [
        script.Drawing(layout, pictures, script.Pictures((), ()), seed=s) for s in (1, 1, 2)
    ]
    (_, one), (_, two), (_, other) = ([d.step(n, 4, shares) for n in (6, 7)] for d in drawings)
    drawings[1].step(3, 4, shares)
    assert [part[:2] for part in one] == [part[:2] for part in two]
    assert [part[:2] for part in one] != [part[:2] for part in other]


# --- the projector's words ----------------------------------------------------------------------


def test_tokens_of_an_item_are_those_under_its_box(script: Any, model: Any) -> None:
    scene = a_scene(np.random.default_rng(5))
    tokens = script.item_tokens(scene, 8)
    for item in scene.items:
        shown = np.zeros((224, 224), bool)
        left, top, right, bottom = item.box
        shown[top:bottom, left:right] = True
        covered = shown.reshape(8, 28, 8, 28).mean(axis=(1, 3)).flatten()
        mine = [token for token, one in tokens if one is item]
        assert mine == list(np.flatnonzero(covered >= script.COVERED))
    # A token holds the features of the four patches that lie where it does.
    numbers = np.zeros((1, 256, 384), np.float16)
    numbers[0, :, 0] = np.arange(256)
    shuffled = script.shuffled_features(model, numbers)[0]
    row, column = divmod(11, 8)
    patches = {16 * (2 * row + i) + 2 * column + j for i in (0, 1) for j in (0, 1)}
    assert set(shuffled[11][shuffled[11] > 0].tolist()) == {float(p) for p in patches}


def test_the_projector_learns_the_words_of_items(
    script: Any, layout: Any, model: Any, pictures: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    # The same pictures to fit and to read: features are random, so only memory can help.
    script.fit_projector(model, layout, pictures, pictures, steps=150, seed=0)
    text = capsys.readouterr().out
    _, explained, *told_apart = (part.split()[-1] for part in text.strip().split(", "))
    assert float(explained) > 0.5, text
    assert len(told_apart) == 3
    assert min(map(float, told_apart)) > 0.98, text


# --- going on -----------------------------------------------------------------------------------


def options_for(work: Path, **changed: Any) -> argparse.Namespace:
    values = {
        "work": work,
        "minutes": 60.0,
        "images": 12,
        "batch": 2,
        "learning_rate": 1e-3,
        "projector_share": 0.5,
        "warmup": 4,
        "pairs": 0.3,
        "easy_share": 0.0,
        "captions": 0.5,
        "shuffled": 1,
        "questions": 2,
        "fit_steps": 3,
        "log_every": 100,
        "validate_every": 3,
        "validate_on": 10,
        "checkpoint_every": 2,
        "threads": 1,
        "seed": 4,
    }
    return argparse.Namespace(**{**values, **changed})


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(
    script: Any,
    layout: Any,
    pictures: Any,
    language_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(work: Path, stop_at: int | None = None) -> Any:
        torch.manual_seed(0)
        built = script.build_model(language_model, layout.tokenizer, torch.bfloat16)
        drawing = script.Drawing(layout, pictures, script.Pictures((), ()), seed=4)
        with monkeypatch.context() as patched:
            if stop_at is not None:
                step = drawing.step

                def killed(number: int, *rest: Any) -> Any:
                    if number == stop_at:
                        raise Killed
                    return step(number, *rest)

                patched.setattr(drawing, "step", killed)
            return script.train(built, layout, drawing, pictures, options_for(work))

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", stop_at=5)
    folder = tmp_path / "killed" / "run"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-0000004"]
    # What a kill in the middle of writing leaves.
    (folder / ".checkpoint-0000006-abc").mkdir()
    state = run(tmp_path / "killed")
    assert (state.step, state.images) == (whole.step, whole.images) == (6, 12)
    assert [row["accuracy"] for row in state.curve] == [row["accuracy"] for row in whole.curve]
    trained, again = (
        load_file(tmp_path / name / "run" / "checkpoint-0000006" / "trained.safetensors")
        for name in ("whole", "killed")
    )
    assert trained.keys() == again.keys()
    assert any(float(t.abs().max()) > 0 for n, t in trained.items() if "lora_B" in n)
    for name, tensor in trained.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0)


def test_minutes_end_a_run_with_a_checkpoint(
    script: Any, layout: Any, model: Any, pictures: Any, tmp_path: Path
) -> None:
    drawing = script.Drawing(layout, pictures, script.Pictures((), ()), seed=4)
    options = options_for(tmp_path, minutes=0.0, fit_steps=0)
    assert script.train(model, layout, drawing, pictures, options).step == 0
    assert script.Checkpoints(tmp_path / "run").newest().name == "checkpoint-0000000"


def test_validation_counts_answers_that_would_be_generated(
    script: Any, layout: Any, model: Any, pictures: Any
) -> None:
    model.requires_grad_(False)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    scores = script.validate(model, layout, pictures, 20)
    assert set(scores) == set(scenes.TYPES)
    assert set(scores.values()) == {0.0}  # every logit is the same, and token 0 ends no answer


# --- merging ------------------------------------------------------------------------------------


def test_merged_weights_answer_as_lora_does(
    script: Any, layout: Any, model: Any, language_model: Path
) -> None:
    ids = torch.tensor([layout.ids("<|im_start|>user\nwhere is the 7?<|im_end|>\n")])
    expected = model.model.language_model(ids).last_hidden_state.detach()
    lora = {
        script.trained_name(name): tensor * (script.SCALE if "lora_B" in name else 1)
        for name, tensor in model.state_dict().items()
        if "lora_" in name
    }
    assert len(lora) == 14 * LAYERS
    base = load_file(language_model / "model.safetensors")
    state = {f"language_model.{name}": tensor.float() for name, tensor in base.items()}
    smollm2.add_lora(state, lora)

    plain = script.LlamaForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    before = plain.model(ids).last_hidden_state.detach()
    plain.load_state_dict(
        {n.removeprefix("language_model."): t for n, t in state.items()}, strict=False
    )
    found = plain.model(ids).last_hidden_state.detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((before - expected).abs().max()) > 0.01


def test_a_change_without_its_matrix_is_refused() -> None:
    state = {"language_model.model.layers.0.mlp.up_proj.weight": torch.zeros(4, 6)}
    name = "language_model.layers.0.mlp.up_proj"
    fitting = {f"{name}.lora_A.weight": torch.ones(2, 6), f"{name}.lora_B.weight": torch.ones(4, 2)}
    smollm2.add_lora(state, fitting)
    assert bool((state["language_model.model.layers.0.mlp.up_proj.weight"] == 2).all())
    for wrong in (
        {f"{name}.lora_A.weight": torch.ones(2, 6)},
        {**fitting, f"{name}.lora_B.weight": torch.ones(5, 2)},
        {key.replace("layers.0", "layers.1"): tensor for key, tensor in fitting.items()},
    ):
        with pytest.raises(BundledModelError, match="does not fit the language model"):
            smollm2.add_lora(state, wrong)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / smollm2.LORA_FILE)
    with pytest.raises(BundledModelError, match=smollm2.PROJECTOR_FILE):
        smollm2.bundled_smollm2_path(tmp_path, weights=tmp_path)


def train_part(rank: int, count: int, meeting: Path, work: Path, language_model: Path) -> None:
    """Train with others, as one of several processes."""
    torch.set_num_threads(1)
    with imported("train_real_lm") as script:
        tokenizer = script.build_tokenizer(language_model)
        layout = script.SubwordLayout(script.build_processor(tokenizer, scenes.IMAGE_SIZE))
        rng = np.random.default_rng(3)
        features = rng.normal(size=(12, 256, 384)).astype(np.float16)
        pictures = script.Pictures((features,), tuple(a_scene(rng) for _ in range(12)))
        torch.manual_seed(0)
        built = script.build_model(language_model, tokenizer, torch.float32)
        drawing = script.Drawing(layout, pictures, script.Pictures((), ()), seed=4)
        # One row of some steps is a pair, so that one process has no part of its kind.
        options = options_for(work, batch=3, pairs=0.3)
        processes = script.Processes(rank, count, meeting)
        script.train(built, layout, drawing, pictures, options, processes)


def test_processes_that_share_steps_learn_what_one_alone_does(
    language_model: Path, tmp_path: Path
) -> None:
    found = []
    for count in (1, 2):
        work = tmp_path / str(count)
        context = multiprocessing.get_context("spawn")
        started = [
            context.Process(
                target=train_part, args=(rank, count, tmp_path / "meeting", work, language_model)
            )
            for rank in range(count)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(timeout=300)
            assert process.exitcode == 0
        (checkpoint,) = (work / "run").iterdir()
        state = json.loads((checkpoint / "state.json").read_text("utf-8"))
        found.append((load_file(checkpoint / "trained.safetensors"), state))
    (one, alone), (two, shared) = found
    assert (shared["step"], shared["images"]) == (alone["step"], alone["images"]) == (4, 12)
    assert [row["images"] for row in shared["curve"]] == [row["images"] for row in alone["curve"]]
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
