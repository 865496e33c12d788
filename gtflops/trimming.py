"""Work that the loss never sees: padding, and the head at positions without a label."""

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import Sampler
from torch.utils.hooks import RemovableHandle

from gtflops.capture.batches import TARGET_POSITIONS, Loss
from gtflops.errors import InputError
from gtflops.families import IGNORED, adapters_of, family_of, has_virtual_tokens, positions_read, without_adapters
from gtflops.reuse.examples import OF_TOKENS
from gtflops.reuse.front import OF_THE_LENGTH

#: What has a column for each token of a decoder that has an encoder.
_OF_DECODER = frozenset({"labels", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"})

#: What a loop does with its batches: "auto" trims them by :class:`Trim`.
Trimming = Literal["auto"] | None


class Trim:
    """Takes out of the batches of ``model`` what its loss does not see: ``trim(batch)`` is what to train on.

    A trimmed batch has no columns that are padding in every row by its ``attention_mask``, and the head and the loss
    run at the positions with a label alone. The loss and all gradients are those of the whole batch, within rounding;
    with dropout, as the random numbers fall: there are fewer of them. The model's ``logits`` are then of shape
    ``1 x number of labels x vocabulary``, in the order of the batch. The batch is a dict with ``target_positions`` and
    ``labels`` of these; any other batch runs as before.

    Hooks on the model bring the hidden states of these positions to its head. They are there from the first batch on,
    until :meth:`remove`, the end of a ``with``, or the end of this object; without them, a trimmed batch is an error.
    Left as they are, with a warning that says why: models that are none of :data:`gtflops.families.FAMILIES`, a
    ``loss`` of your own (what it reads is not known), and batches whose columns or labels are unclear. Padding is left
    in, too, where a row's first token has padding in front and a label, which is then predicted from that padding.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> _ = torch.manual_seed(0)
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4))
    >>> batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
    ...          "labels": torch.tensor([[-100, -100, 7, 8, -100, -100]])}
    >>> with Trim(model) as trim:
    ...     trimmed = trim(batch)
    ...     outputs = model(**trimmed)
    >>> tuple(trimmed["input_ids"].shape), tuple(outputs.logits.shape), trimmed["target_positions"].tolist()
    ((1, 4), (1, 2, 97), [1, 2])
    >>> bool(torch.isclose(outputs.loss, model(**batch).loss))
    True
    """

    def __init__(self, model: torch.nn.Module, loss: Loss | None = None) -> None:
        self._model = model
        self._base = without_adapters(model)
        self._family, why_not = family_of(model, loss)
        self._has_prefix = any(map(has_virtual_tokens, adapters_of(model)))
        self._cuts_columns = self._family is not None
        self._chooses_targets = self._family is not None
        self._said: set[str] = set()
        self._hooks: list[RemovableHandle] = []
        weakref.finalize(self, _remove, self._hooks)
        if why_not is not None:
            self._say(f"{why_not}: batches are left as they are")
            return
        if (why_not := _why_all_columns(self._base)) is not None:
            self._cuts_columns = False
            self._say(f"{why_not}: padding is left in")
        if model._compiled_call_impl is not None:
            self._chooses_targets = False
            self._say("a model compiled as a whole would be so for each number of labels: the head is left as it is")

    @classmethod
    def of(cls, trim: Trimming, model: torch.nn.Module, loss: Loss | None = None) -> "Trim | None":
        """What a loop trims its batches by, if it does. InputError for what says neither."""
        if trim not in ("auto", None):
            raise InputError(f"trim is {trim!r}, expected 'auto', or None for batches as they are")
        return None if trim is None else cls(model, loss)

    def __call__(self, batch: Any) -> Any:
        """What to train on in the place of ``batch``, which is not changed; itself if it is trimmed already."""
        if self._family is None or not isinstance(batch, Mapping):
            if self._family is not None:
                self._say(f"a batch is a {type(batch).__name__}, expected a mapping: it is left as it is")
            return batch
        self._install()
        if batch.get(TARGET_POSITIONS) is not None:
            return batch
        trimmed = dict(batch)
        if self._cuts_columns:
            trimmed = self._without_padding(trimmed)
        if self._chooses_targets:
            trimmed = self._with_targets_alone(trimmed)
        return trimmed

    def __enter__(self) -> "Trim":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Takes the hooks off the model; the next batch to trim puts them on again."""
        _remove(self._hooks)

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(f"trim: {what}", stacklevel=3)

    # --- columns --------------------------------------------------------------------------------------------------

    def _without_padding(self, batch: dict[str, Any]) -> dict[str, Any]:
        assert self._family is not None
        of_decoder = _OF_DECODER if self._family.loss == "decoder" else frozenset[str]()
        labelled = frozenset({"labels"}) - of_decoder
        given = {name for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim()}
        if unknown := sorted(given - OF_TOKENS - labelled - of_decoder):
            self._say(f"it is not known which columns of {unknown[0]!r} are padding: padding is left in")
            return batch
        for names, used in (
            (OF_TOKENS | labelled, self._columns_of_tokens(batch, labelled)),
            (of_decoder, self._columns_of_decoder(batch) if of_decoder else None),
        ):
            if used is not None and used != slice(None):
                for name in names & given:
                    batch[name] = batch[name][:, used].contiguous()
        return batch

    def _columns_of_tokens(self, batch: Mapping[str, Any], labelled: frozenset[str]) -> slice | None:
        """Those from the first to the last that some row has a token or a label in."""
        assert self._family is not None
        mask = batch.get("attention_mask")
        if mask is None:
            return None
        own = [tensor for name in (*OF_TOKENS, *labelled) if (tensor := batch.get(name)) is not None]
        if mask.dim() != 2 or any(tensor.shape[:2] != mask.shape for tensor in own):
            self._say(f"attention_mask of shape {tuple(mask.shape)} is not that of all tokens: padding is left in")
            return None
        read = positions_read(self._family.loss, batch)
        if read is not None and bool((read & ((mask != 0).cumsum(dim=1) == 0).cpu()).any()):
            self._say("labels of first tokens are predicted from the padding in front of them: padding is left in")
            return None
        used = (mask != 0).any(dim=0)
        for name in labelled & batch.keys():
            used |= (batch[name] != IGNORED).any(dim=0)
        start, end = _ends(used)
        if self._has_prefix or not (self._family.positions_are_relative or batch.get("position_ids") is not None):
            start = 0  # what is behind would be at other positions
        return slice(start, end) if end - start < len(used) and end > start else None

    def _columns_of_decoder(self, batch: Mapping[str, Any]) -> slice | None:
        """Up to the last label: a decoder looks back only, whatever is behind."""
        labels = batch.get("labels")
        if labels is None or labels.dim() != 2:
            return None
        if any((own := batch.get(name)) is not None and own.shape[:2] != labels.shape for name in _OF_DECODER):
            return None
        _, end = _ends((labels != IGNORED).any(dim=0))
        return slice(0, end) if 0 < end < labels.shape[1] else None

    # --- positions ------------------------------------------------------------------------------------------------

    def _with_targets_alone(self, batch: dict[str, Any]) -> dict[str, Any]:
        assert self._family is not None
        labels, tokens = batch.get("labels"), self._tokens_of(batch)
        if labels is None:
            return batch
        if batch.get("shift_labels") is not None or labels.dim() != 2 or labels.shape != tokens:
            self._say(
                f"labels of shape {tuple(labels.shape)} beside tokens of shape {None if tokens is None else (*tokens,)}"
                f"{' and shift_labels' if batch.get('shift_labels') is not None else ''}: the head is left at every "
                "position"
            )
            return batch
        targets = labels
        if self._family.loss == "next token":
            targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        flat = targets.flatten()
        positions = (flat != IGNORED).nonzero().flatten()
        if len(positions) == len(flat):
            return batch
        if not len(positions):  # the loss of a batch without labels is what it would be: the mean of nothing
            positions = positions.new_zeros(1)
        if self._family.loss == "decoder" and all(
            batch.get(name) is None for name in ("decoder_input_ids", "decoder_inputs_embeds")
        ):
            shifted: Any = self._base.prepare_decoder_input_ids_from_labels  # as the model itself does
            batch["decoder_input_ids"] = shifted(labels=labels)
        batch["labels"] = flat[positions].unsqueeze(0)
        if self._family.loss == "next token":
            batch["shift_labels"] = batch["labels"]
        batch[TARGET_POSITIONS] = positions
        return batch

    def _tokens_of(self, batch: Mapping[str, Any]) -> torch.Size | None:
        """The shape of the tokens that the head runs at."""
        assert self._family is not None
        prefix = "decoder_" if self._family.loss == "decoder" else ""
        for name in ("input_ids", "inputs_embeds"):
            if (tensor := batch.get(prefix + name)) is not None:
                return torch.Size(tensor.shape[:2])
        return torch.Size(batch["labels"].shape) if prefix and batch.get("labels") is not None else None

    def _install(self) -> None:
        if self._hooks or not self._chooses_targets:
            return
        assert self._family is not None
        gather = _Gather(type(self._base).__name__)
        head = self._base.get_submodule(self._family.head)
        self._hooks += [
            self._model.register_forward_pre_hook(gather.take, prepend=True, with_kwargs=True),
            head.register_forward_pre_hook(gather.gather),
            self._model.register_forward_hook(gather.end, always_call=True),
        ]


class _Gather:
    """Of one forward pass: the positions of its batch, until the head is called."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._positions: torch.Tensor | None = None

    def take(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._positions = kwargs.get(TARGET_POSITIONS)
        return args, {name: value for name, value in kwargs.items() if name != TARGET_POSITIONS}

    def gather(self, head: torch.nn.Module, args: Any) -> Any:
        if self._positions is None:
            return None
        hidden, *others = args
        positions, self._positions = self._positions, None
        rows = hidden.flatten(0, 1).index_select(0, positions.to(hidden.device)).unsqueeze(0)
        return (rows, *others)

    def end(self, model: torch.nn.Module, args: Any, outputs: Any) -> None:
        missed, self._positions = self._positions is not None, None
        if missed and outputs is not None:  # it is None after an error
            raise InputError(
                f"the forward pass of {self._name} did not call its head, so the positions of a trimmed batch were not "
                "chosen and its loss would be another; expected the forward pass of transformers, or trim=None"
            )


def _remove(hooks: list[RemovableHandle]) -> None:
    while hooks:
        hooks.pop().remove()


def _ends(used: torch.Tensor) -> tuple[int, int]:
    """From the first to behind the last that is true; ``(0, 0)`` where none is."""
    where = used.nonzero().flatten().tolist()
    return (where[0], where[-1] + 1) if where else (0, 0)


def _why_all_columns(base: torch.nn.Module) -> str | None:
    """Why padding has to stay, if it has."""
    for name, module in base.named_modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in OF_THE_LENGTH:
                return f"rotary embeddings of type {kind!r} ({name}) depend on the length of a batch"
    return None


# --- batches by length --------------------------------------------------------------------------------------------

#: Batches whose examples are sorted by length together: of more, they come in less random company.
BATCHES_SORTED = 50


def by_length(lengths: Sequence[int], batch_size: int, generator: torch.Generator | None = None) -> list[int]:
    """An order of examples in which each batch, ``batch_size`` in a row, has examples of about the same length.

    Random as far as that allows: examples are shuffled, then sorted by length among those of :data:`BATCHES_SORTED`
    batches, and the batches shuffled. What does not fill a batch comes last.

    >>> lengths = [9, 2, 8, 1, 7, 3]
    >>> order = by_length(lengths, 2, torch.Generator().manual_seed(0))
    >>> sorted([lengths[order[at]], lengths[order[at + 1]]] for at in (0, 2, 4))
    [[1, 2], [3, 7], [8, 9]]
    """
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    full, window = len(lengths) // batch_size * batch_size, BATCHES_SORTED * batch_size
    grouped: list[int] = []
    for start in range(0, full, window):
        grouped += sorted(shuffled[start : min(start + window, full)], key=lengths.__getitem__)
    batches = torch.randperm(full // batch_size, generator=generator).tolist()
    return [example for at in batches for example in grouped[at * batch_size :][:batch_size]] + shuffled[full:]


class ByLength(Sampler[list[int]]):
    """Batches of examples of about the same length, for ``DataLoader(dataset, batch_sampler=ByLength(lengths, 4))``.

    Shuffled anew each time it is gone over, from PyTorch's random state, so that ``GreenTrainer.fit(resume=True)`` sees
    the same batches again. Full batches only, unless ``drop_last`` is false.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, drop_last: bool = True) -> None:
        if batch_size < 1 or len(lengths) < (batch_size if drop_last else 1):
            raise InputError(f"{len(lengths)} examples do not fill a batch of {batch_size}; expected at least as many")
        self._lengths, self._batch_size, self._drop_last = lengths, batch_size, drop_last

    def __len__(self) -> int:
        full, left = divmod(len(self._lengths), self._batch_size)
        return full + (left > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        order = by_length(self._lengths, self._batch_size)
        for number in range(len(self)):
            yield order[number * self._batch_size : (number + 1) * self._batch_size]
