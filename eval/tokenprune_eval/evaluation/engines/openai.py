"""The engine ``openai``: any server that speaks OpenAI's chat protocol, such as `tokenprune serve`.

How a request is pruned is asked for in the request, with `tokenprune serve --allow-request-keep`.
Before the first question the server is tried with a small picture and one answer token: whether it
takes such requests, whether each method really shortens the prompt, and, where it takes none,
whether it prunes by itself. So no answer is put down under a condition that the server did not
keep. What it was started with (positions, options of methods, the checkpoint) is its own.

Pictures and frames are sent without loss, so that the model sees what it sees in other engines.
vLLM takes a video's frames as ``data:video/jpeg;base64,FRAME,FRAME`` and opens each as any picture,
PNG too; it samples them no further. Their times go along as ``media_io_kwargs`` where the server is
open to it (`--allow-request-keep` or vLLM's `--trust-request-mm-kwargs`). Without that, vLLM takes
frames for one a second, and no more than 32 of them: other frames are refused, since models that
read times would read wrong ones.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import struct
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin

import numpy as np
import openai
from anyio.from_thread import start_blocking_portal
from PIL import Image
from pydantic import BaseModel, ValidationError

from tokenprune.errors import ConfigError, did_you_mean, reason_of
from tokenprune.media.video import Video
from tokenprune_eval.data.question import Question
from tokenprune_eval.evaluation.engines.base import Done, EngineAnswer, MediaQuestions
from tokenprune_eval.evaluation.failures import EngineLostError
from tokenprune_eval.evaluation.scoring import letters_of
from tokenprune_eval.evaluation.settings import Settings
from tokenprune_eval.results.records import UNPRUNED, Condition, Seconds
from tokenprune_hf.loading import frames_and_metadata

FRAMES = 32
"""Frames that vLLM takes of a sequence unless it is told otherwise; it drops the rest silently."""

SECONDS = 0.1
"""How far a frame may be from the time at which a server takes it to be; models read tenths."""

TOP = 20
"""First tokens whose likelihoods are asked for; servers give no more."""

_ORIENTATION = 0x0112
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error)
"""What PIL raises on damaged metadata."""

_REFUSED = (openai.BadRequestError, openai.UnprocessableEntityError)
"""What a server says of a request that it understands and does not take."""

_NOT_THE_REQUEST = (401, 403, 404, 408, 429)
"""Status codes that say something of the server or the key, whatever the request."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
"""Seconds between two tries, doubled each time; those of the library."""

_Result = TypeVar("_Result")


class ServerError(EngineLostError):
    """The server cannot be reached, or does not let us in."""


class _BrokenError(Exception):
    """An answer's stream ended too early."""


class _FailedError(Exception):
    """There is no answer, and trying again has not helped or would not.

    Attributes
    ----------
    refused
        Whether the server is well and does not take this request.
    """

    def __init__(self, message: str, refused: bool) -> None:
        super().__init__(message)
        self.refused = refused


@dataclass(frozen=True)
class _Server:
    """What was found out about a server.

    Attributes
    ----------
    open
        Whether a request may say how it is pruned.
    logprobs
        Whether it tells the likelihoods of `TOP` tokens.
    context
        Tokens of prompt and answer, where it tells.
    part
        A small picture or video that it answers questions about.
    """

    open: bool
    logprobs: bool
    context: int | None
    part: dict[str, Any]


@dataclass(frozen=True)
class _Prepared:
    """An image or video as a part of a message, and how its frames are to be read."""

    part: dict[str, Any]
    frames: dict[str, Any] | None = None


class _Model(BaseModel):
    """A model that a server lists."""

    id: str
    max_model_len: int | None = None


class _Models(BaseModel):
    """What a server lists."""

    data: list[_Model]


