"""Prices of recurrent layers and cells that run as one operator.

A layer of hidden size H with g gates multiplies each of its P = (time) (batch) positions by its weights, of g H x I and
g H x H: 2 P g H (I + H). Around these products every position costs, for each hidden unit, what ``_CELL`` says.
"""

from collections.abc import Iterable
from math import prod

from gtflops.operators.call import Call, TensorType
from gtflops.operators.cost import Entry, Flops, FlopsByOutput, Kind, entry

#: Gates by cuDNN's mode: ReLU, tanh, LSTM, GRU.
_GATES = (1, 1, 4, 3)

# Elementwise FLOPs a hidden unit and position, without biases.
# RNN: the sum of both products, the activation.
# LSTM: a sum for each gate (4), three sigmoids and a tanh (4), f c + i g (3), o tanh(c) (2).
# GRU: the sums of r and z (2), n = r * hidden + input (2), two sigmoids and a tanh (3), n + z (h - n) (3).
_CELL = (2, 2, 13, 10)

# And of its backward.
# RNN: the derivative of the activation: ReLU a product (1), tanh g (1 - y^2) (3); the next step's gradient is
# added (1).
# LSTM: tanh(c) (1), do (1), dc += dh o (1 - tanh(c)^2) (5), di, dg, df and the former dc (4), the derivatives of four
# activations from their values (3 each), the next step's gradient is added (1).
# GRU: dz = g (h - n) (2), dn = g (1 - z) (2), the former dh (1), dr and the gradient of its factor (2), three
# derivatives (9), the next step's gradient is added (1).
_CELL_BACKWARD = (2, 4, 24, 17)


def lstm_layer(call: Call) -> Flops:
    """One direction of one LSTM layer on the CPU: input of (time, batch, I), weights 4H x I and 4H x H, two biases."""
    positions = prod(call.shape(0)[:-1])
    weights = prod(call.shape(1)) + prod(call.shape(2))
    hidden = call.shape(2)[-1]
    biases = 8 if call.argument(12, "has_biases") else 0
    return Flops(2 * positions * weights, positions * hidden * (_CELL[2] + biases))


def lstm_layer_backward(call: Call) -> Flops:
    """Both gradients of both products, twice the forward's; the gates; the biases' gradient is a sum over positions.

    All seven results are made at once, whichever is asked for, so the operator has one price.
    """
    positions = prod(call.shape(0)[:-1])
    weights = prod(call.shape(1)) + prod(call.shape(2))
    hidden = call.shape(2)[-1]
    biases = 4 if call.argument(17, "has_biases") else 0
    return Flops(4 * positions * weights, positions * hidden * (_CELL_BACKWARD[2] + biases))


def _stacked(call: Call, mode_at: int, layers_at: int, bidirectional_at: int) -> tuple[int, int, int, int, int]:
    """For all layers and directions: mode, positions x weight elements, units x positions, biases x positions, and
    the elements of the weights."""
    mode = call.argument(mode_at, "mode")
    assert isinstance(mode, int)
    weights = call.argument(1, "weight")
    tensors = [weight for weight in weights if isinstance(weight, TensorType)] if isinstance(weights, tuple) else []
    positions = prod(call.shape(0)[:-1])
    matrices = _elements(weight for weight in tensors if len(weight.shape) == 2)
    biases = _elements(weight for weight in tensors if len(weight.shape) == 1)
    hidden = call.argument(mode_at + 1, "hidden_size")
    layers = call.argument(layers_at, "num_layers")
    assert isinstance(hidden, int)
    assert isinstance(layers, int)
    directions = 2 if call.argument(bidirectional_at, "bidirectional") else 1
    return mode, positions * matrices, positions * hidden * layers * directions, positions * biases, matrices


def _elements(weights: Iterable[TensorType]) -> int:
    return sum(weight.numel for weight in weights)


def cudnn_rnn(call: Call) -> Flops:
    """All layers and directions: each weight matrix meets each position; the cells; one addition for each bias."""
    mode, macs, units, biases, _ = _stacked(call, 6, 9, 13)
    return Flops(2 * macs, _CELL[mode] * units + biases)


def cudnn_rnn_backward(call: Call) -> FlopsByOutput:
    """The gradients of input and states are always made: as many multiply-adds as forward, and the cells.

    Those of the weights, once more as many and the sums of the biases, if ``output_mask`` asks for them.
    """
    mode, macs, units, biases, _ = _stacked(call, 10, 13, 17)
    shared = Flops(2 * macs, _CELL_BACKWARD[mode] * units)
    return FlopsByOutput(shared, (Flops(), Flops(), Flops(), Flops(2 * macs, biases)))


def lstm_cell(call: Call) -> Flops:
    """The elementwise part of one step, from (batch, 4H) products of input and state, and two biases."""
    batch, gates = call.shape(0)
    biases = 8 if call.argument(3, "input_bias") is not None else 0
    return Flops(other=batch * (gates // 4) * (_CELL[2] + biases))


def lstm_cell_backward(call: Call) -> Flops:
    """Its backward, and the sum for the biases over the batch."""
    biases = 4 if call.argument(5, "has_bias") else 0
    cells = call.shape(2)
    return Flops(other=prod(cells) * (_CELL_BACKWARD[2] - 1 + biases))


def gru_cell(call: Call) -> Flops:
    """The elementwise part of one step, from (batch, 3H) products of input and state, and two biases."""
    batch, gates = call.shape(0)
    biases = 6 if call.argument(3, "input_bias") is not None else 0
    return Flops(other=batch * (gates // 3) * (_CELL[3] + biases))


def gru_cell_backward(call: Call) -> Flops:
    """Its backward, and the sums for both biases over the batch."""
    biases = 6 if call.argument(2, "has_bias") else 0
    return Flops(other=prod(call.shape(0)) * (_CELL_BACKWARD[3] - 1 + biases))


ENTRIES: tuple[Entry, ...] = (
    entry(Kind.RECURRENT, lstm_layer, "mkldnn_rnn_layer", "2 P 4H (I + H); other: 13 P H (with biases 21 P H)"),
    entry(
        Kind.RECURRENT,
        lstm_layer_backward,
        "mkldnn_rnn_layer_backward",
        "4 P 4H (I + H), all gradients at once; other: 24 P H (with biases 28 P H)",
    ),
    entry(
        Kind.RECURRENT,
        cudnn_rnn,
        "_cudnn_rnn",
        "2 P (elements of the matrices); other: RNN 2, LSTM 13, GRU 10 times P H, and P for a bias element",
    ),
    entry(
        Kind.RECURRENT,
        cudnn_rnn_backward,
        "_cudnn_rnn_backward",
        "shared: as forward, cells 2, 4, 24, 17 P H (ReLU, tanh, LSTM, GRU); weights: as forward, P a bias element",
    ),
    entry(Kind.RECURRENT, lstm_cell, "_thnn_fused_lstm_cell", "13 (batch) H (with biases 21)"),
    entry(Kind.RECURRENT, lstm_cell_backward, "_thnn_fused_lstm_cell_backward_impl", "23 (batch) H (with biases 27)"),
    entry(Kind.RECURRENT, gru_cell, "_thnn_fused_gru_cell", "10 (batch) H (with biases 16)"),
    entry(Kind.RECURRENT, gru_cell_backward, "_thnn_fused_gru_cell_backward", "16 (batch) H (with biases 22)"),
)
