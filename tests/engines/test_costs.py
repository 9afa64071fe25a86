"""Regions that stay float because that is faster: what they are, which are chosen, and what is timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.layers import PREPROCESS
from support.ranges import ranges_with

from export_zoo.base import graph_io
from export_zoo.base.errors import BadInputError
from export_zoo.calibration.ranges import Ranges, TensorRange
from export_zoo.engines.precision.int8.qdq import quantize
from export_zoo.engines.precision.placement import first_layers
from export_zoo.engines.targets.onnxruntime.costs import (
    DEFAULT,
    FASTER,
    Costs,
    RegionTime,
    faster,
    float_layers,
    ratio,
    regions_of,
    saved,
)
from export_zoo.engines.targets.onnxruntime.placement import INT8_RULES
from export_zoo.engines.targets.onnxruntime.regions import alone

LAYERS = ("stem", "depthwise", "pointwise", "branch", "dense")


def network(path: Path, *, activation: str = "Relu", side: int | str = 12, seed: int = 0) -> Path:
    """stem, depthwise and pointwise convolution, a residual block, and a dense layer."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(
            (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32), name
        )

    nodes = [
        helper.make_node("Conv", ["input", "w0"], ["a"], name="stem", pads=[1] * 4, strides=[2, 2]),
        helper.make_node(activation, ["a"], ["b"], name="active"),
        helper.make_node("Conv", ["b", "w1"], ["c"], name="depthwise", pads=[1] * 4, group=8),
        helper.make_node("Relu", ["c"], ["d"], name="relu1"),
        helper.make_node("Conv", ["d", "w2"], ["e"], name="pointwise"),
        helper.make_node("Relu", ["e"], ["f"], name="relu2"),
        helper.make_node("Conv", ["f", "w3"], ["g"], name="branch"),
        helper.make_node("Add", ["g", "f"], ["h"], name="add"),
        helper.make_node("Relu", ["h"], ["i"], name="relu3"),
        helper.make_node("GlobalAveragePool", ["i"], ["j"], name="mean"),
        helper.make_node("Flatten", ["j"], ["k"], name="flatten"),
        helper.make_node("Gemm", ["k", "w4"], ["logits"], name="dense", transB=1),
    ]
    weights = [
        weight("w0", 8, 3, 3, 3),
        weight("w1", 8, 1, 3, 3),
        weight("w2", 16, 8, 1, 1),
        weight("w3", 16, 16, 1, 1),
        weight("w4", 5, 16),
    ]
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, side, side])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def ranges_of(graph: Path) -> Ranges:
    return ranges_with(
        graph, PREPROCESS, {name: TensorRange(min=-6.0, max=6.0) for name in ["input", *"abcdefghijk"]}
    )


def costs(times: dict[str, tuple[float, float]]) -> Costs:
    """Costs with times in 8 bits and in float of each region, alike for one image and eight."""
    regions = {
        key: {batch: RegionTime(int8=batch * int8, float32=batch * float32) for batch in (1, 8)}
        for key, (int8, float32) in times.items()
    }
    return Costs(onnxruntime="1", instruction_set="any", cpu="any", regions=regions)


def test_regions_are_bounded_by_quantized_tensors_that_all_passes_through(tmp_path):
    graph = graph_io.load(network(tmp_path / "n.onnx")).graph
    found = {(str(r.first.name), str(r.last.name)): r.layers for r in regions_of(graph, frozenset())}
    assert found["input", "b"] == ("stem",)
    assert found["b", "f"] == ("depthwise", "pointwise")
    assert found["f", "i"] == ("branch",), "the shortcut is inside"
    assert found["j", "logits"] == ("dense",)
    assert not {end for pair in found for end in pair} & {"a", "c", "e", "g", "h"}
    assert ("input", "i") not in found, "four parts"


def test_layers_that_stay_float_anyway_are_in_no_region(tmp_path):
    graph = graph_io.load(network(tmp_path / "n.onnx")).graph
    found = regions_of(graph, frozenset({"depthwise"}))
    assert {layer for region in found for layer in region.layers} == set(LAYERS) - {"depthwise"}


def test_a_network_whose_size_is_dynamic_has_no_regions(tmp_path):
    assert regions_of(graph_io.load(network(tmp_path / "n.onnx", side="size")).graph, frozenset()) == []


