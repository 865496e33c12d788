"""What the backward of a custom ``autograd.Function`` runs: all of it, or what its ``needs_input_grad`` asks for."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from gtflops.capture.recording import Recorder
from gtflops.graph import GETITEM
from gtflops.operators import Call, may_cost


def record_whole(autograd_nodes: Iterable[Any], recorder: Recorder) -> list[str]:
    """Makes each gradient of a custom Function depend on every operator that its backward runs to compute it.

    PyTorch calls such a backward once, whichever gradients are asked for. Most compute all; those that read
    ``ctx.needs_input_grad`` may not, so the backward is rehearsed for each input alone. Returns a list which names,
    after the backward pass, the Functions of which neither holds.
    """
    uncertain: list[str] = []
    for node in autograd_nodes:
        if isinstance(node, BackwardCFunction):
            node.apply = _Backward(node, recorder, uncertain)  # type: ignore[method-assign]
    return uncertain


class _Backward:
    """Stands in for ``apply`` of one autograd node, once."""

    def __init__(self, node: BackwardCFunction, recorder: Recorder, uncertain: list[str]) -> None:
        self._node, self._recorder, self._uncertain = node, recorder, uncertain

    def __call__(self, *gradients: Any) -> Any:
        node, recorder = self._node, self._recorder
        del node.apply  # a cycle otherwise
        alone = self._rehearse(gradients)
        start = len(recorder.records)
        outputs = node.apply(*gradients)
        group = range(start, len(recorder.records))
        if isinstance(outputs, torch.Tensor):
            return self._dependent(outputs, 0, group, alone)
        if not isinstance(outputs, tuple):
            return outputs
        return tuple(
            self._dependent(output, position, group, alone) if isinstance(output, torch.Tensor) else output
            for position, output in enumerate(outputs)
        )

    def _rehearse(self, gradients: tuple[Any, ...]) -> dict[int, Counter[Call]]:
        """The operators that run for one input alone, for each; empty where that cannot be found out."""
        needed = self._node.needs_input_grad
        asked = [position for position, need in enumerate(needed) if need]
        if len(asked) < 2:
            return {}
        alone: dict[int, Counter[Call]] = {}
        state = dict(self._node.__dict__)
        try:
            _ = self._node.saved_tensors  # a checkpoint recomputes them now, not in the rehearsal
            for position in asked:
                # Any length, not the one that torch's annotation says.
                self._node.needs_input_grad = tuple(  # type: ignore[assignment]
                    other == position for other in range(len(needed))
                )
                with self._recorder.rehearsal() as calls:
                    self._node.apply(*gradients)
                alone[position] = _priced(calls)
                _restore(self._node, state)
        except Exception:  # whatever a Function does that is asked an unusual question; it is then taken whole
            self._doubt()
            return {}
        finally:
            self._node.needs_input_grad = needed
            _restore(self._node, state)
        return alone

    def _dependent(
        self, output: torch.Tensor, position: int, group: range, alone: dict[int, Counter[Call]]
    ) -> torch.Tensor:
        """``output`` under a new identity, made after all that runs when this gradient is asked for."""
        recorder = self._recorder
        alias = output.detach()  # a read, which the last write into a buffer comes before
        made = recorder.record_of(alias)
        if position in alone and alone[position] != self._priced(group):
            if alone[position] == self._priced(recorder.ancestors([made.position], group.start)):
                return alias
            self._doubt()
        made.inputs.update(group)
        return alias

    def _priced(self, positions: Iterable[int]) -> Counter[Call]:
        return _priced(self._recorder.records[position].call for position in positions)

    def _doubt(self) -> None:
        name = type(self._node).__name__.removesuffix("Backward")
        if name not in self._uncertain:
            self._uncertain.append(name)


def _restore(node: BackwardCFunction, state: Mapping[str, Any]) -> None:
    """What a Function keeps on its context, which its backward may use up."""
    node.__dict__.clear()
    node.__dict__.update(state)


def asking_in_forward(autograd_nodes: Iterable[Any]) -> list[str]:
    """The custom Functions whose forward reads ``ctx.needs_input_grad``, by name."""
    classes = {getattr(node, "_forward_cls", None) for node in autograd_nodes if isinstance(node, BackwardCFunction)}
    functions: Iterable[Any] = (function for function in classes if function is not None)
    return sorted(
        function.__name__
        for function in functions
        if any(
            "needs_input_grad" in getattr(getattr(method, "__code__", None), "co_names", ())
            for method in (function.forward, function.setup_context)
        )
    )


def _priced(calls: Iterable[Call]) -> Counter[Call]:
    """The operators among ``calls`` that may cost something; views and copies may be made or not."""
    return Counter(call for call in calls if call.op != GETITEM and may_cost(call))
