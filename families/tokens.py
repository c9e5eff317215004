"""New tokens of CLIP text encoders: their vectors alone train, and the encoder's own embedding stays as it is, bit for bit.

Gal et al. 2022, An Image is Worth One Word (arXiv:2208.01618). The vectors are parameters of their own, an `nn.Embedding` [N,
D] for each text encoder, and stand in for what the encoder's embedding would look up for the new ids (`spliced`): so optimizer,
EMA and checkpoints have them and nothing else, and no row has to be put back after a step. A token of V vectors is V tokens to
the tokenizer, `<dog>`, `<dog>_1`, ..., and `<dog>` in a text is spelled as all of them: names and spelling are those of
diffusers' `load_textual_inversion`, so that a pipeline draws what training drew. `s` are a task's settings (settings.py);
`clips` are text encoders' tokenizers by name.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneloop.configs import BadInput, require
from oneloop.families.settings import Tokens, flag
from oneloop.tasks import Models, Rng, unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn

MODELS = {"text_encoder": "tokens", "text_encoder_2": "tokens_2"}
"""Text encoder -> the name of its new vectors among a task's models."""
KEYS = ("clip_l", "clip_g")
"""What other programs call the two text encoders of SDXL."""


def tokenizer(encoder: str) -> str:
    """The part of a checkpoint with a text encoder's tokenizer."""
    return encoder.replace("text_encoder", "tokenizer")


def vectors(token: str, s: Tokens) -> list[str]:
    """The tokens of a new word, one for each of its vectors."""
    return [token, *(f"{token}_{i}" for i in range(1, s.num_vectors))]


def names(s: Tokens) -> tuple[str, ...]:
    """Every new token: the N rows of the embeddings in their order."""
    return tuple(name for token in s.placeholder_tokens for name in vectors(token, s))


def extended(words: Any, new: tuple[str, ...]) -> Any:
    """A tokenizer that nobody else has, with the new tokens in it."""
    if new:
        words.add_tokens(list(new))
    return words


def spelled(captions: list[str], s: Tokens) -> list[str]:
    """Captions as a pipeline hands them to its tokenizer (`maybe_convert_prompt`): each new word as all of its tokens."""
    for token in s.placeholder_tokens if s.num_vectors > 1 else ():
        captions = [caption.replace(token, " ".join(vectors(token, s))) for caption in captions]
    return captions


def check(s: Tokens, group: str, kind: str, clips: Callable[[bool], Mapping[str, Any]]) -> None:
    """Refuse new tokens that a checkpoint of this kind cannot have, or that are none. `clips(plain)` opens the tokenizers.

    Raises:
        BadInput: with the token, or with what it begins as.
    """
    new, begin, name = s.placeholder_tokens, s.initializer_tokens, flag(group, "placeholder_tokens")
    for setting in ("initializer_tokens", "num_vectors", "token_learning_rate") if not new else ():
        if (value := getattr(s, setting)) != getattr(type(s), setting):
            raise BadInput(f"{flag(group, setting)} is {value!r}; expected {name} beside it")
    if not new:
        return
    require(len(begin) in (0, len(new)), f"{group}.initializer_tokens", begin, f"none, or one for each of {name}")
    for i, token in enumerate(new):
        whole = len(token.split()) == 1 and token == token.strip() and token != "__metadata__"  # safetensors' own key
        require(whole, f"{group}.placeholder_tokens", token, "a word without spaces, such as <dog>")
        for other in new[:i] + new[i + 1 :]:
            if any(token.casefold() in name.casefold() for name in vectors(other, s)):
                raise BadInput(f"{name} {token!r} is in {other!r}; expected words of which none is in another")
    if not clips(True):
        known = "StableDiffusionPipeline, StableDiffusionXLPipeline, FluxPipeline"
        other = "a LoRA learns a word too (python loop.py lora --data.trigger 'sks dog')"
        raise BadInput(f"{name}: a {kind} loads no new tokens, which are those of CLIP; expected one of {known}; {other}")
    for encoder, plain in clips(True).items():
        own, room = tokenizer(encoder), plain.model_max_length - 2
        require(s.num_vectors <= room, f"{group}.num_vectors", s.num_vectors, f"at most {room}, the room of a prompt")
        for token in new:
            if len(plain.tokenize(token)) == 1 or set(names(s)) & plain.get_vocab().keys():
                raise BadInput(f"{name} {token!r}: the {own} has this token; expected a new word, such as <{token}>")
        if (read := tuple(clips(False)[encoder].tokenize(" ".join(names(s))))) != names(s):
            raise BadInput(f"{name} {' '.join(new)!r}: the {own} reads it as {' '.join(read)!r}; expected words such as <dog>")
        for word in begin:
            count, room = len(plain.tokenize(word)), s.num_vectors
            if word and not 0 < count <= room:
                what = f"{flag(group, 'initializer_tokens')} {word!r} is {count} tokens of the {own}"
                raise BadInput(f"{what}; expected at most {room}, a vector each ({flag(group, 'num_vectors')})")