class OpenAIEngine:
    """A server; see `tokenprune_eval.evaluation.engines.base.Engine`.

    Encoded videos lie in memory until they are answered, `Settings.concurrency` of them: where that
    is too much, `max_side` makes them smaller.

    Parameters
    ----------
    settings
        Of the run.

    Raises
    ------
    ConfigError
        If the settings ask for what requests cannot say or the server does not offer.
    ServerError
        If it cannot be reached, or does not let us in.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        _check_settings(settings)
        self.media_at_once = {
            "image": max(16, 2 * settings.concurrency),
            "video": settings.concurrency,
        }
        with ExitStack() as stack:
            # The loop lives in a thread of its own: the caller's may have one already.
            self._portal = stack.enter_context(start_blocking_portal())
            self._client = _client(settings)
            stack.callback(self._portal.call, self._client.close)
            self._server = self._wait_for(_look_at, self._client, settings)
            self._stack = stack.pop_all()

    def about(self) -> dict[str, Any]:
        """Return what run.json says of it."""
        return {
            "server": self.settings.base_url,
            "max_model_len": self._server.context,
            "pruned_by_request": self._server.open,
        }

    def prepare(self, asked: MediaQuestions) -> None:
        """Encode the picture or the frames."""
        content = asked.content
        if isinstance(content, Video):
            if not self._server.open:
                _check_untold(content)
            asked.prepared = _Prepared(_video_part(content), _how_sampled(content))
        elif isinstance(content, Image.Image):
            asked.prepared = _Prepared(_image_part(_image_url(asked.questions[0].path, content)))
        else:
            raise TypeError(f"neither image nor video: {content!r}")

    def begin(self, media: Sequence[MediaQuestions]) -> None:
        """Do nothing: the server encodes as it answers."""

    def answer(
        self,
        media: Sequence[MediaQuestions],
        wanted: Sequence[Question],
        condition: Condition,
        done: Done,
    ) -> None:
        """Ask, `Settings.concurrency` questions at a time."""
        ids = {question.id for question in wanted}
        questions = [
            (question, self._request(question, prompt, one.prepared, condition))
            for one in media
            for question, prompt in zip(one.questions, one.prompts, strict=True)
            if question.id in ids
        ]
        self._wait_for(self._answer, questions, done)

    def peak_bytes(
        self, media: Sequence[MediaQuestions], question: Question, condition: Condition
    ) -> int | None:
        """Return None: the memory is the server's."""
        return None

    def close(self) -> None:
        """Close the connections and stop the thread."""
        self._stack.close()

    def _wait_for(self, function: Callable[..., Awaitable[_Result]], *arguments: Any) -> _Result:
        future = self._portal.start_task_soon(function, *arguments)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _request(
        self, question: Question, prompt: str, prepared: _Prepared, condition: Condition
    ) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if self._server.open:
            more["mm_processor_kwargs"] = _pruned(condition.method, condition.keep)
            if prepared.frames is not None:
                more["media_io_kwargs"] = {"video": prepared.frames}
        return _request(
            self.settings,
            prepared.part,
            prompt,
            self.settings.max_new_tokens,
            more,
            logprobs=bool(question.choices) and self._server.logprobs,
        )

    async def _answer(
        self, questions: Sequence[tuple[Question, dict[str, Any]]], done: Done
    ) -> None:
        free = asyncio.Semaphore(self.settings.concurrency)

        async def ask(question: Question, request: dict[str, Any]) -> None:
            async with free:
                try:
                    said = await self._ask(request, letters_of(question))
                except _FailedError as error:
                    if not error.refused:
                        await self._check_alive()
                    said = EngineAnswer(error=str(error))
            done(question, said)

        try:
            async with asyncio.TaskGroup() as group:
                for question, request in questions:
                    group.create_task(ask(question, request))
        except ExceptionGroup as errors:
            # Whatever `done` raised; the other questions are cancelled by then.
            raise errors.exceptions[0] from None

    async def _check_alive(self) -> None:
        """Raise unless the server still answers the small question it answered at the start.

        A failure may be about one question. Where the server is gone every further question would
        fail, and be recorded as if it were the reason.

        Raises
        ------
        ServerError
            If it does not.
        """
        try:
            await _tokens(self._client, self.settings, self._server.part, None)
        except openai.APIError as error:
            raise _unreachable(error, self.settings) from None

    async def _ask(self, request: dict[str, Any], letters: str) -> EngineAnswer:
        """Return the answer to one request.

        The library tries again until an answer begins; streams that break off it leaves to us.

        Raises
        ------
        _FailedError
            If there is none.
        """
        retries, timeout = self.settings.retries, self.settings.timeout
        tries = 0
        while True:
            client = self._client.with_options(max_retries=retries - tries)
            started = time.perf_counter()
            try:
                stream: Any = await client.chat.completions.create(
                    **request, stream=True, stream_options={"include_usage": True}
                )
            except openai.APIError as error:
                raise _failed(error, tries + _sent(error), timeout) from None
            sent = _sent(stream.response)
            tries += sent
            try:
                # The library's time limit is for each piece that arrives.
                async with asyncio.timeout(timeout), stream:
                    return await _read(stream, letters, started if sent == 1 else None)
            except (openai.APIError, TimeoutError, _BrokenError, ValueError) as error:
                if tries > retries or not _passing(error):
                    raise _failed(error, tries, timeout) from None
            await asyncio.sleep(min(_FIRST_PAUSE * 2 ** (tries - 1), _LONGEST_PAUSE))


