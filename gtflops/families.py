"""Models of transformers of which tests show where their loss reads what they compute: at tokens, not at padding."""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from gtflops.capture.batches import TARGET_POSITIONS, Loss

#: The label of positions without loss, as PyTorch's cross-entropy has it.
IGNORED = -100
#: Where a loss reads the tokens' activations: at the one in front of each label, at each label, at the first of each
#: row, or through cross-attention, which looks at tokens alone.
Reads = Literal["next token", "same token", "first token", "decoder"]


@dataclass(frozen=True, slots=True)
class Family:
    """How a model of transformers takes its loss, and what the columns of its batches may be cut to.

    ``head`` is the module that runs at every position, whose first argument the hidden states are. Columns in front may
    be cut where positions are counted from the first token of the mask, or matter by their distances alone.
    """

    loss: Reads
    head: str = "lm_head"
    positions_are_relative: bool = False


_NEXT = Family("next token", positions_are_relative=True)
#: The models that tests/test_trimming.py holds to the same loss and gradients, by the name of their class.
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": _NEXT,
    "MistralForCausalLM": _NEXT,
    "MixtralForCausalLM": _NEXT,
    "Qwen2ForCausalLM": _NEXT,
    "Qwen3ForCausalLM": _NEXT,
    "Gemma2ForCausalLM": _NEXT,
    "Gemma3ForCausalLM": _NEXT,
    "GPTNeoXForCausalLM": _NEXT,
    "FalconForCausalLM": _NEXT,
    "PhiForCausalLM": _NEXT,
    "OPTForCausalLM": _NEXT,  # its positions, and BLOOM's biases, are counted from the mask
    "BloomForCausalLM": _NEXT,
    "GPT2LMHeadModel": Family("next token"),
    "T5ForConditionalGeneration": Family("decoder", positions_are_relative=True),
    "BartForConditionalGeneration": Family("decoder"),
    "BertForMaskedLM": Family("same token", head="cls"),
    "RobertaForMaskedLM": Family("same token"),
    "AlbertForMaskedLM": Family("same token", head="predictions"),
}
#: Those beside them that tests/test_reuse_prefix.py holds to the same with other activations at padding.
CLASSIFIERS: Mapping[str, Reads] = {
    **dict.fromkeys((f"{name}ForSequenceClassification" for name in ("Bert", "Roberta", "DistilBert")), "first token"),
    **dict.fromkeys((f"{name}ForTokenClassification" for name in ("Bert", "Roberta", "DistilBert")), "same token"),
}


def family_of(model: torch.nn.Module, loss: Loss | None) -> tuple[Family | None, str | None]:
    """What batches of the model are trimmed by, or why they are not."""
    name = type(without_adapters(model)).__name__
    if name not in FAMILIES:
        return None, f"{name} is none of the models that are known to give the same loss without its padding"
    why_not = _why_unknown(model, FAMILIES[name].loss, is_own=loss is not None)
    return (FAMILIES[name], None) if why_not is None else (None, why_not)


def reads_of(model: torch.nn.Module, *, own_loss: bool) -> tuple[Reads | None, str | None]:
    """Where the loss reads, or why that is not known; ``own_loss`` where it is none of the model's."""
    name = type(without_adapters(model)).__name__
    reads = FAMILIES[name].loss if name in FAMILIES else CLASSIFIERS.get(name)
    if reads is None:
        return None, f"{name} is none of the models that are known to read nothing at padding"
    why_not = _why_unknown(model, reads, is_own=own_loss)
    return (reads, None) if why_not is None else (None, why_not)


def positions_read(reads: Reads, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """True where the loss reads, of the shape of the batch's ``attention_mask``: ``batch_size x seq_len``, on the CPU.

    ``None`` where labels do not say: there are none, or they are of another shape.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return None
    found = torch.zeros(mask.shape, dtype=torch.bool)
    if reads == "decoder":
        return found
    labels, positions = batch.get("labels"), batch.get(TARGET_POSITIONS)
    if labels is None:
        return None
    if reads == "first token":
        found[:, :1] = True
        return found
    if positions is not None:
        return found.flatten().index_fill(0, positions.cpu(), True).view(mask.shape)
    shifted = batch.get("shift_labels") if reads == "next token" else None
    targets = labels if shifted is None else shifted
    if targets.shape != mask.shape:
        return None
    if reads == "next token" and shifted is None:
        targets = torch.nn.functional.pad(targets[:, 1:], (0, 1), value=IGNORED)
    at_labels: torch.Tensor = targets.cpu() != IGNORED
    return at_labels


def without_adapters(model: torch.nn.Module) -> torch.nn.Module:
    """The model that PEFT put adapters into."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def adapters_of(model: torch.nn.Module) -> Collection[Any]:
    """What PEFT was told to put into a model."""
    adapters = getattr(model, "peft_config", None)
    return adapters.values() if isinstance(adapters, Mapping) else ()


def has_virtual_tokens(adapter: Any) -> bool:
    """Prompt tuning puts them in front of the batch; prefix tuning gives their keys and values to each layer, and
    leaves the batch as long as it is."""
    return bool(getattr(adapter, "is_prompt_learning", False))


def _why_unknown(model: torch.nn.Module, reads: Reads, *, is_own: bool) -> str | None:
    """Why a model of a known class may read elsewhere than that does."""
    if is_own:
        return "the loss is one of your own, and which positions it reads is not known"
    if any(has_virtual_tokens(one) and one.peft_type != "PREFIX_TUNING" for one in adapters_of(model)):
        return "virtual tokens are put in front of the batch"
    base: Any = without_adapters(model)
    kind = type(base)
    forward = _without_mixed_precision(vars(base).get("forward", kind.forward))
    own = _without_mixed_precision(kind.forward)
    if not own.__module__.startswith("transformers.models.") or forward is not own:
        return f"the forward pass of {kind.__name__} is not that of transformers"
    if reads == "next token":
        function = base.loss_function
        of_others = getattr(function, "__module__", "") != "transformers.loss.loss_utils"
        if of_others or getattr(function, "__name__", "") != "ForCausalLMLoss":
            return f"the loss_function of {kind.__name__} is not that of transformers"
    return None


def _without_mixed_precision(forward: Any) -> Any:
    """A function without what autocast puts around it, and accelerate, which does so in a Trainer with bf16."""
    while True:
        function = getattr(forward, "__func__", forward)
        where = function.__globals__["__name__"] if inspect.isfunction(function) else type(function).__module__
        if where not in ("torch.amp.autocast_mode", "accelerate.utils.operations"):
            return function
        if (forward := getattr(function, "__wrapped__", None)) is None:
            return function
