"""What a profile was made from, and is traced from again at other sizes: a name, or a model that is still there."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from gtflops.errors import InputError
from gtflops.graph import Uses
from gtflops.shapes import Sizes, Traced

if TYPE_CHECKING:
    import torch

    from gtflops.capture.architectures import Architecture
    from gtflops.capture.batches import Loss
    from gtflops.capture.resizing import Layout


_USES: tuple[Uses | None, ...] = (None, "separate")


@dataclass(frozen=True)
class Named:
    """An architecture by its name, built anew for each trace."""

    name: str
    attention: Literal["eager", "sdpa"]
    loss: "Loss | None"
    sizes: Sizes
    uses: Uses | None = None

    def trace(self, sizes: Sizes) -> Traced:
        # torch is loaded when something is traced: a profile that was read from a file needs none until then.
        from gtflops.capture import architecture

        return self.traced(
            architecture(
                self.name,
                batch_size=sizes.batch_size,
                seq_len=sizes.seq_len,
                decoder_len=sizes.decoder_len,
                attention=self.attention,
            )
        )

    def traced(self, built: "Architecture") -> Traced:
        """The step of what was built for it."""
        from gtflops.capture import trace

        captured = trace(built.model, built.batch, self.loss, self.uses)
        return Traced(captured.to_graph(), (*built.notes, *captured.notes))

    def to_json(self, sizes: Sizes) -> dict[str, Any]:
        """What builds the same at ``sizes``, but for the loss."""
        return {
            "name": self.name,
            "attention": self.attention,
            "sizes": [sizes.batch_size, sizes.seq_len, sizes.decoder_len],
            "uses": self.uses,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Named":
        """The inverse of :meth:`to_json`. ValueError on data that it did not write."""
        sizes = Sizes(*data["sizes"])
        uses = data.get("uses")
        if not isinstance(data["name"], str) or data["attention"] not in ("eager", "sdpa") or uses not in _USES:
            raise ValueError(f"{data!r} names no architecture")
        given = [size for size in data["sizes"] if size is not None]
        if sizes.batch_size is None or any(type(size) is not int or size < 1 for size in given):
            raise ValueError(f"{data['sizes']!r} are no sizes")
        return cls(data["name"], data["attention"], None, sizes, uses)


class Live:
    """A model and a batch of the user's.

    The model is not kept alive (its weights may be most of the memory), the batch is: its layout, and whether its masks
    hold padding, cannot be made up. Modules are traced in the mode, training or evaluation, in which they were.
    """

    def __init__(self, model: "torch.nn.Module", batch: Any, loss: "Loss | None", uses: Uses | None = None) -> None:
        self._model = weakref.ref(model)
        self._type = type(model).__name__
        self._batch = batch
        self._loss = loss
        self._uses = uses
        self._has_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._modes = [module.training for module in model.modules()]

    @cached_property
    def _layout(self) -> "Layout":
        from gtflops.capture.resizing import layout_of

        return layout_of(self._batch, has_decoder=self._has_decoder)

    @property
    def sizes(self) -> Sizes:
        return self._layout.sizes

    def profiled(self) -> Traced:
        """The step on the batch itself."""
        return self._trace(self._batch)

    def trace(self, sizes: Sizes) -> Traced:
        return self._trace(self._layout.resized(sizes))

    def _trace(self, batch: Any) -> Traced:
        from gtflops.capture import trace, unsharded
        from gtflops.capture.resizing import modes

        model = self._alive()
        with modes(model, self._modes):
            captured = trace(unsharded(model), batch, self._loss, self._uses)
        notes: tuple[str, ...] = ()
        if any(tensor.is_meta for tensor in model.parameters()):
            notes = ("parameters are on the meta device, where attention runs in its unfused form",)
        return Traced(captured.to_graph(), (*notes, *captured.notes))

    def _alive(self) -> "torch.nn.Module":
        model = self._model()
        if model is None:
            raise InputError(
                f"the {self._type} that was profiled is gone, and a profile keeps no model alive; keep it, or profile "
                "the model again with gtflops.profile(model, batch)"
            )
        return model
