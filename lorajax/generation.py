"""Answers to prompts, token by token over a key/value cache.

Two programs: one reads the prompts (prefill), one writes tokens until every row has met its end (decode).
Their shapes are rounded up, so that few are compiled; weights are arguments, so that training between two
calls compiles nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key
from lorajax_kernels import attention, cached_attention

from lorajax.data.chat import render_prompt
from lorajax.errors import UserError
from lorajax.memory.analysis import compile_lowered, memory_of
from lorajax.models.decoder import Attend, Decoder
from lorajax.sharding import data_mesh, replicated, shapes

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from transformers import PreTrainedTokenizerFast

Prompt = str | Sequence[Mapping[str, Any]]

_SMALLEST_BUCKET = 64
NO_TOKEN = -1
UNFINISHED_CHARACTER = "\ufffd"


class Answering(NamedTuple):
    """Prompts that are answered at a time, tokens of the longest, and most tokens of an answer."""

    rows: int
    prompt: int
    new: int


def generate(
    model: Decoder,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat_template: str | None = None,
    batch_size: int = 8,
) -> list[str]:
    """The model's answer to each prompt, without special tokens.

    An answer ends at a token that the model or the tokenizer names as EOS, or after max_new_tokens. It
    depends on its own prompt and, for temperatures above 0, on the seed and the prompt's place in the list;
    not on the other prompts. Adapters are applied, without dropout.

    Args:
        model: with or without an adapter; its weights may have changed since the last call.
        tokenizer: the model's.
        prompts: the user's questions, or lists of messages ({"role": ..., "content": ...}).
        max_new_tokens: most tokens of one answer. Under dynamic RoPE scaling all tokens of a row have the
            frequencies of a text as long as its prompt and max_new_tokens together.
        temperature: logits are divided by it before drawing; 0 takes the most likely token.
        top_p: draws from the fewest tokens whose probabilities reach this sum (nucleus sampling, Holtzman et
            al., 2019, arXiv:1904.09751).
        seed: of the draws.
        chat_template: a Jinja template as text; None: the tokenizer's own, or a default.
        batch_size: most prompts answered at a time. A batch holds keys and values, in the model's dtype, of
            every token of its longest prompt and of max_new_tokens, for every layer.

    Raises:
        UserError: a prompt cannot be rendered, is too long for the model's context, or an option is out of
            range.
    """
    if isinstance(prompts, str | Mapping) or any(isinstance(prompt, Mapping) for prompt in prompts):
        raise UserError("prompts is a list of questions or of conversations; put [ ] around a single one")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    settings = _settings(model, tokenizer, max_new_tokens, temperature, top_p)
    rows = _tokenise(model, tokenizer, prompts, max_new_tokens, chat_template)
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    answers = [""] * len(rows)
    size = min(batch_size, power_of_two(len(rows)))
    weights = nnx.split(model)
    for start in range(0, len(rows), batch_size):
        group = by_length[start : start + batch_size]
        state = _start(weights, settings, [rows[index] for index in group], group, size, seed)
        state = _decode(*weights, state, settings.limit, settings.sampling)
        for index, written in zip(group, np.asarray(state.tokens), strict=False):
            answers[index] = _text(tokenizer, settings, written)
    return answers


def stream(
    model: Decoder,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Prompt,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat_template: str | None = None,
    chunk: int = 4,
) -> Iterator[str]:
    """The text that `generate` gives for [prompt], in pieces, as it is written.

    Args:
        chunk: tokens written between two looks at them.

    Raises:
        UserError: as `generate`, before the first piece.
    """
    settings = _settings(model, tokenizer, max_new_tokens, temperature, top_p)
    rows = _tokenise(model, tokenizer, [prompt], max_new_tokens, chat_template)
    return _pieces(model, tokenizer, settings, rows, seed, chunk)


def check_prompts(
    model: Decoder, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt], *, max_new_tokens: int
) -> None:
    """Whether `generate` takes the prompts; of the model its options alone are needed.

    Raises:
        UserError: as `generate`.
    """
    _tokenise(model, tokenizer, prompts, max_new_tokens, None)


def answering_memory(
    model: Decoder,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> int:
    """Bytes of one device that `generate` takes beside the model, by XLA's analysis of its programs.

    They are compiled for the batch of the longest prompts. The other arguments are those of `generate`.

    Raises:
        UserError: as `generate`.
    """
    settings = _settings(model, tokenizer, max_new_tokens, 0.0, 1.0)
    longest = max(map(len, _tokenise(model, tokenizer, prompts, max_new_tokens, None)))
    answering = Answering(min(batch_size, power_of_two(len(prompts))), longest, max_new_tokens)
    return compiled_answering_memory(model, answering, data_mesh(), eos_tokens=len(settings.eos_ids))


def compiled_answering_memory(model: Decoder, answering: Answering, mesh: Mesh, *, eos_tokens: int) -> int:
    """answering_memory of prompts of which only the number and length are known.

    Args:
        model: arrays may be shapes.
        mesh: whose first device is compiled for; it need not be here.
        eos_tokens: number of tokens that end an answer.
    """
    rows, prompt, new = answering
    graph, state = nnx.split(model)
    # As they will be: then it is these programs that `generate` finds in the compilation cache.
    weights = graph, shapes(state, replicated(mesh))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    lengths, tokens, ends = (
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows,), (rows, bucket(prompt)), (eos_tokens,))
    )
    sampling = _Sampling(temperature=None, top_p=None, eos_ids=cast("Array", ends))
    lowered = _prefill.lower(*weights, tokens, lengths, keys, new, sampling, bucket(new))
    prefill = compile_lowered(lowered)
    answers = jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        lowered.out_info,
        prefill.output_shardings,
    )
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(answers.caches))
    decode = compile_lowered(_decode.lower(*weights, answers, new, sampling))
    return held + max(memory_of(each).temporaries for each in (prefill, decode))


# --- prompts in, text out ---


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Sampling:
    """How tokens are chosen and where a row ends.

    temperature None: the most likely token. top_p None: draw from all tokens.
    """

    temperature: Float[Array, ""] | None
    top_p: Float[Array, ""] | None
    eos_ids: Int[Array, " E"]


@dataclass(frozen=True)
class _Settings:
    """`limit`: most tokens of an answer; `room`: tokens that the program has space for."""

    limit: int
    room: int
    eos_ids: tuple[int, ...]
    sampling: _Sampling


def _settings(
    model: Decoder,
    tokenizer: PreTrainedTokenizerFast,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> _Settings:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature must be 0 or above, not {temperature}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, not {top_p}")
    named = {*model.eos_token_ids, tokenizer.eos_token_id} - {None}
    eos_ids = tuple(sorted(named))
    sampling = _Sampling(
        temperature=jnp.float32(temperature) if temperature > 0 else None,
        top_p=jnp.float32(top_p) if temperature > 0 and top_p < 1 else None,
        eos_ids=jnp.asarray(eos_ids, jnp.int32),
    )
    return _Settings(max_new_tokens, bucket(max_new_tokens), eos_ids, sampling)


def _tokenise(
    model: Decoder,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    chat_template: str | None,
) -> list[list[int]]:
    context, vocab = model.options.context_length, model.options.vocab_size
    rows = []
    for number, prompt in enumerate(prompts, start=1):
        messages = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
        tokens = render_prompt(tokenizer, messages, chat_template)
        if not tokens:
            raise UserError(f"prompt {number}: the chat template makes no text of it")
        if max(tokens) >= vocab:
            raise UserError(
                f"prompt {number}: the tokenizer gives token {max(tokens)}, but the model knows only {vocab} "
                "tokens; use the model's own tokenizer"
            )
        if len(tokens) + max_new_tokens > context:
            raise UserError(
                f"prompt {number}: {len(tokens)} tokens and max_new_tokens {max_new_tokens} are "
                f"{len(tokens) + max_new_tokens}, over the model's context of {context}; shorten the prompt "
                "or lower max_new_tokens"
            )
        rows.append(tokens)
    return rows


def power_of_two(number: int) -> int:
    """The least that is no smaller: as many prompts as a program answers at a time, at most."""
    return 1 << (number - 1).bit_length()


def bucket(length: int) -> int:
    """Tokens that a program has room for, where there are so many."""
    return max(_SMALLEST_BUCKET, power_of_two(length))


def _text(tokenizer: PreTrainedTokenizerFast, settings: _Settings, written: Int[np.ndarray, " W"]) -> str:
    tokens = [token for token in written.tolist() if token != NO_TOKEN and token not in settings.eos_ids]
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _pieces(
    model: Decoder,
    tokenizer: PreTrainedTokenizerFast,
    settings: _Settings,
    rows: list[list[int]],
    seed: int,
    chunk: int,
) -> Iterator[str]:
    weights = nnx.split(model)
    state = _start(weights, settings, rows, [0], 1, seed)
    shown = 0
    for stop in range(chunk, settings.limit + chunk, chunk):
        state = _decode(*weights, state, min(stop, settings.limit), settings.sampling)
        text = _text(tokenizer, settings, np.asarray(state.tokens)[0])
        finished = stop >= settings.limit or bool(state.finished[0])
        if not finished:
            # A character of several tokens decodes to this mark until its last token is there.
            text = text.rstrip(UNFINISHED_CHARACTER)
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
        if finished:
            return


def _start(
    weights: tuple[Any, Any],
    settings: _Settings,
    rows: list[list[int]],
    places: list[int],
    size: int,
    seed: int,
) -> _Answers:
    """Prefill of `rows`, filled up to `size` with empty ones; `places` tell the draws of rows apart."""
    prompts = np.zeros((size, bucket(max(map(len, rows)))), np.int32)
    lengths = np.zeros(size, np.int32)
    for index, row in enumerate(rows):
        prompts[index, : len(row)] = row
        lengths[index] = len(row)
    place = np.zeros(size, np.int32)
    place[: len(rows)] = places
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(place)
    return _prefill(*weights, prompts, lengths, keys, settings.limit, settings.sampling, settings.room)


# --- the compiled programs ---


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Answers:
    """A batch while it is being answered.

    Attributes:
        caches: keys and values of each layer, as decoding's products read them: in another order XLA would
            keep a second copy of all. Row b holds prompt_lengths[b] + count - 1 tokens, because the
            newest token is still to be read.
        prompt_lengths: 0 for the rows that fill up the batch.
        final_lengths: of prompt and longest possible answer together; for the rotary frequencies.
        keys: of the draws of each row.
        tokens: the answers; NO_TOKEN where there is none (yet).
        finished: rows that have met EOS.
        count: tokens written so far, at least 1.
    """

    caches: list[tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]]
    prompt_lengths: Int[Array, " B"]
    final_lengths: Int[Array, " B"]
    keys: Key[Array, " B"]
    tokens: Int[Array, "B W"]
    finished: Bool[Array, " B"]
    count: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("graph", "room"))
def _prefill(
    graph: Any,
    weights: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    limit: Int[Array, ""],
    sampling: _Sampling,
    room: int,
) -> _Answers:
    """Read the prompts, and write the first token of each answer."""
    model = nnx.merge(graph, weights)
    batch, length = prompts.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), prompts.shape)
    segment_ids = (positions < prompt_lengths[:, None]).astype(jnp.int32)
    final_lengths = prompt_lengths + limit
    caches = []

    def attend(q: Array, k: Array, v: Array) -> Array:
        space = ((0, 0), (0, 0), (0, room), (0, 0))
        caches.append((jnp.pad(k.swapaxes(1, 2), space), jnp.pad(v.swapaxes(1, 2), space)))
        # A prompt, and its padding.
        return attention(q, k, v, segment_ids, max_segments=2, implementation=model.attention_implementation)

    hidden = _hidden_states(model, prompts, positions, final_lengths, attend)
    answers = _Answers(
        caches=caches,
        prompt_lengths=prompt_lengths,
        final_lengths=final_lengths,
        keys=keys,
        tokens=jnp.full((batch, room), NO_TOKEN, jnp.int32),
        finished=prompt_lengths == 0,
        count=jnp.int32(0),
    )
    return _write(answers, model.logits(hidden[jnp.arange(batch), prompt_lengths - 1]), sampling)


# The answers are donated, so that the caches are there once.
@functools.partial(jax.jit, static_argnames="graph", donate_argnames="answers")
def _decode(
    graph: Any, weights: Any, answers: _Answers, stop: Int[Array, ""], sampling: _Sampling
) -> _Answers:
    """Write tokens until each answer has `stop` of them or has met EOS."""

    def unfinished(answers: _Answers) -> Bool[Array, ""]:
        return (answers.count < stop) & ~jnp.all(answers.finished)

    def step(answers: _Answers) -> _Answers:
        model = nnx.merge(graph, weights)
        newest = jax.lax.dynamic_slice_in_dim(answers.tokens, answers.count - 1, 1, axis=1)  # [B, 1]
        end = answers.prompt_lengths + answers.count - 1  # [B], where it goes in the cache
        everywhere = jnp.arange(len(end))
        before, after = iter(answers.caches), []

        def attend(q: Array, k: Array, v: Array) -> Array:
            keys, values = next(before)
            keys = keys.at[everywhere, :, end].set(k[:, 0])
            values = values.at[everywhere, :, end].set(v[:, 0])
            after.append((keys, values))
            return cached_attention(q, keys.swapaxes(1, 2), values.swapaxes(1, 2), end + 1)

        # A finished row goes on with token 0, which nobody reads.
        hidden = _hidden_states(model, jnp.maximum(newest, 0), end[:, None], answers.final_lengths, attend)
        return _write(replace(answers, caches=after), model.logits(hidden[:, 0]), sampling)

    return jax.lax.while_loop(unfinished, step, answers)


def _hidden_states(
    model: Decoder,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    final_lengths: Int[Array, " B"],
    attend: Attend,
) -> Float[Array, "B T D"]:
    rotation = model.rotation(positions, jnp.broadcast_to(final_lengths[:, None], positions.shape))
    return model.run(tokens, rotation, attend)


def _write(answers: _Answers, logits: Float[Array, "B V"], sampling: _Sampling) -> _Answers:
    keys = jax.vmap(jax.random.fold_in, (0, None))(answers.keys, answers.count)
    token = jnp.where(answers.finished, NO_TOKEN, _choose(logits, keys, sampling))
    return replace(
        answers,
        tokens=jax.lax.dynamic_update_slice_in_dim(answers.tokens, token[:, None], answers.count, axis=1),
        finished=answers.finished | jnp.isin(token, sampling.eos_ids),
        count=answers.count + 1,
    )


def _choose(logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: _Sampling) -> Int[Array, " B"]:
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical)
    logits = logits / sampling.temperature
    if sampling.top_p is None:
        return draw(keys, logits).astype(jnp.int32)
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    share = jax.nn.softmax(ranked, axis=-1)
    above = jnp.cumsum(share, axis=-1) - share  # 0 for the most likely token, which is always kept
    rank = draw(keys, jnp.where(above < sampling.top_p, ranked, -jnp.inf))
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