def check_server(settings: Settings) -> None:
    """Raise unless the server answers, knows the model and takes the methods.

    Sends one question about a small picture for each of them, with an answer of one token.

    Parameters
    ----------
    settings
        Of a run with this engine.

    Raises
    ------
    ConfigError, ServerError
        As `OpenAIEngine`.
    """
    _check_settings(settings)

    async def look() -> None:
        async with _client(settings) as client:
            await _look_at(client, settings)

    with start_blocking_portal() as portal:
        portal.call(look)


# Settings and server ----------------------------------------------------------------------------


def _check_settings(settings: Settings) -> None:
    asked = {
        "options": settings.options,
        f"positions={settings.positions!r}": settings.positions != "original",
        f"scope={settings.scope!r}": settings.scope != "item",
    }
    given = next((name for name, is_given in asked.items() if is_given), None)
    if given is not None:
        raise ConfigError(
            f"{given} cannot be asked for in a request: a server has them from its start. Leave "
            "them out here, and give them to `tokenprune serve`."
        )


def _client(settings: Settings) -> openai.AsyncOpenAI:
    key = os.environ.get(settings.api_key)
    if key is None and settings.api_key != Settings.model_fields["api_key"].default:
        raise ConfigError(
            f"the environment variable {settings.api_key} is not set, and --api-key says that the "
            "key is in it. Set it, or leave --api-key out for a server without keys."
        )
    return openai.AsyncOpenAI(
        base_url=settings.base_url,
        # The library insists on one.
        api_key=key or "none",
        timeout=settings.timeout,
        max_retries=settings.retries,
    )


async def _look_at(client: openai.AsyncOpenAI, settings: Settings) -> _Server:
    """Find out what a server takes.

    Raises
    ------
    ConfigError, ServerError
        If it is not what the settings need.
    """
    try:
        context = await _context(client, settings)
        part, logprobs = await _readable(client, settings)
        try:
            whole = await _tokens(client, settings, part, _pruned(UNPRUNED, 1.0))
        except _REFUSED as error:
            await _check_closed(client, settings, _message(error))
            return _Server(open=False, logprobs=logprobs, context=context, part=part)
        for condition in settings.conditions():
            if condition.method != UNPRUNED:
                await _check_method(client, settings, part, condition.method, whole)
    except openai.APIError as error:
        raise _unreachable(error, settings) from None
    return _Server(open=True, logprobs=logprobs, context=context, part=part)


async def _context(client: openai.AsyncOpenAI, settings: Settings) -> int | None:
    """Return how many tokens the served model takes, if the server tells."""
    page: str = await client.get("/models", cast_to=str)
    try:
        served = {one.id: one.max_model_len for one in _Models.model_validate_json(page).data}
    except ValidationError:
        raise _elsewhere(settings, "its /models lists none") from None
    if settings.model not in served:
        raise ConfigError(
            f"the server at {settings.base_url} serves no model called {settings.model!r}. "
            f"{did_you_mean(settings.model, served)}"
        )
    return served[settings.model]


