"""What `gtflops profile NAME` is held against: imports, the architecture, and PyTorch's trace of its step, no more."""

import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from gtflops.capture import architecture


def bare_trace(name: str) -> torch.fx.GraphModule:
    """The joint graph of forward and backward, by make_fx alone, on a batch of 4 x 512."""
    built = architecture(name, batch_size=4, seq_len=512)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = built.model.to_empty(device="cpu")
        model.tie_weights()
        batch = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in built.batch.items()}

    def step(parameters: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        loss = torch.func.functional_call(model, parameters, (), batch).loss
        return torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

    with mode:
        return make_fx(step)(dict(model.named_parameters()))


if __name__ == "__main__":
    bare_trace(sys.argv[1])
