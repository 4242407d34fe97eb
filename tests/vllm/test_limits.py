"""What is refused, before or when vLLM starts, and what is not there without being asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from safetensors.torch import load_file, save_file

import tokenprune_vllm
from tests.vllm import checkpoints
from tests.vllm.engines import answer, engine, greedy, kept
from tokenprune import releases
from tokenprune.arguments import Parser
from tokenprune.config import PruningConfig
from tokenprune.errors import (
    ConfigError,
    InputFileError,
    OptionError,
    UnknownMethodError,
    UnsupportedModelError,
    UntestedReleaseWarning,
)
from tokenprune_eval.bundled.model import bundled_model_path
from tokenprune_vllm import plugin, serve
from tokenprune_vllm.export import export
from tokenprune_vllm.hooks import check_overridden
from tokenprune_vllm.refusals import check_engine, room_for_positions
from tokenprune_vllm.settings import RequestError, ServerSettings


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("llava", tmp_path_factory.mktemp("limits") / "llava")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keep": 1.0}, ConfigError, "would prune nothing"),
        ({"method": "cls-atention"}, UnknownMethodError, "Did you mean 'cls-attention'"),
        ({"options": {"depth": 3}}, OptionError, "depth"),
        ({"request_methods": ["nothing"]}, UnknownMethodError, "nothing"),
        ({"hf_overrides": print}, ConfigError, "must be a dict"),
        ({"model_impl": "transformers"}, ConfigError, "would run unpruned"),
        ({"model": "/nowhere"}, InputFileError, "config.json"),
    ],
)
def test_engine_args_refuse(
    changes: dict[str, Any], error: type[Exception], message: str, llava: Path
) -> None:
    arguments: dict[str, Any] = {"model": llava, "method": "cls-attention", "keep": 4, **changes}
    with pytest.raises(error, match=message):
        tokenprune_vllm.engine_args(**arguments)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "names no architecture"),
        ({"architectures": ["Nobody"]}, "installed vLLM does not know"),
        (
            {"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama"},
            "installed vLLM does not know",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "reads no images or videos"),
        (
            {"architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True},
            "has an encoder for its text",
        ),
    ],
)
def test_models_that_cannot_be_pruned_are_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=message):
        tokenprune_vllm.engine_args(tmp_path, "uniform", 4)


def test_attention_is_not_looked_for_in_towers_that_end_in_convolutions(tmp_path: Path) -> None:
    config = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="ends in convolutions"):
        tokenprune_vllm.engine_args(tmp_path, "uniform", 4, request_methods=["cls-attention"])
    assert tokenprune_vllm.engine_args(tmp_path, "uniform", 4)


def test_an_encoder_of_text_is_refused(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    name = "NemotronParseForConditionalGeneration"
    config = {"architectures": [name], "is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="has an encoder for its text"):
        tokenprune_vllm.engine_args(tmp_path, "uniform", 4)
    why = "it has an encoder for its text, where visual tokens cannot be dropped"
    for key, value in {"vllm": name, "release": vllm.__version__, "refused": why}.items():
        record_property(key, value)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"sliding": {"rope_type": "default"}, "full": {"rope_type": "longrope"}},
    ],
)
def test_rotary_embeddings_that_depend_on_the_length_are_refused(rope: dict[str, Any]) -> None:
    text = SimpleNamespace(rope_parameters=rope, max_position_embeddings=64)
    config = SimpleNamespace(get_text_config=lambda: text)
    original = ServerSettings.build(PruningConfig("uniform", 4))
    with (
        pytest.raises(UnsupportedModelError, match="depend on the length of the prompt"),
        room_for_positions(config, original),
    ):
        pass
    compact = ServerSettings.build(PruningConfig("uniform", 4, "compact"))
    with room_for_positions(config, compact):
        assert text.max_position_embeddings == 64


def test_a_vllm_told_not_to_load_the_plugin(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    with pytest.raises(ConfigError, match="VLLM_PLUGINS='another'"):
        tokenprune_vllm.engine_args(llava, "cls-attention", 4)


def test_an_untested_vllm_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(releases._WARNED, "")
    monkeypatch.setattr(vllm, "__version__", "99.0.0")
    with pytest.warns(UntestedReleaseWarning, match=r"vllm 99\.0\.0 .* 0\.32 to 0\.33"):
        plugin.register()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntestedReleaseWarning)
        plugin.register()


def test_own_overrides_are_kept(llava: Path) -> None:
    overrides = {"text_config": {"max_position_embeddings": 64}, "torch_dtype": "float32"}
    merged = tokenprune_vllm.engine_args(llava, "uniform", 4, hf_overrides=overrides)
    assert merged["hf_overrides"].items() >= overrides.items()
    assert merged["hf_overrides"]["tokenprune"]["method"] == "uniform"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"video_pruning_rate": 0.5}, "video-pruning-rate"),
        ({"compilation_config": {"compile_mm_encoder": True}}, "compile_mm_encoder"),
        ({"mm_processor_kwargs": {"use_audio_in_video": True}}, "use_audio_in_video"),
        ({"ubatch_size": 2, "all2all_backend": "deepep_low_latency"}, "ubatch-size"),
    ],
)
def test_settings_of_vllm_that_do_not_go_together(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from vllm import EngineArgs

    folder = checkpoints.save("qwen2_5_vl", tmp_path / "model")
    arguments = tokenprune_vllm.engine_args(folder, "uniform", 4, dtype="float32", **options)
    config = EngineArgs(**arguments).create_engine_config()
    settings = ServerSettings.build(PruningConfig("uniform", 4))
    with pytest.raises(UnsupportedModelError, match=message):
        check_engine(config, settings)


def test_a_method_that_vllm_no_longer_has_is_noticed() -> None:
    class Engine:
        def there(self) -> None: ...

    class Mixin:
        def there(self) -> None: ...

        def gone(self) -> None: ...

    class Made(Mixin, Engine): ...

    check_overridden(Made, Mixin, ("there",))
    with pytest.raises(UnsupportedModelError, match="has no gone for Made"):
        check_overridden(Made, Mixin, ("there", "gone"))


def test_what_a_request_may_ask_for() -> None:
    default = PruningConfig("zeroth-order", 8, options={"seed": 3})
    settings = ServerSettings.build(default, {"uniform": {}})
    assert settings.request({}).config == default
    asked = settings.request({"tokenprune": {"method": "uniform", "keep": 0.5}}).config
    assert asked == PruningConfig("uniform", 0.5)
    assert not settings.request({"tokenprune": {"off": True}}).prunes
    assert not settings.request({"tokenprune": {"keep": 1.0}}).prunes
    assert settings.request({"tokenprune": {"keep": 1}}).prunes
    marks = [
        settings.request({"tokenprune": asked}).fingerprint()
        for asked in ({}, {"keep": 9}, {"method": "uniform"}, {"off": True})
    ]
    assert len(set(marks)) == len(marks)
    explicit = settings.request({"tokenprune": {"keep": 8, "method": "zeroth-order"}})
    assert explicit.fingerprint() == settings.request({}).fingerprint()
    with pytest.raises(RequestError, match="Did you mean 'uniform'"):
        settings.request({"tokenprune": {"method": "uniforn"}})
    assert settings.request({"use_audio_in_video": False}).prunes
    with pytest.raises(RequestError, match="send the sound as audio of its own"):
        settings.request({"use_audio_in_video": True})


def test_settings_survive_the_way_through_a_config() -> None:
    class Config:
        tokenprune: Any = None

    settings = ServerSettings.build(
        PruningConfig("divprune", 0.2, "compact"), {"uniform": {}}, True
    )
    config = Config()
    config.tokenprune = json.loads(json.dumps(settings.to_dict()))
    assert ServerSettings.from_config(config) == settings
    assert config.tokenprune.pop("format") == 1
    assert ServerSettings.from_config(config) == settings  # a checkpoint from before
    config.tokenprune["format"] = 2
    with pytest.raises(ConfigError, match=r"format 2 .*newer version"):
        ServerSettings.from_config(config)
    with pytest.raises(ConfigError, match="nothing to say how to prune"):
        ServerSettings.from_config(Config())


@pytest.mark.parametrize("method", ["fastv", "pyramid-drop", "sparsevlm"])
def test_methods_inside_the_language_model_are_refused(
    llava: Path, tmp_path: Path, method: str
) -> None:
    reason = f"method '{method}' cannot be used with vLLM: .* one length for all layers"
    with pytest.raises(UnsupportedModelError, match=reason):
        tokenprune_vllm.engine_args(llava, method, 4)
    with pytest.raises(UnsupportedModelError, match=reason):
        tokenprune_vllm.engine_args(llava, "uniform", 4, request_methods=[method])
    with pytest.raises(UnsupportedModelError, match=reason):
        serve_command(str(llava), f"--method={method}", "--keep=4")
    with pytest.raises(UnsupportedModelError, match=reason):
        export(llava, tmp_path / "out", PruningConfig(method, 4))
    assert not (tmp_path / "out").exists()


def test_export_refuses_and_leaves_nothing(llava: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    pruning = PruningConfig("cls-attention", 4)
    with pytest.raises(InputFileError, match="is there already"):
        export(llava, full, pruning)
    assert (full / "notes.txt").read_text() == "mine"
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((llava / "config.json").read_bytes())
    (bare / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputFileError, match=r"no \*\.safetensors"):
        export(bare, tmp_path / "out", pruning)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "full"]


def test_export_links_weights_and_leaves_the_source_alone(llava: Path, tmp_path: Path) -> None:
    before = (llava / "config.json").read_bytes()
    (llava / "old.bin").write_bytes(b"pickle")
    out = export(llava, tmp_path / "out", PruningConfig("cls-attention", 4))
    assert os.path.samefile(llava / "model.safetensors", out / "model.safetensors")
    assert not (out / "old.bin").exists()
    assert (llava / "config.json").read_bytes() == before
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["TokenPruneLlavaForConditionalGeneration"]
    assert config["tokenprune"]["keep"] == 4
    again = export(out, tmp_path / "again", PruningConfig("uniform", 2, "compact"))
    config = json.loads((again / "config.json").read_text())
    assert config["tokenprune"]["method"] == "uniform"
    assert config["mrope_section"] is None


def test_the_command_says_what_is_missing(llava: Path) -> None:
    command = [sys.executable, "-m", "tokenprune.cli", "serve", str(llava)]
    for more, message in (
        (["--keep=4"], "--method is missing"),
        (["--method=uniform", "--keep=4", "--request-method=random"], "--allow-request-keep"),
        (["--method=uniform", "--keep=lots"], "is no number"),
        (["--method=uniform", "--keep=4", "--model-impl=transformers"], "would run unpruned"),
        (["--method=uniform", "--keep=4", "--hf-overrides={"], "is not JSON"),
        (["--method=uniform", "--keep=4", "--hf_overrides.architectures", "x"], "one JSON object"),
        (["--method=uniform", "--keep=4", "--hf-over.architectures=x"], "one JSON object"),
    ):
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def serve_command(*words: str) -> list[str]:
    """Return the command line of vLLM's server for one of `tokenprune serve`."""
    parser = Parser()
    parser.takes_more = True
    serve.configure(parser)
    arguments, more = parser.parse_known_args(words)
    arguments.more = more
    return serve.server_command(arguments)