async def _readable(client: openai.AsyncOpenAI, settings: Settings) -> tuple[dict[str, Any], bool]:
    """Return a picture, or else a video, that the server reads, and whether it tells likelihoods.

    Raises
    ------
    ConfigError
        If it reads neither.
    """
    picture = _image_part(_png_url(_test_picture()))
    frames = ",".join(_png(_test_picture()) for _ in range(2))
    reason = ""
    for part in (picture, _sequence_part(frames)):
        for logprobs in (True, False):
            try:
                await _tokens(client, settings, part, None, logprobs)
            except _REFUSED as error:
                # The picture's is the one to show.
                reason = reason or _message(error)
            else:
                return part, logprobs
    raise ConfigError(
        f"{settings.model} at {settings.base_url} answers no question about a picture: {reason}. "
        "Serve a model that reads images or videos."
    )


async def _check_closed(client: openai.AsyncOpenAI, settings: Settings, reason: str) -> None:
    """Raise if a server that lets no request say how it is pruned is no use for these settings."""
    start = (
        "Start it with `tokenprune serve MODEL --method ... --keep ... --allow-request-keep "
        f"--request-method {' '.join(settings.method) or '...'}`"
    )
    if any(one.method != UNPRUNED for one in settings.conditions()):
        raise ConfigError(
            f"the server at {settings.base_url} lets no request say how it is pruned ({reason}). "
            f"{start}, or leave out --method to evaluate the model as it is served."
        )
    if await _prunes_by_itself(client, settings):
        raise ConfigError(
            f"the server at {settings.base_url} prunes, and lets no request ask for the unpruned "
            f"model ({reason}). {start}, or serve the model with `vllm serve`."
        )


async def _prunes_by_itself(client: openai.AsyncOpenAI, settings: Settings) -> bool:
    """Say whether the server counts pruned tokens; it has been asked about a picture before."""
    address = urljoin(f"{(settings.base_url or '').rstrip('/')}/", "../metrics")
    try:
        page: str = await client.get(address, cast_to=str)
    except openai.APIError:
        # No server of vLLM's, or one behind a gate; only the former can be told apart from this.
        return False
    return "tokenprune_" in page


async def _check_method(
    client: openai.AsyncOpenAI, settings: Settings, part: dict[str, Any], method: str, whole: int
) -> None:
    """Raise unless a method shortens the prompt of `whole` tokens."""
    try:
        read = await _tokens(client, settings, part, _pruned(method, 0.5))
    except _REFUSED as error:
        raise ConfigError(
            f"the server at {settings.base_url} does not prune by {method}: {_message(error)}. "
            f"Start it with --request-method {' '.join(settings.method)}."
        ) from None
    if read >= whole:
        raise ConfigError(
            f"the server at {settings.base_url} takes the request to keep half of a picture's "
            f"tokens by {method}, and reads {read} tokens as before ({whole}): it does not prune. "
            "Serve the model with `tokenprune serve MODEL ... --allow-request-keep`."
        )


async def _tokens(
    client: openai.AsyncOpenAI,
    settings: Settings,
    part: dict[str, Any],
    pruned: dict[str, Any] | None,
    logprobs: bool = False,
) -> int:
    """Return how many prompt tokens a small question has, 0 where the server does not count."""
    more = {} if pruned is None else {"mm_processor_kwargs": pruned}
    request = _request(settings, part, "what is this?", 1, more, logprobs=logprobs)
    completion: Any = await client.chat.completions.create(**request)
    usage = getattr(completion, "usage", None)
    return int(usage.prompt_tokens) if usage is not None else 0


# Requests ---------------------------------------------------------------------------------------


def _request(
    settings: Settings,
    part: dict[str, Any],
    text: str,
    tokens: int,
    more: dict[str, Any],
    *,
    logprobs: bool,
) -> dict[str, Any]:
    """Return the arguments of a greedy chat completion."""
    request: dict[str, Any] = {
        "model": settings.model,
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": text}]}],
        "temperature": 0,
        "max_tokens": tokens,
        "extra_body": more,
    }
    if logprobs:
        request.update(logprobs=True, top_logprobs=TOP)
    return request


