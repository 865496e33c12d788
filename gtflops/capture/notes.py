"""What a trace cannot know: where a real step may differ from what is predicted, in words."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from gtflops.capture.recording import Record, Recorder
from gtflops.capture.requires_grad import RequiresGradMode
from gtflops.graph import GETITEM, Phase
from gtflops.operators import may_cost

_WITH_FAST_PATH = (torch.nn.TransformerEncoder, torch.nn.TransformerEncoderLayer, torch.nn.MultiheadAttention)


def notes_of(
    model: torch.nn.Module,
    parameters: Mapping[str, torch.Tensor],
    *,
    uncertain: Sequence[str],
    asking: Sequence[str],
    requires_grad: RequiresGradMode,
    recorder: Recorder,
    results: Iterable[int],
) -> tuple[str, ...]:
    """Where the closure of a selection may not be what autograd executes.

    ``parameters`` are the user's own, not those that stand in for them. ``uncertain`` and ``asking`` name custom
    Functions: those whose backward could not be taken apart, and those whose forward asks which gradients are needed.
    ``results`` are the positions of all gradients among the records.
    """
    notes = [
        f"the backward of the custom autograd.Function {name} computes neither all gradients nor just those that are "
        "asked for, or cannot be tried for one alone; it is taken to compute all"
        for name in uncertain
    ]
    notes += [
        f"the forward of the custom autograd.Function {name} reads ctx.needs_input_grad: its operators are those of "
        "everything trained"
        for name in asking
    ]
    if requires_grad.trained_masks:
        notes.append(
            f"{requires_grad.trained_masks} calls of scaled_dot_product_attention have a mask that is trained, for "
            "which PyTorch takes unfused operators; where the mask is frozen it may take a fused kernel, whose "
            "backward costs one product more"
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        notes.append("parts of the model are TorchScript, which chooses operators by requires_grad as it warms up")
    if requires_grad.made:
        notes.append(
            "the code makes tensors require gradients that are no parameters (enable_input_require_grads does): the "
            "backward pass runs down to them whatever is trained"
        )
    if requires_grad.asked:
        notes.append(
            f"the code asks whether tensors require gradients, at {', '.join(requires_grad.asked)}: the operators are "
            "those of everything trained; a selection may take another branch there, such as a fast path"
        )
    if torch.backends.mha.get_fastpath_enabled() and any(
        isinstance(module, _WITH_FAST_PATH) and not module.training for module in model.modules()
    ):
        notes.append(
            "in evaluation mode, layers of torch.nn.TransformerEncoder and MultiheadAttention in which nothing is "
            "trained may run as one fused operator (torch.backends.mha.set_fastpath_enabled(False) prevents it); the "
            "operators here are the separate ones"
        )
    if recorder.values.asked_random:
        notes.append("the code branches on random numbers (dropped layers): the operators are those of one draw")
    if recorder.values.asked:
        notes.append("the code asks for values of the batch: the operators are those of the batch that was given")
    if renamed := sum(_is_renamed_if_frozen(record) for record in recorder.records):
        notes.append(
            f"{renamed} operators have another name, at the same FLOPs, where the tensor that they take is frozen: mm, "
            "a product by a matrix, may be bmm, a batch of products; _embedding_bag is _embedding_bag_forward_only"
        )
    if vectors := sum(_is_folded(record, torch.ops.aten.mv.default) for record in recorder.records):
        notes.append(
            f"{vectors} products with a trained vector are one product (mv); where the vector is frozen they may be a "
            "batch of products (bmm), whose gradients cost more"
        )
    needed = recorder.ancestors(results)
    if hook_work := sum(
        record.phase is Phase.BACKWARD
        and record.call.op != GETITEM
        and record.position not in needed
        and may_cost(record.call)
        for record in recorder.records
    ):
        notes.append(
            f"{hook_work} operators of the backward pass serve no gradient (hooks on activations or modules that "
            "compute something): no selection counts them"
        )
    if any(record.target is torch.ops.aten.mkldnn_rnn_layer.default for record in recorder.records):
        notes.append("activation bytes are without the scratch memory of mkldnn_rnn_layer, which only the kernel knows")
    hooked = [
        name
        for name, tensor in parameters.items()
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None)
    ]
    if hooked:
        notes.append(f"hooks on gradients are not run in a trace, nor priced: {len(hooked)} tensors, first {hooked[0]}")
    complex_tensors = [name for name, tensor in parameters.items() if tensor.is_complex()]
    if complex_tensors:
        notes.append(f"complex tensors are taken as frozen: {len(complex_tensors)}, first {complex_tensors[0]}")
    return tuple(notes)


def _is_renamed_if_frozen(record: Record) -> bool:
    """Whether PyTorch chooses this operator because a tensor requires a gradient.

    ``torch.matmul`` copies its left side to make one product of a batch of them, if the right side is trained.
    """
    return record.target is torch.ops.aten._embedding_bag.default or _is_folded(record, torch.ops.aten.mm.default)


def _is_folded(record: Record, product: Any) -> bool:
    """Whether this is a product of whose left side a batch was copied into one piece."""
    if record.phase is not Phase.FORWARD or record.target is not product:
        return False
    left = record.args[0]
    if left.target is not torch.ops.aten._unsafe_view.default:
        return False
    copied = left.args[0]
    return copied.target is torch.ops.aten.clone.default and len(copied.call.output.shape) > 2