def test_serve_asks_before_it_runs_code_of_a_checkpoint(tmp_path: Path) -> None:
    config = {"architectures": ["InternVLChatModel"], "model_type": "internvl_chat"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = (str(tmp_path), "--method=uniform", "--keep=4")
    serve_command(*words)
    auto_map = {"AutoConfig": "configuration.RemoteConfig"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    with pytest.raises(ConfigError, match="add --trust-remote-code"):
        serve_command(*words)
    assert "--trust_remote_code" in serve_command(*words, "--trust_remote_code")
    known = {**config, "auto_map": auto_map, "model_type": "qwen2_vl"}
    (tmp_path / "config.json").write_text(json.dumps(known))
    serve_command(*words)


def settings_in(command: list[str]) -> dict[str, Any]:
    """Return what a command line of vLLM's server says of pruning."""
    made = json.loads(command[command.index("--hf-overrides") + 1])["tokenprune"]
    return dict(made)


def test_serve_and_engine_args_and_export_take_the_bundled_model(tmp_path: Path) -> None:
    folder = str(bundled_model_path())
    command = serve_command("bundled", "--method=random", "--keep=4", "--port", "80")
    assert folder in command
    assert command[command.index("--served-model-name") + 1] == "bundled"
    assert settings_in(command)["keep"] == 4
    named = serve_command(
        "--model=bundled", "--method=random", "--keep=4", "--served_model_name=mine"
    )
    assert folder in named
    assert "--served-model-name" not in named
    assert tokenprune_vllm.engine_args("bundled", "random", 4)["model"] == folder
    out = export("bundled", tmp_path / "out", PruningConfig("random", 4))
    config = json.loads((out / "config.json").read_text())
    assert config["tokenprune"]["keep"] == 4
    assert (out / "model.safetensors").is_file()


def test_where_tokens_are_taken_and_the_scope_reach_the_server(tmp_path: Path) -> None:
    config = {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = (str(tmp_path), "--method=divprune", "--keep=4", "--option", "divprune.taken=before")
    made = settings_in(serve_command(*words, "--scope=image"))
    assert (made["options"], made["scope"]) == ({"taken": "before"}, "image")
    assert "scope" not in settings_in(serve_command(*words))
    refused = (str(tmp_path), "--method=evs", "--keep=4", "--scope=image")
    with pytest.raises(ConfigError, match=r"scope='image' does not go with method 'evs'"):
        serve_command(*refused)
    with pytest.raises(OptionError, match="Did you mean 'before'"):
        serve_command(*words[:-1], "taken=befor")


def test_options_of_the_methods_that_requests_may_name(llava: Path, tmp_path: Path) -> None:
    requests = ("--allow-request-keep", "--request-methods", "flexselect", "random", "--keep=4")

    def methods(*words: str) -> tuple[dict[str, Any], dict[str, Any]]:
        made = settings_in(serve_command(str(llava), *words))
        return made["options"], made["request_methods"]

    options = ("--option", "flexselect.layer=3", "--option", "seed=5")
    assert methods("--method=zeroth-order", *requests, *options) == (
        {"seed": 5},
        {"flexselect": {"layer": 3}, "random": {"seed": 5}},
    )
    file = tmp_path / "pruning.json"
    file.write_text(PruningConfig("zeroth-order", 7, options={"seed": 1}).to_json(), "utf-8")
    of_file = ("--pruning", str(file), *requests[:-1])
    assert methods(*of_file, *options) == (
        {"seed": 1},
        {"flexselect": {"layer": 3}, "random": {"seed": 5}},
    )
    with pytest.raises(ConfigError, match="zeroth-order prunes is written down with its options"):
        methods(*of_file, "--option", "zeroth-order.seed=2")
    out = str(
        export(llava, tmp_path / "out", PruningConfig("uniform", 4), request_methods=["random"])
    )
    made = settings_in(serve_command(out, *requests[:-1], "--option", "seed=9"))
    assert made["request_methods"] == {"random": {"seed": 9}, "flexselect": {}}


def test_serve_goes_by_an_exported_config_unless_told_otherwise(
    llava: Path, tmp_path: Path
) -> None:
    pruning = PruningConfig("divprune", 0.25, "compact")
    out = str(export(llava, tmp_path / "out", pruning, request_methods=["uniform"]))

    def overrides(*arguments: str) -> dict[str, Any]:
        command = serve_command(out, *arguments)
        made: dict[str, Any] = json.loads(command[command.index("--hf-overrides") + 1])
        assert command[-4:-2] == ["--port", "80"]
        return made

    as_exported = overrides("--port", "80")
    assert as_exported["tokenprune"]["method"] == "divprune"
    assert as_exported["tokenprune"]["positions"] == "compact"
    assert "uniform" in as_exported["tokenprune"]["request_methods"]
    file = tmp_path / "pruning.json"
    file.write_text(PruningConfig("uniform", 7, options={}).to_json(), "utf-8")
    of_file = overrides("--pruning", str(file), "--port", "80")["tokenprune"]
    assert (of_file["method"], of_file["keep"], of_file["positions"]) == ("uniform", 7, "original")
    with pytest.raises(ConfigError, match="Give one or the other"):
        overrides("--pruning", str(file), "--keep=4", "--port", "80")
    with pytest.raises(InputFileError, match="cannot be read"):
        overrides("--pruning", str(tmp_path / "none.json"), "--port", "80")
    told = overrides("--method=uniform", "--keep=4", '--hf-overrides={"x": 1}', "--port", "80")
    assert told["tokenprune"]["keep"] == 4
    assert told["mrope_section"] == [1, 1, 1]
    assert told["x"] == 1


def test_an_image_that_overflows_does_not_end_the_engine(tmp_path: Path) -> None:
    folder = checkpoints.save("llava", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("layers.0.mlp.fc1.bias")]
    weights[name].fill_(float("inf"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    text = checkpoints.vllm_request("llava", "t")
    image = checkpoints.vllm_request("llava", "it", [checkpoints.image(0)])
    with engine(folder, "zeroth-order", 5, request_methods=("cls-attention", "flexselect")) as llm:
        sampling = greedy(4, words=checkpoints.WORDS)
        before = answer(llm, [text], sampling)
        for method in ("zeroth-order", "cls-attention", "flexselect"):
            asked = {"mm_processor_kwargs": {"tokenprune": {"method": method}}}
            assert len(answer(llm, [{**image, **asked}], sampling)[0]) == 4
            assert [len(segment) for segment in kept(llm)[0]] == [5]
        assert answer(llm, [text], sampling) == before
