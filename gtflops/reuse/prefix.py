"""Running a model from a boundary: blocks whose result for an example is stored are not run again."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from gtflops.errors import InputError, UnsupportedModelError
from gtflops.families import positions_read, reads_of
from gtflops.reuse.blocks import (
    Output,
    Stretch,
    callers_of,
    hidden_of,
    is_of_encoder,
    replaced,
    require_not_compiled,
    stretches_of,
)
from gtflops.reuse.constants import digest_of, fingerprint_of
from gtflops.reuse.examples import TARGETS, Example, examples_of
from gtflops.reuse.front import Front, Watch
from gtflops.reuse.settings import SettingsReader
from gtflops.reuse.store import ActivationStore, Key

#: What makes a model of transformers return what its blocks do.
_COLLECTING = ("output_hidden_states", "output_attentions", "output_router_logits")


@dataclass(frozen=True, slots=True)
class ReuseStatistics:
    """What reuse came to so far: numbers of examples and bytes, and entries not used, by the reason."""

    examples_read: int
    examples_computed: int
    bytes_read: int
    bytes_written: int
    rejected: Mapping[str, int]


class Prefix:
    """A model whose first ``blocks`` are frozen, and are run once for each example.

    Inside ``with prefix.for_batch(batch) as reused:``, a forward pass of the model on the batch either runs as it is
    and its activations at the boundary are stored (``reused`` is False), or, where those of every example are in
    ``store``, does not run the blocks: the last one returns what is stored (``reused`` is True). What runs then is
    every operator outside of the blocks. Losses and gradients are those of the model without this, bit by bit where
    batches repeat, and within rounding where an example comes again in other company.

    Padding is stored only where something above the boundary may read it. That is not so in the models of
    ``gtflops.families``, with the loss that they take of the batch's ``labels``: there an example is found beside
    longer ones too, and gets zeros at padding. In other models, and with ``own_loss=True``, which says that the loss is
    none of the model's, an example is found in batches padded to the same length alone.

    Either way, the blocks and what runs in front of them are in evaluation mode until the boundary is passed: the
    frozen prefix runs without dropout, and both ways draw the same random numbers. The first batch of an object is
    computed whatever is stored, because it shows what runs in front.

    ``blocks`` are names of modules: of each ModuleList, those from its first on (``["model.layers.0",
    "model.layers.1"]``; all of an encoder is ``encoder.block.0`` and so on), or of a single module that returns one
    tensor, a boundary of your own. Nothing in front of the boundary may be trained: InputError names what is.

    An example is found by its inputs; two are the same if those are, whatever their labels, unless decoder blocks of an
    encoder-decoder are among the skipped ones, whose inputs labels are. Row ``i`` of every tensor must be of example
    ``i``; where the names of a batch are not those that transformers knows for such, say so by ``batch_first=True``,
    or what is the same is only a whole batch. ``apart`` are names of tensors that are used in front of the boundary and
    change nothing there, as the embeddings of a text beside an image: these may be trained. Changed weights, settings
    and code of the model are another prefix, whose activations are computed anew; after changing what runs in front of
    the boundary, make another object.

    >>> import tempfile
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> _ = model[0].requires_grad_(False)
    >>> x = torch.randn(3, 4)
    >>> losses = []
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     prefix = Prefix(model, ["0", "1"], ActivationStore(folder))
    ...     for epoch in range(2):
    ...         with prefix.for_batch({"input": x}) as reused:
    ...             losses.append((reused, model(x).sum().item()))
    >>> losses[0][0], losses[1][0], losses[0][1] == losses[1][1]
    (False, True, True)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: Iterable[str],
        store: ActivationStore,
        *,
        batch_first: bool = False,
        own_loss: bool = False,
        apart: Iterable[str] = (),
    ) -> None:
        if not isinstance(store, ActivationStore):
            raise InputError(f"store is {store!r}, expected gtflops.reuse.ActivationStore(folder)")
        self.model = model
        self.store = store
        self.batch_first = batch_first
        self._apart = frozenset(apart)
        self.stretches = stretches_of(model, blocks)
        self._skipped = {
            f"{name}.{path}".rstrip("."): module
            for stretch in self.stretches
            for name, block in zip(stretch.names, stretch.modules, strict=True)
            for path, module in block.named_modules()
        }
        self._settings = SettingsReader(model)
        self._callers = callers_of(model, self.stretches)
        self._all_modules = list(model.modules())
        self._reads, self._why_padding = reads_of(self._all_modules[0], own_loss=own_loss)
        configs = (getattr(module, "config", None) for module in self._all_modules)
        self._configs = list({id(config): config for config in configs if config is not None}.values())
        self._batch_norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
        self._outputs: dict[str, Output] = {}
        self._device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        # What runs in front depends on which inputs there are, and casts by whether autocast is on already.
        self._fronts: dict[tuple[frozenset[str], torch.dtype | None], Front] = {}
        self._digests: dict[Front, tuple[Any, str]] = {}
        self._own: set[str] = set()
        self._num_read = 0
        self._num_computed = 0

    @property
    def statistics(self) -> ReuseStatistics:
        """Of this object; bytes and rejected entries are those of its store."""
        store = self.store
        return ReuseStatistics(
            self._num_read, self._num_computed, store.bytes_read, store.bytes_written, dict(store.rejected)
        )

    @contextmanager
    def for_batch(self, batch: Any) -> Iterator[bool]:
        """For one forward pass on ``batch``: its arguments by name, in order, or the only one; True where the skipped
        blocks will not run."""
        with self.plan(batch).run() as reused:
            yield reused

    def plan(self, batch: Any) -> "PlannedPass":
        """The forward pass to come on ``batch``, as of :meth:`for_batch`. What is stored is read here, so that whether
        the blocks will run is certain before they do."""
        require_not_compiled(self._callers)
        arguments = _arguments_of(batch)
        self._require_no_collecting(arguments)
        inputs = self._inputs_of(arguments)
        read = None if self._reads is None else positions_read(self._reads, arguments)
        examples = examples_of(inputs, read, batch_first=self.batch_first)
        names = frozenset(name for name, value in inputs.items() if value is not None)
        kind = (names, _autocast(self._device))
        front = self._fronts.get(kind)
        stored = None
        by_batch = self._by_batch()
        if front is not None:
            self._require_constant(front, by_batch)
            stored = self._read(front, examples)
        return PlannedPass(
            self, inputs, kind, examples, by_batch, stored, self._why_together(arguments, examples, read)
        )

    @contextmanager
    def modes_of_passes(self) -> Iterator[None]:
        """Forward passes inside run everything as those of :meth:`for_batch` do: in evaluation mode until the boundary
        is passed, the blocks without gradients. For tracing what they cost; each is to begin in the modes that are set
        here."""
        training = [module for module in self._all_modules if module.training]
        boundaries = {stretch.boundary for stretch in self.stretches}
        ended: set[str] = set()

        def without_gradients(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def forward_and_on(*args: Any, **kwargs: Any) -> Any:
                with torch.no_grad():
                    output = forward(*args, **kwargs)
                if name in boundaries:
                    ended.add(name)
                if ended == boundaries:
                    ended.clear()
                    set_training(True)
                return output

            return forward_and_on

        def set_training(mode: bool) -> None:
            for module in training:
                vars(module)["training"] = mode

        with ExitStack() as exits:
            exits.callback(set_training, True)
            set_training(False)
            for stretch in self.stretches:
                for name, block in zip(stretch.names, stretch.modules, strict=True):
                    exits.enter_context(replaced(block, without_gradients(name, block.forward)))
            yield

    def state_dict(self) -> dict[str, Any]:
        """What the first batch has shown, as plain data: a prefix of the same model that is given it has no first
        batch to compute."""
        return {
            "fronts": [
                [sorted(names), _name(autocast), list(front.tensors), list(front.modules), _name(front.autocast)]
                for (names, autocast), front in self._fronts.items()
            ],
            "outputs": {name: [output.num_items, output.has_position_bias] for name, output in self._outputs.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state of :meth:`state_dict`."""
        self._fronts = {
            (frozenset(names), _dtype(outer)): Front(tuple(tensors), tuple(modules), _dtype(inner))
            for names, outer, tensors, modules, inner in state["fronts"]
        }
        self._outputs = {name: Output(*items) for name, items in state["outputs"].items()}

    def remove_others(self) -> None:
        """Remove from the store what this object neither read nor wrote: that of other boundaries, weights and models.

        It makes room for a boundary that has moved; another run on the same folder computes again what it had there.
        """
        self.store.remove_all_but(self._own)

    def _require_no_collecting(self, arguments: Mapping[str, Any]) -> None:
        """InputError where the model is asked for what its blocks return."""
        for name in _COLLECTING:
            if arguments.get(name) or any(getattr(config, name, False) for config in self._configs):
                raise InputError(f"{name} is on, but skipped blocks give none; expected it off, or no reuse")

    def _inputs_of(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the prefix may depend on."""
        inputs = {name: value for name, value in arguments.items() if name not in TARGETS}
        of_encoder = is_of_encoder(self.model)
        if of_encoder is None:
            return inputs
        if all(map(of_encoder, self._skipped.values())):
            return {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
        # The decoder's inputs are made of the labels, where they are not given.
        return inputs if inputs.get("decoder_input_ids") is not None else dict(arguments)

    def _why_together(
        self, arguments: Mapping[str, Any], examples: Sequence[Example], read: torch.Tensor | None
    ) -> str | None:
        """Why examples are found only beside the same others, or in batches of the same length."""
        if examples[0].is_batch:
            return (
                "it is not known that row i of every tensor of a batch is of example i, so the whole batch is one; "
                "expected the same batches in each epoch, or, where rows are examples, batch_first=True"
            )
        if examples[0].num_columns is not None or arguments.get("attention_mask") is None:
            return None
        why = self._why_padding
        if why is None and read is None:
            why = "the batch has no labels that say where the loss reads"
        elif why is None:
            why = "the loss reads what is computed at padding, or inputs beside the tokens may"
        return (
            f"{why}, so examples are stored with their padding; expected batches padded to one length, or the same "
            "batches in each epoch"
        )

    def _tensors(self, front: Front) -> dict[str, torch.Tensor]:
        """All that the activations at the boundary are computed from besides the inputs."""
        ours = {name: _tensor(self.model, name) for name in front.tensors}
        for path, module in self._skipped.items():
            for own in (module._parameters, module._buffers):
                ours.update((f"{path}.{name}", tensor) for name, tensor in own.items() if tensor is not None)
        return ours

    def _modules(self, front: Front) -> dict[str, torch.nn.Module]:
        named = {name: self.model.get_submodule(name) for name in front.modules if name}
        return {"": self._all_modules[0], **named, **self._skipped}

    def _by_batch(self) -> list[str]:
        """Names of the modules that normalise by the statistics of the batch, in the modes that they are in."""
        return [name for name, norm in self._batch_norms.items() if norm.training or norm.running_mean is None]

    def _require_constant(self, front: Front, by_batch: Iterable[str]) -> None:
        """InputError where something in front of the boundary is trained, UnsupportedModelError where what is computed
        there depends on the other examples of a batch."""
        trained = [name for name, tensor in self._tensors(front).items() if tensor.requires_grad]
        if trained:
            raise InputError(
                f"{len(trained)} of the tensors in front of the boundary {self.stretches[-1].boundary} require a "
                f"gradient, first {trained[0]}; expected all of them to be frozen, by requires_grad_(False), or fewer "
                "blocks to skip"
            )
        for name in by_batch:
            if name in front.modules or name in self._skipped:
                raise UnsupportedModelError(
                    f"{name} ({type(self._batch_norms[name]).__name__}) normalises by the statistics of the batch, so "
                    "what it computes for an example differs from batch to batch; expected it in evaluation mode "
                    "(.eval()), or a boundary in front of it"
                )

    def _digest(self, front: Front) -> str:
        """Of the prefix as it is now; weights are read again only where something changed."""
        tensors = self._tensors(front)
        conditions = [
            [stretch.names for stretch in self.stretches],
            str(front.autocast),
            torch.get_float32_matmul_precision(),
        ]
        settings = self._settings.read(self._modules(front), self._skipped)
        looked_at = (*tensors.values(), *settings.tensors)
        fingerprint = (tuple(tensors), fingerprint_of(looked_at), settings.digest, conditions)
        known = self._digests.get(front)
        if known is None or known[0] != fingerprint:
            known = self._digests[front] = fingerprint, digest_of(tensors, settings, conditions)
            self._own.add(known[1])
        return known[1]

    def _read(self, front: Front, examples: Sequence[Example]) -> list[dict[str, torch.Tensor]] | None:
        """The activations of every example, or None."""
        prefix = self._digest(front)
        keys = [Key(prefix, example.identity) for example in examples]
        if not all(key in self.store for key in keys):
            return None
        # All of them, so that each that cannot be used is found, and written anew.
        stored = [activations for key in keys if (activations := self.store.read(key)) is not None]
        return stored if len(stored) == len(keys) else None

    def _write(
        self, front: Front, examples: Sequence[Example], activations: Sequence[Mapping[str, torch.Tensor]]
    ) -> None:
        prefix = self._digest(front)
        for example, its in zip(examples, activations, strict=True):
            key = Key(prefix, example.identity)
            if key not in self.store:
                self.store.write(key, its, instead_of_others=self._own)


@dataclass(frozen=True, slots=True, eq=False)
class PlannedPass:
    """One forward pass on one batch, of which it is known whether the blocks will run."""

    _prefix: Prefix
    _inputs: Mapping[str, Any]
    _kind: tuple[frozenset[str], torch.dtype | None]
    _examples: Sequence[Example]
    _by_batch: Sequence[str]
    _stored: Sequence[Mapping[str, torch.Tensor]] | None
    why_together: str | None
    """Why its examples are found only beside the same others, or in batches of the same length, if they are."""

    @property
    def reused(self) -> bool:
        """Whether the blocks will not run."""
        return self._stored is not None

    @contextmanager
    def run(self) -> Iterator[bool]:
        """Around the forward pass; :attr:`reused`."""
        prefix, examples = self._prefix, self._examples
        front = prefix._fronts.get(self._kind)
        if self._stored is not None:
            assert front is not None
            with self._required(), _Reusing(prefix, examples, front, self._stored) as reusing:
                yield True
                reusing.require_passed()
            prefix._num_read += len(examples)
            return
        with self._required(), _Computing(prefix, examples, front, self._by_batch) as computing:
            yield False
            computing.require_passed()
        front = prefix._fronts[self._kind] = computing.front
        prefix._write(front, examples, computing.activations)
        prefix._num_computed += len(examples)

    @contextmanager
    def _required(self) -> Iterator[None]:
        """InputError, before anything is computed or stored, where the model is called on another batch."""

        def compare(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            self._prefix._require_no_collecting(kwargs)
            for name, planned in self._inputs.items():
                given = args[int(name)] if name.isdigit() and int(name) < len(args) else kwargs.get(name)
                if isinstance(planned, torch.Tensor) and isinstance(given, torch.Tensor) and given is not planned:
                    require_equal(name, planned.detach(), given.detach())

        def require_equal(name: str, planned: torch.Tensor, given: torch.Tensor) -> None:
            if planned.shape != given.shape or not torch.equal(planned.to(given.device, given.dtype), given):
                raise InputError(
                    f"{name} is not that of the batch whose activations are reused or stored; expected the forward "
                    "pass on the very batch, in its order, and the same inputs for an example in every epoch: nothing "
                    "that masks or augments them at random, in the training step either"
                )

        hook = self._prefix._all_modules[0].register_forward_pre_hook(compare, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            hook.remove()


class _Pass(ABC):
    """One forward pass, from entering the ``with`` on; in evaluation mode until every stretch of blocks has ended."""

    def __init__(self, prefix: Prefix, examples: Sequence[Example], front: Front | None) -> None:
        self._prefix = prefix
        self._examples = examples
        #: What runs in front, where it is known.
        self._front = front
        self._autocast = front.autocast if front is not None else None
        self._ended: set[str] = set()
        #: By stretch, whether its input requires a gradient: ``enable_input_require_grads`` does that.
        self._wants_grad: dict[str, bool] = {}
        self._exits = ExitStack()

    def __enter__(self) -> Any:
        with ExitStack() as exits:
            self._in_training = [module for module in self._prefix._all_modules if module.training]
            exits.callback(self._restore_training)
            for module in self._in_training:
                vars(module)["training"] = False  # hundreds of modules: setattr, which registers, takes milliseconds
            for stretch in self._prefix.stretches:
                for name, block in zip(stretch.names, stretch.modules, strict=True):
                    exits.enter_context(replaced(block, partial(self._call, stretch, name, block, block.forward)))
            exits.enter_context(self._around())
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.__exit__(*error)

    def require_passed(self) -> None:
        """InputError where no forward pass, or none through every boundary, was made."""
        left = [stretch.boundary for stretch in self._prefix.stretches if stretch.boundary not in self._ended]
        if left:
            raise InputError(
                f"no forward pass reached {left[0]} within for_batch, expected one of the whole model, on the batch"
            )

    @abstractmethod
    def _run(
        self, stretch: Stretch, name: str, block: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        """The hidden states that the block returns, and what it returns with others in their place."""

    def _around(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _passed(self) -> None:
        """Every stretch has ended: what runs above is trained as it would be."""
        self._restore_training()

    def _call(
        self,
        stretch: Stretch,
        name: str,
        block: torch.nn.Module,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self._require_expected(stretch, name)
        hidden = hidden_of(name, args, kwargs)
        self._require_examples(f"{name} is called with", hidden)
        wants_grad = self._wants_grad.setdefault(stretch.boundary, hidden.requires_grad)
        result, returned = self._run(stretch, name, block, forward, args, kwargs)
        if name == stretch.boundary:
            self._ended.add(name)
            if len(self._ended) == len(self._prefix.stretches):
                self._passed()
            if wants_grad:  # reentrant checkpoints above need an input that does
                return returned(result.detach().requires_grad_())
        return returned(result)

    def _require_expected(self, stretch: Stretch, name: str) -> None:
        if stretch.boundary in self._ended:
            raise InputError(
                f"{name} is called again after {stretch.boundary} has run, expected one forward pass for one "
                "for_batch, which runs each skipped block once"
            )
        autocast = _autocast(self._prefix._device)
        if self._front is None and name == stretch.names[0]:
            self._autocast = autocast
        if autocast != self._autocast:
            raise InputError(
                f"torch.autocast, which was entered inside of for_batch, casts to {autocast}, but to {self._autocast} "
                "before; expected it around for_batch, because what is stored depends on it"
            )
        if collected := _collected():
            raise InputError(
                f"the forward pass collects {collected} of blocks, but skipped blocks give none; expected it to be "
                "off, or no reuse"
            )

    def _require_examples(self, what: str, hidden: torch.Tensor) -> None:
        """UnsupportedModelError unless there is a row for each example, with a column for each token and padding."""
        if self._examples[0].is_batch:
            return
        expected = [len(self._examples)]
        if self._examples[0].num_columns is not None:
            expected.append(self._examples[0].num_columns)
        if list(hidden.shape[: len(expected)]) != expected:
            raise UnsupportedModelError(
                f"{what} hidden states of shape {tuple(hidden.shape)}, expected {tuple(expected)} in front, "
                "the examples of the batch and the columns of attention_mask, to store them one by one; give a "
                "boundary of your own: a module that returns such a tensor"
            )

    def _restore_training(self) -> None:
        while self._in_training:
            vars(self._in_training.pop())["training"] = True


class _Computing(_Pass):
    """Everything runs, the blocks without gradients; ``activations`` are those of each example at each boundary."""

    def __init__(
        self, prefix: Prefix, examples: Sequence[Example], front: Front | None, by_batch: Sequence[str]
    ) -> None:
        super().__init__(prefix, examples, front)
        self.activations: list[dict[str, torch.Tensor]] = [{} for _ in examples]
        self._watch = Watch(prefix.model, prefix._device) if front is None else None
        self._by_batch = by_batch

    @property
    def front(self) -> Front:
        """What runs in front: as it was known, or as it was found in this pass, which has passed."""
        assert self._front is not None
        return self._front

    def _around(self) -> AbstractContextManager[Any]:
        return self._watch or nullcontext()

    def _run(
        self, stretch: Stretch, name: str, block: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        with torch.no_grad(), self._watch.in_block() if self._watch is not None else nullcontext():
            output = forward(*args, **kwargs)
        kind = self._prefix._outputs[name] = Output.of(name, block, output)
        result, others = (output, ()) if isinstance(output, torch.Tensor) else (output[0], output[1:])
        if self._watch is not None and not kind.has_position_bias:
            self._watch.leave_out(name, [item for item in others if item is not None])
        if self._watch is not None:
            self._watch.returned(name, result, is_stored=name == stretch.boundary)
        if name == stretch.boundary:
            self._keep(name, result)
        return result, lambda hidden: hidden if kind.num_items is None else (hidden, *others)

    def _keep(self, boundary: str, result: torch.Tensor) -> None:
        """Copies, because what runs above may change the tensor in place."""
        self._require_examples(f"{boundary} returns", result)
        on_cpu = result.detach().cpu()
        if self._examples[0].is_batch:
            self.activations[0][boundary] = on_cpu.clone()
            return
        for row, (example, its) in enumerate(zip(self._examples, self.activations, strict=True)):
            its[boundary] = on_cpu[row].clone() if example.tokens is None else on_cpu[row, example.tokens]

    def _passed(self) -> None:
        if self._watch is not None:
            found = self._watch.reached(self._prefix.stretches[-1].boundary, self._autocast)
            self._front = found.without(self._prefix._skipped, self._prefix._apart)
            self._prefix._require_constant(self._front, self._by_batch)
        super()._passed()


class _Reusing(_Pass):
    """The blocks do not run: each hands on what it is given, and the last of a stretch returns what is stored."""

    def __init__(
        self, prefix: Prefix, examples: Sequence[Example], front: Front, stored: Sequence[Mapping[str, torch.Tensor]]
    ) -> None:
        super().__init__(prefix, examples, front)
        self._stored = stored

    def _run(
        self, stretch: Stretch, name: str, block: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        hidden = hidden_of(name, args, kwargs)
        result = self._batch(name, hidden) if name == stretch.boundary else hidden
        output = self._prefix._outputs[name]
        return result, lambda handed: output.with_hidden(block, handed, args, kwargs)

    def _batch(self, boundary: str, hidden: torch.Tensor) -> torch.Tensor:
        """``batch_size x ...``, on the device of the hidden states; with zeros at padding that is not stored."""
        rows = [activations[boundary] for activations in self._stored]
        if self._examples[0].is_batch:
            return rows[0].clone().to(hidden.device)  # aligned as what is computed: products round by that
        num_columns = self._examples[0].num_columns
        if num_columns is None:
            return torch.stack(rows).to(hidden.device)
        batch = rows[0].new_zeros(len(rows), num_columns, *rows[0].shape[1:])
        for row, (example, its) in enumerate(zip(self._examples, rows, strict=True)):
            batch[row, example.tokens] = its
        return batch.to(hidden.device)


def _arguments_of(batch: Any) -> Mapping[str, Any]:
    """By name, or by position."""
    if isinstance(batch, Mapping):
        return batch
    listed = batch if isinstance(batch, (tuple, list)) else [batch]
    return {str(position): argument for position, argument in enumerate(listed)}


def _tensor(model: torch.nn.Module, name: str) -> torch.Tensor:
    path, _, own = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(path), own)
    return tensor


def _autocast(device: torch.device) -> torch.dtype | None:
    """The dtype that operators are cast to, or None where they are not."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _collected() -> str | None:
    """What transformers collects of blocks besides hidden states, which a model may ask of a part of its own, to take
    one of them: :class:`Watch` sees which."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    collected = {} if collector is None else collector.get() or {}
    return next((name for name in collected if not name.startswith("_") and name != "hidden_states"), None)