def test_a_signature_names_operators_and_shapes_and_no_names_or_weights(tmp_path):
    def signatures(**given: object) -> list[str]:
        graph = graph_io.load(network(tmp_path / "n.onnx", **given)).graph
        for node in graph:
            node.name = f"{given}_{node.name}"
        return [region.signature for region in regions_of(graph, frozenset())]

    first = signatures()
    assert signatures(seed=1) == first
    assert first[0] == "image 3x12x12: Conv(x, 8x3x3x3, pads=1,1,1,1, strides=2,2); Relu(0)"
    assert not set(signatures(side=16)) & set(first[:3])
    assert signatures(activation="HardSwish")[0] != first[0]


def test_the_regions_that_save_most_together_stay_float_and_none_overlap(tmp_path):
    graph = graph_io.load(network(tmp_path / "n.onnx")).graph
    key = {r.layers: r.signature for r in regions_of(graph, frozenset())}
    times = {
        key["stem",]: (2.0, 1.5),
        key["depthwise",]: (2.0, 1.5),
        key["stem", "depthwise"]: (4.0, 2.8),
        key["branch",]: (1.0, 0.5),
        key["pointwise", "branch"]: (3.0, 2.6),
    }
    assert float_layers(graph, frozenset(), costs(times)) == ("stem", "depthwise", "branch")
    times[key["stem",]] = (2.0, 1.0)
    times[key["depthwise", "pointwise"]] = (2.0, 1.0)
    assert float_layers(graph, frozenset(), costs(times)) == ("stem", "depthwise", "pointwise", "branch")


@pytest.mark.parametrize(("part", "expected"), [(FASTER - 0.01, ("stem",)), (FASTER + 0.01, ())])
def test_a_region_stays_float_only_if_it_is_a_tenth_faster(part, expected, tmp_path):
    graph = graph_io.load(network(tmp_path / "n.onnx")).graph
    signature = next(r.signature for r in regions_of(graph, frozenset()) if r.layers == ("stem",))
    assert float_layers(graph, frozenset(), costs({signature: (1.0, part)})) == expected


def test_if_all_layers_are_faster_in_float_the_region_that_saves_least_is_quantized(tmp_path):
    graph = graph_io.load(network(tmp_path / "n.onnx")).graph
    single = [region for region in regions_of(graph, frozenset()) if len(region.layers) == 1]
    every = {region.signature: (9.0, 1.0 + (region.layers == ("branch",))) for region in single}
    assert float_layers(graph, frozenset(), costs(every)) == ("stem", "depthwise", "pointwise", "dense")
    assert float_layers(graph, frozenset(set(LAYERS) - {"stem"}), costs(every)) == (), "the only one"


def test_a_region_that_is_slower_in_float_at_one_batch_size_is_quantized():
    faster_alone = {1: RegionTime(int8=2.0, float32=1.0), 8: RegionTime(int8=8.0, float32=8.1)}
    assert ratio(faster_alone) < FASTER
    assert not faster(faster_alone)
    assert faster({**faster_alone, 8: RegionTime(int8=8.0, float32=8.0)})


def test_integers_that_decide_what_an_operator_does_are_in_the_signature(tmp_path):
    def signatures(axes: list[int]) -> list[str]:
        model = graph_io.load(network(tmp_path / "n.onnx"))
        mean = next(node for node in model.graph if node.name == "mean")
        value = ir.Value(name="axes", const_value=ir.tensor(np.array(axes), name="axes"))
        model.graph.initializers["axes"] = value
        new = ir.node("ReduceMean", [mean.inputs[0], value], {"keepdims": 1}, name="mean")
        new.outputs[0].shape, new.outputs[0].type = mean.outputs[0].shape, mean.outputs[0].type
        model.graph.insert_before(mean, [new])
        ir.convenience.replace_all_uses_with(mean.outputs[0], new.outputs[0])
        model.graph.remove(mean, safe=True)
        return [r.signature for r in regions_of(model.graph, frozenset()) if "ReduceMean" in r.signature]

    assert any("[2,3]" in text for text in signatures([2, 3]))
    assert not set(signatures([2, 3])) & set(signatures([3, 2]))


