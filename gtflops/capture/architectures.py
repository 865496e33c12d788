"""Models by name: the architecture alone, on meta tensors, from a local folder, a preset or the Hugging Face hub."""

import difflib
import json
import socket
import urllib.request
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import huggingface_hub
import torch
import transformers

from gtflops.errors import InputError, UnsupportedModelError
from gtflops.shapes import Sizes

Attention = Literal["eager", "sdpa"]


@dataclass(frozen=True)
class Architecture:
    """A model without weights, the batch it is to be profiled on, and what was assumed on the way."""

    model: torch.nn.Module
    batch: dict[str, torch.Tensor]
    sizes: Sizes
    notes: tuple[str, ...]


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Configurations of published models that need no network, by Hugging Face id."""
    text = resources.files("gtflops.capture").joinpath("presets.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def architecture(
    name: str,
    *,
    batch_size: int,
    seq_len: int | None = None,
    decoder_len: int | None = None,
    attention: Attention = "eager",
) -> Architecture:
    """The model called ``name`` in training mode on meta tensors, and a batch of ``batch_size`` x ``seq_len`` tokens.

    A classifier of images has no ``seq_len``, but images of the size in its configuration. The labels of an
    encoder-decoder are ``decoder_len`` tokens, ``seq_len`` unless given. ``name`` is a local folder with a
    ``config.json``, a preset, or a Hugging Face id in the cache or on the hub; only the configuration is read. Every
    position is real (no padding) and has a label. InputError for an unknown name, a size below 1, a length beyond the
    model's positions or one that it does not have; UnsupportedModelError for a model that takes neither tokens nor
    images.
    """
    for label, size in (("batch_size", batch_size), ("seq_len", seq_len), ("decoder_len", decoder_len)):
        if label != "batch_size" and size is None:
            continue
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"{label} is {size!r}, expected a positive integer")
    if attention not in ("eager", "sdpa"):
        raise InputError(f"attention is {attention!r}, expected 'eager' or 'sdpa'")
    settings = _settings(name)
    model_type = settings.pop("model_type", None)
    try:
        config = transformers.AutoConfig.for_model(model_type, **settings)
    except Exception as error:
        if model_type in transformers.CONFIG_MAPPING:
            raise InputError(f"the configuration of {name} is not valid: {type(error).__name__}: {error}") from error
        raise UnsupportedModelError(
            f"{name} is a model of type {model_type!r}, which transformers {transformers.__version__} does not build "
            "by itself; build it and call gtflops.profile(model, batch)"
        ) from error
    auto = _auto_class(name, config)
    sizes = _sizes(name, auto, batch_size, seq_len, decoder_len)
    with torch.device("meta"):
        model = auto.from_config(config, attn_implementation=attention)
        if settings.get("tie_word_embeddings") is False:
            _untie(model)
    _require_positions(name, model, sizes)
    with torch.device("meta"):
        batch = _images(config, sizes) if sizes.seq_len is None else _tokens(sizes.seq_len, sizes)
    notes: tuple[str, ...] = (
        f"architecture of {name}, " + ("a label for every image" if sizes.seq_len is None else _NO_PADDING),
        f"attention is {attention}, on no device in particular: a fused kernel's backward computes the scores once "
        "more; profile the model itself on its device to price the kernel that runs there",
    )
    named = settings.get("architectures") or []
    if named and type(model).__name__ not in named:
        notes = (f"the configuration names {', '.join(named)}; profiled is a {type(model).__name__}", *notes)
    return Architecture(model.train(), batch, sizes, notes)


_NO_PADDING = "no padding, a label at every position"


def takes_images(name: str) -> bool:
    """Whether the model called ``name`` is a classifier of images, which has no ``seq_len``."""
    kind = transformers.CONFIG_MAPPING.get(str(_settings(name).get("model_type")), None)
    return kind is not None and _image_classifier(kind)


def _sizes(name: str, auto: Any, batch_size: int, seq_len: int | None, decoder_len: int | None) -> Sizes:
    if auto is transformers.AutoModelForImageClassification:
        if seq_len is not None or decoder_len is not None:
            raise InputError(f"{name} takes images of the size in its configuration; expected batch_size alone")
        return Sizes(batch_size)
    if seq_len is None:
        raise InputError(f"seq_len is missing: {name} takes tokens; expected batch_size and seq_len")
    if auto is transformers.AutoModelForSeq2SeqLM:
        return Sizes(batch_size, seq_len, decoder_len or seq_len)
    if decoder_len is not None:
        raise InputError(f"decoder_len is {decoder_len}, but {name} is no encoder-decoder; expected seq_len alone")
    return Sizes(batch_size, seq_len)


def _require_positions(name: str, model: torch.nn.Module, sizes: Sizes) -> None:
    """InputError for a length beyond a learned table of positions; rotary and relative positions have no end."""
    tables = [
        module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and path.rpartition(".")[2] in _POSITIONS
    ]
    for label, size in (("seq_len", sizes.seq_len), ("decoder_len", sizes.decoder_len)):
        for table in tables:
            # OPT and BART keep two rows for an offset; RoBERTa counts from the number of the padding token.
            before = getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)
            if size is not None and size > (longest := table.num_embeddings - before):
                raise InputError(
                    f"{label} {size} is beyond the {longest} positions of {name}; expected at most {longest}"
                )


#: What transformers calls learned tables of positions.
_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


def _tokens(seq_len: int, sizes: Sizes) -> dict[str, torch.Tensor]:
    tokens = torch.empty((sizes.batch_size, seq_len), dtype=torch.int64)
    labels = torch.empty((sizes.batch_size, sizes.decoder_len or seq_len), dtype=torch.int64)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def _images(config: Any, sizes: Sizes) -> dict[str, torch.Tensor]:
    side = getattr(config, "image_size", 224)
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    images = torch.empty((sizes.batch_size, getattr(config, "num_channels", 3), height, width))
    return {"pixel_values": images, "labels": torch.empty(sizes.batch_size, dtype=torch.int64)}


def _settings(name: str) -> dict[str, Any]:
    """The configuration as its file says it, before transformers' classes change it."""
    if not name:
        raise InputError("the model's name is empty; expected a folder, a preset, or a Hugging Face id")
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json, expected a folder written by save_pretrained")
    if not folder.is_dir() and (preset := _preset(name)) is not None:
        return dict(presets()[preset])
    if folder.is_dir():
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {folder / 'config.json'}: {error}; expected a configuration") from error
        if not isinstance(found, dict):
            raise InputError(f"{folder / 'config.json'} holds a {type(found).__name__}, expected a JSON object")
    try:
        settings, _ = transformers.PreTrainedConfig.get_config_dict(name, local_files_only=not hub_is_reachable())
        return dict(settings)
    except (OSError, ValueError) as error:
        spelled = {alias: preset for preset in presets() for alias in _aliases(preset)}
        close = difflib.get_close_matches(name.lower(), spelled, n=6, cutoff=0.5)
        nearest = ", ".join(dict.fromkeys(spelled[match] for match in close) or presets())
        raise InputError(
            f"unknown model {name!r}: no such folder, no preset, and Hugging Face has no configuration of it here; "
            f"nearest known: {nearest}"
        ) from error


def hub_is_reachable() -> bool:
    """Whether the hub's name resolves; without a network, asking it anyway takes half a minute of retries."""
    if urllib.request.getproxies():
        return True  # the proxy resolves it
    try:
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _aliases(preset: str) -> tuple[str, str]:
    """How a preset may be spelled: its id, or the id without its organisation, in any case."""
    return preset.lower(), preset.rpartition("/")[2].lower()


def _preset(name: str) -> str | None:
    return next((preset for preset in presets() if name.lower() in _aliases(preset)), None)


def _auto_class(name: str, config: Any) -> Any:
    if type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForSeq2SeqLM
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        return transformers.AutoModelForMaskedLM
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForCausalLM
    if _image_classifier(type(config)):
        return transformers.AutoModelForImageClassification
    raise UnsupportedModelError(
        f"{name} is a {config.model_type} model, which by name has no batch of tokens or images; "
        "build it and call gtflops.profile(model, batch)"
    )


def _image_classifier(kind: type) -> bool:
    return kind in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def _untie(model: Any) -> None:
    """transformers ties T5's head whatever the configuration says; FLAN-T5's checkpoints have one of their own."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