def _pruned(method: str, keep: int | float) -> dict[str, Any]:
    asked = {"off": True} if method == UNPRUNED else {"method": method, "keep": keep}
    return {"tokenprune": asked}


def _image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _sequence_part(frames: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}}


def _video_part(video: Video) -> dict[str, Any]:
    return _sequence_part(",".join(_png(Image.fromarray(frame)) for frame in video.frames))


def _check_untold(video: Video) -> None:
    """Raise if a server that is not told how frames were sampled would take them for others.

    Raises
    ------
    ConfigError
        If there are more frames than it reads, or not one a second.
    """
    start = (
        "start the server with --allow-request-keep (`tokenprune serve`) or "
        "--trust-request-mm-kwargs (`vllm serve`)"
    )
    count = len(video.frames)
    if count > FRAMES:
        raise ConfigError(
            f"{video.path}: these are {count} frames, of which this server may read the first "
            f"{FRAMES} without saying so. Give --frames {FRAMES} or less, or {start}."
        )
    off = np.abs(video.times - np.arange(count))
    if off.max() > SECONDS:
        frame = int((off > SECONDS).argmax())
        raise ConfigError(
            f"{video.path}: this server cannot be told the times of frames and takes them for one "
            f"a second, and frame {frame} is at {video.times[frame]:.2f} s. Give --fps 1, or "
            f"{start}."
        )


def _how_sampled(video: Video) -> dict[str, Any]:
    """Return what the server has to know so that it lays the frames out as other engines do."""
    _, metadata = frames_and_metadata(video)
    return {
        "num_frames": -1,
        "fps": float(metadata["fps"]),
        "duration": float(metadata["duration"]),
        "total_num_frames": int(metadata["total_num_frames"]),
        "frames_indices": [int(index) for index in metadata["frames_indices"]],
    }


