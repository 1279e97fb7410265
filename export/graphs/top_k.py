"""Top-k outputs for a decoder graph, for execution providers whose memory is not the host's.

A decode step returns 51289 logits for each row, of which a search uses the top-k. With these outputs the device finds
them, and only they are copied to the host.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from florence_onnx.bundles.bundle import LOG_SUMS, TOP_IDS, TOP_VALUES

from .files import save

NUM_TOP = 32
"""k. Beam search with 8 beams needs 16 candidates; 16 more may be forbidden before all logits are needed."""

_AXIS = "top_scores/last_axis"
_ZERO = "top_scores/zero"
_ONE = "top_scores/one"
_COUNT = "top_scores/count"


def add_top_k(decoder: Path, target: Path) -> None:
    """Writes a copy of a decoder graph with three more outputs.

    `top_values` `(P, S, k)` float32 and `top_ids` `(P, S, k)` int64 are the k largest logits in descending order and
    their token ids, with k = min(`NUM_TOP`, V). `log_sums` `(P, S)` float32 is log Σ exp(logit - largest logit), so
    that a token's log-probability is `value - largest value - log_sum`.

    Args:
        decoder: The `.onnx` file of a decoder of any precision; its `logits` `(P, S, V)` are float32.
        target: The file to write, in the same folder, since it refers to the same external data.
    """
    model = onnx.load(str(decoder), load_external_data=False)
    logits = next(output for output in model.graph.output if output.name == "logits")
    prompts, length, vocabulary = logits.type.tensor_type.shape.dim
    count = min(NUM_TOP, vocabulary.dim_value)
    model.graph.initializer.extend(
        helper.make_tensor(name, TensorProto.INT64, [1], [value])
        for name, value in ((_AXIS, -1), (_ZERO, 0), (_ONE, 1), (_COUNT, count))
    )
    greatest, shifted, powers, total = (f"top_scores/{name}" for name in ("greatest", "shifted", "powers", "total"))
    model.graph.node.extend(
        [
            helper.make_node("TopK", ["logits", _COUNT], [TOP_VALUES, TOP_IDS], "top_scores/TopK", axis=-1),
            helper.make_node("Slice", [TOP_VALUES, _ZERO, _ONE, _AXIS], [greatest], "top_scores/Slice"),
            helper.make_node("Sub", ["logits", greatest], [shifted], "top_scores/Sub"),
            helper.make_node("Exp", [shifted], [powers], "top_scores/Exp"),
            helper.make_node("ReduceSum", [powers, _AXIS], [total], "top_scores/ReduceSum", keepdims=0),
            helper.make_node("Log", [total], [LOG_SUMS], "top_scores/Log"),
        ]
    )
    sizes = [size.dim_param or size.dim_value for size in (prompts, length)]
    model.graph.output.extend(
        [
            helper.make_tensor_value_info(TOP_VALUES, TensorProto.FLOAT, [*sizes, count]),
            helper.make_tensor_value_info(TOP_IDS, TensorProto.INT64, [*sizes, count]),
            helper.make_tensor_value_info(LOG_SUMS, TensorProto.FLOAT, sizes),
        ]
    )
    save(model, target)
