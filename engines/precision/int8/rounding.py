"""Round weights so that a layer's output changes least, instead of rounding each to the nearest integer.

The objective is the output error, (ŵ - w)ᵀ E[x xᵀ] (ŵ - w), of each output channel (Nagel et al. 2020, "Up or Down?
Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568, section 3.2). They relax it and use gradient
descent. Here it is solved greedily, in one pass over the inputs: each input is rounded, and the remaining inputs
compensate for its error (Frantar et al. 2022, "GPTQ", arXiv 2210.17323, section 3). The code uses the equivalent form
of Chee et al. 2023, "QuIP", arXiv 2307.13304, section 3. It needs one Cholesky factor and no inverse. The result is
deterministic. The cost is bounded: inputs³ / 3 operations per layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export_zoo.base.machine import one_blas_thread, usable_cores
from export_zoo.engines.precision.int8.int8_weights import MAX_WEIGHT, quantize_weight
from export_zoo.engines.precision.int8.rules import Int8Rules
from export_zoo.engines.precision.int8.saturation.channel_order import ChannelOrder, choose_order
from export_zoo.engines.precision.int8.saturation.pairs import (
    LARGEST_SUM,
    NONE,
    IndexArray,
    layers_with_partners,
    within_pairs,
)
from export_zoo.engines.precision.placement import weight_of

Int8Array = npt.NDArray[np.int8]
Float64Array = npt.NDArray[np.float64]

DAMPING = 0.01
"""Damping: the fraction of the mean second moment that is added to each. Correlations estimated from few samples are
unreliable."""

LARGEST = 8192
"""Maximum number of inputs of an output channel. Above it, a layer stays rounded to nearest: its matrix would be 512
MiB or more."""

_BLOCK = 128


def round_to_least_error(
    scaled: Float64Array, moments: Float64Array, partners: IndexArray | None = None
) -> Float64Array:
    """Integers for the weights of output channels that read the same inputs.

    Args:
        scaled: weights over their channel's scale, float64 [channels, K].
        moments: second moments of the inputs, float64 [K, K].
        partners: neighbour of each weight, int [K], see `saturation.pairs`. No two neighbours may overflow 16 bits.

    Returns float64 [channels, K], whole numbers from -127 to 127. No channel's error is larger than with nearest
    rounding.
    """
    nearest = np.clip(np.rint(scaled), -MAX_WEIGHT, MAX_WEIGHT)
    if partners is not None:
        nearest = within_pairs(nearest, partners)
    damped = moments + np.eye(len(moments)) * max(DAMPING * np.trace(moments) / len(moments), 1e-12)
    order, second = _order(np.diag(damped), partners)
    # H = (I + U) D (I + U)ᵀ with U strictly upper: the error is a sum of D_k (e_k + sum over j < k of e_j U_jk)². Each
    # term is minimized when its own integer is chosen. In reverse order, this is a Cholesky factor.
    factor = np.linalg.cholesky(damped[np.ix_(order[::-1], order[::-1])])[::-1, ::-1]
    weights = np.diag(factor) ** 2
    feedback = factor / np.diag(factor)
    ordered = scaled[:, order]
    found, errors = np.empty_like(ordered), np.empty_like(ordered)
    widest = np.full(len(scaled), float(MAX_WEIGHT))
    end = 0
    while (start := end) < len(order):
        end = min(start + _BLOCK, len(order))
        end += end < len(order) and bool(second[end])  # do not split a pair
        wanted = ordered[:, start:end] + errors[:, :start] @ feedback[:start, start:end]
        for i in range(start, end):
            target = wanted[:, i - start] + errors[:, start:i] @ feedback[start:i, i]
            low, high = -widest, widest
            if i + 1 < end and second[i + 1]:
                after = wanted[:, i + 1 - start] + errors[:, start:i] @ feedback[start:i, i + 1]
                target = target - _shared_excess(
                    target, after, feedback[i, i + 1], weights[i + 1] / weights[i]
                )
            elif second[i]:
                other = found[:, i - 1]
                low = np.where(other < 0, np.maximum(low, -LARGEST_SUM - other), low)
                high = np.where(other > 0, np.minimum(high, LARGEST_SUM - other), high)
            found[:, i] = np.clip(np.rint(target), low, high)
            errors[:, i] = ordered[:, i] - found[:, i]
    rounded = np.empty_like(found)
    rounded[:, order] = found
    better = output_error(rounded - scaled, moments) < output_error(nearest - scaled, moments)
    return np.where(better[:, None], rounded, nearest)


def round_small_groups(scaled: Float64Array, moments: Float64Array) -> Float64Array:
    """`round_to_least_error` for many groups of a few inputs at once: a depthwise convolution has hundreds.

    Args:
        scaled: weights over their channel's scale, float64 [groups, channels, K].
        moments: second moments of the inputs, float64 [groups, K, K].

    Returns float64 [groups, channels, K].
    """
    size = moments.shape[1]
    nearest = np.clip(np.rint(scaled), -MAX_WEIGHT, MAX_WEIGHT)
    least = np.maximum(DAMPING * np.trace(moments, axis1=1, axis2=2) / size, 1e-12)
    damped = moments + least[:, None, None] * np.eye(size)
    order = np.argsort(-np.diagonal(damped, axis1=1, axis2=2), axis=1, kind="stable")
    turned = order[:, ::-1]
    sorted_moments = np.take_along_axis(
        np.take_along_axis(damped, turned[:, :, None], 1), turned[:, None, :], 2
    )
    factor = np.linalg.cholesky(sorted_moments)[:, ::-1, ::-1]
    feedback = factor / np.diagonal(factor, axis1=1, axis2=2)[:, None, :]
    ordered = np.take_along_axis(scaled, order[:, None, :], 2)
    found, errors = np.empty_like(ordered), np.empty_like(ordered)
    for i in range(size):
        target = ordered[:, :, i] + (errors[:, :, :i] @ feedback[:, :i, i, None])[:, :, 0]
        found[:, :, i] = np.clip(np.rint(target), -MAX_WEIGHT, MAX_WEIGHT)
        errors[:, :, i] = ordered[:, :, i] - found[:, :, i]
    rounded = np.empty_like(found)
    np.put_along_axis(rounded, np.broadcast_to(order[:, None, :], found.shape), found, 2)
    better = output_error(rounded - scaled, moments) < output_error(nearest - scaled, moments)
    return np.where(better[..., None], rounded, nearest)


def _order(
    importance: Float64Array, partners: IndexArray | None
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """The order in which inputs are rounded, and which of them come directly after their partner.

    The most important input comes first, while others can compensate for its error. Within a pair, the more important
    input comes first.
    """
    count = len(importance)
    if partners is None:
        return np.argsort(-importance, kind="stable"), np.zeros(count, dtype=bool)
    paired = partners != NONE
    either = np.where(paired, np.maximum(importance, importance[partners]), importance)
    pair = np.where(paired, np.minimum(np.arange(count), partners), np.arange(count))
    order = np.lexsort((-importance, pair, -either))
    second = np.zeros(count, dtype=bool)
    second[1:] = pair[order][1:] == pair[order][:-1]
    return order, second


def _shared_excess(first: Float64Array, second: Float64Array, feedback: float, ratio: float) -> Float64Array:
    """Reduction of the first of a pair that costs least if both together are too large, float64 [channels].

    Least squares: if the first is `a` less than its target, its error moves the second's target by `a` times
    `feedback`, and the second must give up the rest of the excess. So a² + ratio (excess - a (1 - feedback))² is
    minimized.

    Args:
        first: targets of the first, float64 [channels].
        second: targets of the second if the first had no error, float64 [channels].
        feedback: how the first's error moves the second's target.
        ratio: cost of the second's squared error over that of the first's.
    """
    excess = first + second - np.sign(first) * LARGEST_SUM
    over = (np.sign(first) == np.sign(second)) & (excess * np.sign(first) > 0)
    share = ratio * (1 - feedback) / (1 + ratio * (1 - feedback) ** 2)
    return np.where(over, share * excess, 0.0)


def output_error(difference: Float64Array, moments: Float64Array) -> Float64Array:
    """Mean squared error of each output channel, float64 [..., channels], for weight differences [..., channels, K]."""
    return np.asarray(((difference @ moments) * difference).sum(axis=-1))


def rounding(
    graph: ir.Graph,
    moments: Iterable[tuple[str, Float64Array]],
    rules: Int8Rules,
    *,
    order: ChannelOrder | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Int8Array]:
    """Steps from the nearest integer for each weight of some layers, by node name, int8 in the weight's own shape.

    Each core processes one layer at a time. The result does not depend on the number of cores, to the bit.

    Args:
        moments: second moments of layers' inputs, [groups, K, K] by node name, see
            `calibration.layer_inputs.layer_moments`.
        rules: rules of the target whose scales the weights have.
        order: see `int8.qdq.quantize`.
        progress: called with 1 for each layer done.
    """
    nodes = {str(node.name): node for node in graph}
    partners: dict[str, IndexArray] = {}
    if rules.sums_in_16_bits:
        read = (order or choose_order(graph)).read
        partners = layers_with_partners(graph, read, by_pixel=rules.pairs_by_pixel)

    def steps(name: str, matrices: Float64Array) -> Int8Array:
        rule = weight_of(nodes[name])
        assert rule is not None
        value = nodes[name].inputs[rule.index]
        assert value is not None
        assert value.const_value is not None
        weight = value.const_value.numpy().astype(np.float32)
        nearest, scales, _ = quantize_weight(
            weight, rule.axis, None, np.float32(1), partners=partners.get(name), half=rules.half
        )
        channels = np.moveaxis(weight, rule.axis, 0)
        rows = channels.reshape(len(scales), -1) / scales.astype(np.float64)[:, None]
        groups = rows.reshape(len(matrices), -1, rows.shape[1])
        neighbours = partners.get(name)
        alone = neighbours is None or bool((neighbours == NONE).all())
        if alone and matrices.shape[1] <= _BLOCK:
            integers = round_small_groups(groups, matrices)
        else:
            integers = np.stack(
                [
                    round_to_least_error(group, matrix, neighbours)
                    for group, matrix in zip(groups, matrices, strict=True)
                ]
            )
        rounded = np.moveaxis(integers.reshape(channels.shape), 0, rule.axis)
        return np.clip(rounded - nearest, -127, 127).astype(np.int8)

    found: dict[str, Int8Array] = {}
    running: deque[tuple[str, Future[Int8Array]]] = deque()

    def take() -> None:
        name, future = running.popleft()
        found[name] = future.result()
        progress(1)

    workers = usable_cores()
    with one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        for name, matrices in moments:  # few at a time: they are large
            if len(running) == workers:
                take()
            running.append((name, pool.submit(steps, name, matrices)))
        while running:
            take()
    return found