def _image_url(path: Path, picture: Image.Image) -> str:
    """Return a loaded picture as a data URL: its file where that reads the same everywhere."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            plain = (
                image.mode in ("RGB", "L")
                and "transparency" not in image.info
                and image.size == picture.size
                and image.getexif().get(_ORIENTATION, 1) == 1
            )
            kind = "png" if image.format == "PNG" else "jpeg"
        if plain:
            return f"data:image/{kind};base64,{_base64(path.read_bytes())}"
    except _DAMAGED:
        pass
    return _png_url(picture)


def _png_url(picture: Image.Image) -> str:
    return f"data:image/png;base64,{_png(picture)}"


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    # The highest levels take ten times as long for a few percent.
    picture.save(buffer, format="PNG", compress_level=1)
    return _base64(buffer.getvalue())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _test_picture() -> Image.Image:
    """Return a picture of which every model makes more than a few tokens."""
    ramp = np.arange(224, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(128)), axis=-1)
    return Image.fromarray(pixels)


# Answers ----------------------------------------------------------------------------------------


async def _read(stream: Any, letters: str, started: float | None) -> EngineAnswer:
    """Return what a stream of chunks comes to.

    Parameters
    ----------
    stream
        Chunks of one chat completion.
    letters
        Of the question's choices.
    started
        When the request was sent, by `time.perf_counter`; None where that is not known because it
        was sent again in between.

    Raises
    ------
    _BrokenError
        If it ends before the answer does.
    """
    texts: list[str] = []
    likelihoods: dict[str, float] | None = None
    first = usage = finish = None
    begun = False
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices or ():
            finish = choice.finish_reason or finish
            text = choice.delta.content or ""
            if first is None and (text or finish):
                first = time.perf_counter()
            texts.append(text)
            if not begun and choice.logprobs is not None and choice.logprobs.content:
                begun = True
                likelihoods = _likelihoods(choice.logprobs.content[0].top_logprobs, letters)
    if finish is None or finish in ("abort", "error"):
        raise _BrokenError("the answer broke off" + (f" ({finish})" if finish else ""))
    seconds = Seconds()
    if started is not None and first is not None:
        end = time.perf_counter()
        seconds = Seconds(decode=end - first, first_token=first - started, total=end - started)
    return EngineAnswer(
        text="".join(texts).strip(),
        cut=finish == "length",
        likelihoods=likelihoods,
        prompt_tokens=usage.prompt_tokens if usage else None,
        answer_tokens=usage.completion_tokens if usage else None,
        seconds=seconds,
    )


def _likelihoods(top: Sequence[Any], letters: str) -> dict[str, float] | None:
    """Return letter -> log-probability; None unless all are among the first tokens told."""
    if not letters:
        return None
    found: dict[str, float] = {}
    for letter in letters:
        # With and without a space in front, which some tokenizers write as another character.
        ways = {letter, f" {letter}", f"▁{letter}", f"Ġ{letter}"}
        values = [one.logprob for one in top if one.token in ways]
        if not values:
            return None
        found[letter] = float(np.logaddexp.reduce(values))
    return found


# Errors -----------------------------------------------------------------------------------------


def _sent(source: Any) -> int:
    """Return how often the library sent the request behind a response or an error."""
    return int(source.request.headers.get("x-stainless-retry-count", 0)) + 1


def _passing(error: Exception) -> bool:
    """Say whether what ended a stream may be gone the next time."""
    told = isinstance(error, openai.APIError) and not isinstance(error, openai.APIConnectionError)
    return not (told and str(getattr(error, "code", "")).startswith("4"))


def _failed(error: Exception, tries: int, timeout: float) -> _FailedError:
    often = "once" if tries == 1 else f"{tries} times"
    refused = not _passing(error)
    if isinstance(error, openai.APIStatusError):
        refused = 400 <= error.status_code < 500 and error.status_code not in _NOT_THE_REQUEST
    return _FailedError(f"{_reason(error, timeout)}. Tried {often}.", refused)


def _reason(error: Exception, timeout: float) -> str:
    """Return what happened, without a full stop."""
    if isinstance(error, openai.APITimeoutError | TimeoutError):
        return f"the server gave no answer within {timeout:g} s"
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        said = str(cause).strip() or type(cause).__name__
        return f"the connection to the server failed: {said.rstrip('.')}"
    if isinstance(error, openai.APIStatusError):
        return _message(error)
    if isinstance(error, openai.APIError):
        return f"the server broke the answer off: {error.message.strip().rstrip('.')}"
    if isinstance(error, ValueError):
        return f"the server sent what is no JSON ({reason_of(error)})"
    return str(error)


def _message(error: openai.APIStatusError) -> str:
    """Return an error's status and what the server says, without a full stop."""
    body: object = error.body
    said = body.get("message") or body.get("detail") if isinstance(body, Mapping) else body
    text = " ".join(str(said or error.response.reason_phrase).split())
    return f"HTTP {error.status_code}: {text[:1000].rstrip('.')}"


def _unreachable(error: openai.APIError, settings: Settings) -> ServerError:
    """Return why a server cannot be asked at all."""
    where = settings.base_url
    if not isinstance(error, openai.APIStatusError):
        return ServerError(
            f"the server at {where} cannot be asked: {_reason(error, settings.timeout)}. See that "
            "it runs and that --base-url is its address, such as http://127.0.0.1:8000/v1."
        )
    said = _message(error)
    if error.status_code in (401, 403):
        known = "is another" if settings.api_key in os.environ else "is not set"
        return ServerError(
            f"the server at {where} wants a key ({said}). It is looked for in the environment "
            f"variable {settings.api_key}, which {known}; --api-key names another variable."
        )
    if error.status_code == 404:
        return _elsewhere(settings, said)
    return ServerError(
        f"the server at {where} does not answer ({said}). Its log has the reason; run the same "
        "command again when it does."
    )


def _elsewhere(settings: Settings, reason: str) -> ServerError:
    return ServerError(
        f"there is no OpenAI server at {settings.base_url} ({reason}). Its address usually ends in "
        "/v1: correct --base-url."
    )
