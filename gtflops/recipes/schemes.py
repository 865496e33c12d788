"""The schemes that people compare with: what each trains, and when it chooses anew."""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gtflops.errors import InputError
from gtflops.problem import layers_of
from gtflops.profiling import Profile

#: Called every so many steps with the profile and the number of steps made: the tensors to train until the next call.
Choose = Callable[[Profile, int], Sequence[str]]


@dataclass(frozen=True)
class Scheme:
    """``prepare`` freezes what the scheme never trains, or wraps the model; it returns the model to train.

    ``choose``, made from a seed, takes the place of a budget in choosing among the rest; ``budgeted`` schemes select
    under a budget.
    """

    name: str
    what: str
    prepare: Callable[[Any], Any]
    choose: Callable[[int], Choose] | None = None
    budgeted: bool = False


def scheme(name: str) -> Scheme:
    """The scheme called ``name``; InputError lists them.

    >>> scheme("top15").what
    'the 15 blocks nearest to the loss, without last norm and head'
    """
    if name in SCHEMES:
        return SCHEMES[name]
    if found := re.fullmatch(r"top([1-9][0-9]*)", name):
        return _top(int(found[1]))
    raise InputError(
        f"there is no scheme {name!r}; expected one of {', '.join(SCHEMES)}, or another number than of top2"
    )


def _everything(model: Any) -> Any:
    return model.requires_grad_(True)


def _only(model: Any, names: Iterable[str]) -> Any:
    trained = set(names)
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(name in trained)
    return model


def _top(count: int) -> Scheme:
    """FT-Top2, "the top two layers", for any number: the blocks nearest to the loss, all of each, and nothing else.

    Embeddings, last norm and head are in no block and stay frozen, so that the backward pass ends at the lowest of the
    blocks. Of an encoder-decoder they are the decoder's.
    """

    def prepare(model: Any) -> Any:
        names = [name for name, _ in model.named_parameters()]
        blocks = blocks_of(names)
        order = list(dict.fromkeys(block for block in blocks.values() if block))
        if len(order) < count:
            raise InputError(
                f"{type(model).__name__} has {len(order)} blocks (modules in a list, as model.layers.3), so there are "
                f"no top {count}; expected a model of as many, or a smaller number"
            )
        return _only(model, (name for name in names if blocks[name] in order[-count:]))

    return Scheme(f"top{count}", f"the {count} blocks nearest to the loss, without last norm and head", prepare)


def _bitfit(model: Any) -> Any:
    """All biases, and nothing else (Ben Zaken et al., arXiv:2106.10199)."""
    biases = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not biases:
        raise InputError(
            f"{type(model).__name__} has no biases for bitfit to train; expected a model with some, such as OPT, "
            "BLOOM or GPT-2, or another scheme"
        )
    return _only(model, biases)


#: What the projections to queries and values are called, or the one that makes them at once.
_QUERY_AND_VALUE = (
    ("q_proj", "v_proj"),
    ("query_key_value",),
    ("qkv_proj",),
    ("q", "v"),
    ("query", "value"),
    ("c_attn",),
)


def _lora(model: Any) -> Any:
    """r = 8, alpha = 32, dropout 0.1, on queries and values, as in the published experiments."""
    modules = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    targets = next((names for names in _QUERY_AND_VALUE if modules.issuperset(names)), None)
    if targets is None:
        known = ", ".join("/".join(names) for names in _QUERY_AND_VALUE)
        raise InputError(
            f"{type(model).__name__} has no modules for queries and values by a known name; expected one of {known}"
        )
    peft = require_peft()
    settings = peft.LoraConfig(
        task_type=_task(model),
        r=8,
        lora_alpha=32,
        lora_dropout=0.1,
        target_modules=list(targets),
        fan_in_fan_out=targets == ("c_attn",),
    )
    return peft.get_peft_model(model, settings)


def _prefix(model: Any) -> Any:
    """20 virtual tokens before the keys and values of every layer, as in the published experiments."""
    peft = require_peft()
    return peft.get_peft_model(model, peft.PrefixTuningConfig(task_type=_task(model), num_virtual_tokens=20))


def _task(model: Any) -> str:
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def require_peft() -> Any:
    """The package peft; InputError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise InputError(
            "lora and prefix are made by the package peft, which is not installed; pip install 'gtflops[recipes]'"
        ) from error
    return peft


# --- LISA -------------------------------------------------------------------------------------------------------

#: Blocks that LISA trains at a time.
LISA_BLOCKS = 2


def lisa_choice(names: Sequence[str], step: int, *, seed: int, num_blocks: int = LISA_BLOCKS) -> tuple[str, ...]:
    """The tensors of ``num_blocks`` blocks, drawn uniformly, and all that are in no block: embeddings, norm and head.

    LISA (Pan et al., arXiv:2403.17919) draws anew after every so many steps; a draw depends on ``seed`` and ``step``
    alone, so that a resumed run makes the same ones.

    >>> lisa_choice(["embed.weight", "layers.0.weight", "layers.1.weight", "head.weight"], 20, seed=0, num_blocks=1)
    ('embed.weight', 'layers.1.weight', 'head.weight')
    """
    block_of = blocks_of(names)
    blocks = sorted({block for block in block_of.values() if block})
    drawn = random.Random(f"{seed}:{step}").sample(blocks, min(num_blocks, len(blocks)))
    return tuple(name for name in names if block_of[name] == "" or block_of[name] in drawn)


def blocks_of(names: Sequence[str]) -> Mapping[str, str]:
    """The block of each tensor, as ``model.layers.3``; ``""`` for one that is in no list of modules."""
    return {
        name: layer if layer.rpartition(".")[2].isdigit() else ""
        for name, layer in zip(names, layers_of(names), strict=True)
    }


def _lisa(seed: int) -> Choose:
    return lambda profile, step: lisa_choice(profile.names, step, seed=seed)


SCHEMES: dict[str, Scheme] = {
    one.name: one
    for one in (
        Scheme("full", "every tensor", _everything),
        _top(2),
        Scheme("bitfit", "the biases", _bitfit),
        Scheme("lora", "adapters of rank 8 on queries and values", _lora),
        Scheme("prefix", "20 virtual tokens in every layer", _prefix),
        Scheme("lisa", f"{LISA_BLOCKS} random blocks, with embeddings and head", _everything, choose=_lisa),
        Scheme("greentrainer", "what matters most within the budget", _everything, budgeted=True),
    )
}