def add(models: Models, s: Tokens, seed: int, clips: Mapping[str, Any], carrier: str) -> None:
    """The new vectors beside the models, for each text encoder: the tokens of the words that they begin as in turn, or normal
    numbers with the standard deviation of all its vectors. `clips` are the plain tokenizers.

    Where they alone train, gradients reach them through the model `carrier`, which gradient checkpointing then means.
    """
    import torch

    for encoder, words in clips.items():
        weight, rows = models[encoder].get_input_embeddings().weight.detach().float(), []  # [W, D]
        for i, token in enumerate(s.placeholder_tokens):
            ids = words(s.initializer_tokens[i], add_special_tokens=False).input_ids if s.initializer_tokens else []
            if ids:
                rows += [weight[ids[k % len(ids)]] for k in range(s.num_vectors)]
            else:
                draw = Rng.of(seed, range(s.num_vectors), f"token {token}").normal(encoder, weight.shape[1])
                rows += [*(draw * weight.std())]
        models[MODELS[encoder]] = torch.nn.Embedding.from_pretrained(torch.stack(rows), freeze=False)
    models[MODELS[next(iter(clips))]].enable_gradient_checkpointing = functools.partial(_recompute, models[carrier])


def _recompute(carrier: nn.Module) -> None:
    if not any(p.requires_grad for p in carrier.parameters()):  # else it is asked itself
        carrier.enable_gradient_checkpointing()


@contextlib.contextmanager
def spliced(models: Models, s: Tokens, clips: Mapping[str, Any]) -> Iterator[None]:
    """The text encoders with the new vectors in their embeddings; `clips` are the tokenizers that have the new tokens."""
    held = []
    try:
        for encoder, words in clips.items():
            if MODELS[encoder] in models:
                first = words.convert_tokens_to_ids(s.placeholder_tokens[0])
                embedding = unwrap(models[encoder]).get_input_embeddings()
                embedding.forward = functools.partial(_looked_up, embedding.forward, models[MODELS[encoder]], first)
                held.append(embedding)
        yield
    finally:
        for embedding in held:
            del embedding.forward


def _looked_up(plain: Callable[[Tensor], Tensor], new: nn.Module, first: int, ids: Tensor) -> Tensor:
    """Vectors of tokens [B, T], [B, T, D]: the new ones' of the ids from `first` on."""
    import torch

    added = ids >= first  # [B, T]
    rows = plain(ids.masked_fill(added, 0))
    return torch.where(added[..., None], new((ids - first).clamp(min=0)).to(rows.dtype), rows)


# ---------------------------------------------------------------------------------------------------------------------
# The export: a file for each new token, since `load_textual_inversion` reads one of each.


def file(i: int) -> str:
    """The file of the i-th new token."""
    return f"learned_embeds{f'_{i + 1}' if i else ''}.safetensors"


def save(models: Models, path: Path, s: Tokens, encoders: tuple[str, ...]) -> str:
    """Write the vectors as float32, [V, D] by the token, or, of two text encoders, by KEYS. Returns the lines of Python that
    load them into `pipeline`, for `str.format`."""
    import torch
    from safetensors.torch import save_file

    lines = "from safetensors.torch import load_file\n" * (len(encoders) > 1 and bool(s.placeholder_tokens))
    for i, token in enumerate(s.placeholder_tokens):
        rows = slice(i * s.num_vectors, (i + 1) * s.num_vectors)
        several = [models[MODELS[encoder]].weight[rows].detach().to("cpu", torch.float32, copy=True) for encoder in encoders]
        keys = KEYS if len(several) > 1 else (token,)
        save_file(dict(zip(keys, several, strict=True)), path / file(i), {"format": "pt", "token": token})
        word = repr(token).replace("{", "{{").replace("}", "}}")
        if len(several) == 1:
            lines += f"pipeline.load_textual_inversion({{path}}, weight_name={file(i)!r})\n"
        else:
            lines += f'vectors = load_file({{path}} + "/{file(i)}")\n'
        for key, encoder in zip(keys, encoders, strict=True) if len(several) > 1 else ():
            where = f"text_encoder=pipeline.{encoder}, tokenizer=pipeline.{tokenizer(encoder)}"
            lines += f"pipeline.load_textual_inversion(vectors[{key!r}], token={word}, {where})\n"
    return lines


def settle(pipeline: Any, folder: Path, s: Tokens, encoders: tuple[str, ...]) -> None:
    """Put the vectors of an export into the text encoders of a pipeline whose tokenizers have the new tokens."""
    import torch
    from safetensors.torch import load_file

    files = [load_file(folder / file(i)) for i in range(len(s.placeholder_tokens))]
    for k, encoder in enumerate(encoders if files else ()):
        module, words = getattr(pipeline, encoder), getattr(pipeline, tokenizer(encoder))
        if module.get_input_embeddings().num_embeddings < len(words):
            module.resize_token_embeddings(len(words), mean_resizing=False)
        several = [own[KEYS[k] if len(encoders) > 1 else token] for own, token in zip(files, s.placeholder_tokens, strict=True)]
        with torch.no_grad():
            weight = module.get_input_embeddings().weight
            weight[words.convert_tokens_to_ids(list(names(s)))] = torch.cat(several).to(weight)
