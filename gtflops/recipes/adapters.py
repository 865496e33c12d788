"""Adapters on a model by name: what a LoRA step would cost, without weights."""

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gtflops.errors import InputError
from gtflops.profiling import Profile, profile
from gtflops.recipes.schemes import require_peft

if TYPE_CHECKING:
    from gtflops.capture.architectures import Architecture

#: What a description of adapters begins with.
LORA = "lora:"


@dataclass(frozen=True)
class Lora:
    """Adapters of rank ``r`` on the modules whose path ends in one of ``modules``, or on ``("all-linear",)``."""

    modules: tuple[str, ...]
    r: int = 8
    dropout: float = 0.0

    @classmethod
    def of(cls, text: str) -> "Lora":
        """What ``text`` describes.

        >>> Lora.of("lora:r=16,q_proj,v_proj")
        Lora(modules=('q_proj', 'v_proj'), r=16, dropout=0.0)
        """
        words = [word.strip() for word in text.removeprefix(LORA).split(",") if word.strip()]
        modules = tuple(word for word in words if "=" not in word)
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        try:
            lora = cls(modules, int(settings.pop("r", "8")), float(settings.pop("dropout", "0")))
        except ValueError as error:
            raise InputError(f"{text!r}: {error}; {_EXPECTED}") from error
        if settings or not modules or lora.r < 1 or not 0 <= lora.dropout < 1:
            wrong = f"there is no setting {min(settings)!r}" if settings else "" if modules else "it names no modules"
            raise InputError(f"{text!r}: {wrong or 'r is below 1, or dropout not in [0, 1)'}; {_EXPECTED}")
        return lora


_EXPECTED = (
    "expected 'lora:' and names of modules, with r (8 unless given) and dropout (0) if wanted, such as "
    "'lora:r=8,q_proj,v_proj' or 'lora:r=8,dropout=0.1,all-linear'"
)


def lora_profile(built: "Architecture", lora: Lora) -> tuple[Profile, tuple[str, ...]]:
    """The profile of a model with adapters, and the names of their tensors, all others being frozen.

    PEFT puts the adapters on ``built.model``, on meta tensors. InputError where a name is that of no module, PEFT takes
    no adapter there, or PEFT is not installed.
    """
    peft = require_peft()
    modules = dict(built.model.named_modules())
    for name in lora.modules:
        if lora.modules != _ALL and not _ending(modules, name):
            ends = sorted({path.rpartition(".")[2] for path, module in modules.items() if hasattr(module, "weight")})
            close = difflib.get_close_matches(name, ends, n=4, cutoff=0.3) or ends[:8]
            raise InputError(
                f"no module of {type(built.model).__name__} is called {name!r}, expected the end of a module's path; "
                f"nearest: {', '.join(close)}"
            )
    settings = peft.LoraConfig(
        r=lora.r,
        lora_dropout=lora.dropout,
        target_modules=_ALL[0] if lora.modules == _ALL else list(lora.modules),
        # transformers' Conv1D keeps its weight transposed
        fan_in_fan_out=any(
            type(module).__name__ == "Conv1D" for name in lora.modules for module in _ending(modules, name)
        ),
    )
    try:
        with warnings.catch_warnings(action="ignore"):  # of PEFT's about names in transformers
            model = peft.get_peft_model(built.model, settings, low_cpu_mem_usage=True)
    except ValueError as error:
        raise InputError(
            f"PEFT puts no adapter on {', '.join(lora.modules)}: {' '.join(str(error).split())}"
        ) from error
    names = tuple(name for name, tensor in model.named_parameters() if tensor.requires_grad)
    adapted = profile(model.train(), built.batch)
    return replace(adapted, notes=(*built.notes, *adapted.notes)), names


_ALL = ("all-linear",)


def _ending(modules: Mapping[str, Any], name: str) -> list[Any]:
    return [module for path, module in modules.items() if path == name or path.endswith(f".{name}")]