def test_figures_over_batch_sizes_are_the_ratios_mean_and_the_milliseconds_of_an_image():
    times = {1: RegionTime(int8=2.0, float32=1.0), 8: RegionTime(int8=8.0, float32=16.0)}
    assert ratio(times) == pytest.approx(1.0)
    assert saved(times) == pytest.approx((1.0 - 1.0) / 2)
    assert ratio({}) == np.inf


@pytest.mark.parametrize("activation", ["Relu", "HardSwish"])
def test_a_region_alone_computes_what_it_computes_within_the_network(activation, tmp_path):
    """From one cut to the next, in both ways: the 8-bit tensors that come out differ by rounding only."""
    path, out = network(tmp_path / "n.onnx", activation=activation), tmp_path / "int8.onnx"
    quantize(path, ranges_of(path), out, rules=INT8_RULES)
    fp32, int8 = graph_io.load(path), graph_io.load(out)
    image = np.random.default_rng(0).uniform(-1.9, 1.9, (2, 3, 12, 12)).astype(np.float32)
    tried = 0
    for region in regions_of(fp32.graph, frozenset()):
        outputs = []
        for quantized in (True, False):
            model = alone(region, fp32, int8, quantized=quantized)
            session = ort.InferenceSession(
                ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
            )
            (feed,) = session.get_inputs()
            given = image
            if feed.type != "tensor(float)":
                assert feed.type == "tensor(uint8)"
                # Alike for all channels, which the INT8 graph has in another order.
                given = np.random.default_rng(1).integers(96, 160, [2, *feed.shape[1:-1], 1]).astype(np.uint8)
                given = np.broadcast_to(given, [2, *feed.shape[1:]])
            outputs.append(session.run(None, {feed.name: given})[0])
        found, reference = (np.sort(output, axis=-1).astype(float) for output in outputs)
        step = 1.0 if outputs[1].dtype == np.uint8 else 12 / 255
        assert np.ptp(reference) > step, region.signature
        assert np.abs(reference - found).max() <= 4 * step, region.signature
        tried += 1
    assert tried >= 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "not a cost file"),
        ('{"format": 2}', "format"),
        ('{"onnxruntime": "1", "instruction_set": "", "cpu": "", "threads": -5, "regions": {}}', "threads"),
        (
            '{"onnxruntime": "", "instruction_set": "", "cpu": "", "regions": {"x": {"0": {"int8": 2, "float32": 1}}}}',
            "regions",
        ),
        (
            '{"onnxruntime": "", "instruction_set": "", "cpu": "", "regions": {"x": {"1": {"int8": 1e308}}}}',
            "int8",
        ),
        (
            '{"format": 1, "onnxruntime": "1", "instruction_set": "", "cpu": "", "regions": {}, "more": 1}',
            "more",
        ),
        (
            '{"onnxruntime": "1", "instruction_set": "", "cpu": "", "regions": {"x": {"1": {"int8": 0}}}}',
            "int8",
        ),
    ],
)
def test_a_file_that_is_no_cost_file_is_refused_with_its_name(text, said, tmp_path):
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInputError, match=r"mine\.json.*" + said):
        Costs.read(path)


def test_the_default_cost_file_holds_only_regions_that_are_faster_in_float():
    found = Costs.read(DEFAULT).regions
    assert found
    assert all(time.float32 <= time.int8 for times in found.values() for time in times.values())
    assert all(ratio(times) <= FASTER for times in found.values())


def test_a_cost_file_is_read_as_it_was_written(tmp_path):
    written = costs({"3x4x4: Relu(x)": (2.0, 1.0)})
    written.write(tmp_path / "c.json")
    assert Costs.read(tmp_path / "c.json") == written


@pytest.mark.parametrize("activation", ["Relu", "HardSwish"])
def test_first_layers_are_the_first_and_the_depthwise_convolution_behind_it(activation, tmp_path):
    graph = graph_io.load(network(tmp_path / "n.onnx", activation=activation)).graph
    assert first_layers(graph) == ("stem", "depthwise")


def test_without_a_depthwise_convolution_behind_it_there_are_no_first_layers(tmp_path):
    graph = graph_io.load(network(tmp_path / "n.onnx")).graph
    next(node for node in graph if node.name == "depthwise").attributes.pop("group")
    assert first_layers(graph) == ()
