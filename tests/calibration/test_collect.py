"""Activation ranges are exact, whatever the batches and their order; graphs survive saving and copying."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.paths import ROOT

from export_zoo.base import graph_io
from export_zoo.base.errors import BadInputError
from export_zoo.calibration import collect as collect_module
from export_zoo.calibration.collect import activation_tensors
from export_zoo.calibration.histogram import Histogram
from export_zoo.calibration.images import ImageFile, ImageStream, scan, shuffled
from export_zoo.calibration.preprocess import Preprocess, normalize, read_pixels
from export_zoo.calibration.range_warnings import warnings_of
from export_zoo.calibration.ranges import Ranges, TensorRange

PREPROCESS = Preprocess(
    resize_size=36,
    crop_height=28,
    crop_width=32,
    interpolation="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    source="test",
)
OBSERVED = {
    "image": "",
    "relu1": "stem.act",
    "conv2": "block.conv",
    "relu2": "block.act",
    "pooled": "pool",
    "flat": "",
    "logits": "head",
}
"""Ranges that those of the tiny network must cover, and the modules; `conv1` and `added` fuse with their Relu."""


def tiny_network(path: Path, change=None) -> Path:
    """Conv, Relu, Conv, Add, Relu, pooling and Gemm, with module paths; `change(weights)` may spoil them."""
    rng = np.random.default_rng(0)
    shapes = {
        "stem.weight": (16, 3, 3, 3),
        "stem.bias": (16,),
        "block.weight": (16, 16, 3, 3),
        "block.bias": (16,),
        "head.weight": (5, 16),
        "head.bias": (5,),
    }
    weights = {n: rng.normal(size=s, scale=0.3).astype(np.float32) for n, s in shapes.items()}
    if change is not None:
        change(weights)
    nodes = []

    def node(op_type: str, inputs: str, output: str, module: str = "", **attributes) -> None:
        made = helper.make_node(op_type, inputs.split(), [output], name=f"node_{output}", **attributes)
        if module:
            made.metadata_props.add(key=graph_io.MODULE_KEY, value=module)
        nodes.append(made)

    node("Conv", "image stem.weight stem.bias", "conv1", "stem.conv", pads=[1] * 4)
    node("Relu", "conv1", "relu1", "stem.act")
    node("Conv", "relu1 block.weight block.bias", "conv2", "block.conv", pads=[1] * 4)
    node("Add", "relu1 conv2", "added", "block")
    node("Relu", "added", "relu2", "block.act")
    node("GlobalAveragePool", "relu2", "pooled", "pool")
    node("Flatten", "pooled", "flat")
    node("Gemm", "flat head.weight head.bias", "logits", "head", transB=1)
    save(path, nodes, [numpy_helper.from_array(array, name) for name, array in weights.items()])
    return path


def save(path: Path, nodes, initializers=(), outputs=("logits",)) -> Path:
    """Check and write an opset 18 model whose input is `image`, with the type of every value inferred."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, "height", "width"])
    results = [helper.make_empty_tensor_value_info(name) for name in outputs]
    graph = helper.make_graph(nodes, "tiny", [image], results, list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    return tiny_network(tmp_path_factory.mktemp("network") / "tiny.onnx")


@pytest.fixture(scope="module")
def images(photos: Path) -> list[ImageFile]:
    """25 photographs."""
    return shuffled(scan(photos, option="--calib").images, 0)[:25]


def collect(graph: Path, images, batch_size: int = 8, **options) -> Ranges:
    root = images[0].path.parent
    return collect_module.collect(
        graph, ImageStream(images, PREPROCESS, batch_size, root), threads=1, **options
    )


def session_of(model: onnx.ModelProto | Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def bits(ranges: Ranges) -> dict[str, tuple[str, str]]:
    return {name: (t.min.hex(), t.max.hex()) for name, t in ranges.tensors.items()}


# --- collect


def test_ranges_are_those_of_running_the_graph_with_every_tensor_as_an_output(network, images):
    model = onnx.load(network)
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(value for value in model.graph.value_info if value.name not in known)
    session = session_of(model)
    outputs = [output.name for output in session.get_outputs()]
    assert {"conv1", "added"} < set(outputs)
    seen: dict[str, list[np.ndarray]] = {}
    for image in images:
        pixels = read_pixels(image.path.read_bytes(), PREPROCESS)[0][None]
        feed = {"image": normalize(pixels, PREPROCESS)}
        for name, array in [*feed.items(), *zip(outputs, session.run(None, feed), strict=True)]:
            seen.setdefault(name, []).append(array)
    ranges = collect(network, images)
    assert set(ranges.tensors) == set(OBSERVED)
    for name, found in ranges.tensors.items():
        everything = np.stack(seen[name])
        assert (found.min, found.max) == (float(everything.min()), float(everything.max())), name
        assert found.min < found.max


def test_ranges_name_the_module_of_the_node_that_makes_the_tensor(network, images):
    ranges = collect(network, images[:3])
    assert {name: found.module for name, found in ranges.tensors.items()} == OBSERVED


@pytest.mark.parametrize("batch_size", [1, 2, 7, 24, 64])
def test_ranges_are_the_same_bits_for_any_batch_size(network, images, batch_size):
    assert bits(collect(network, images, batch_size)) == bits(collect(network, images, 8))


def test_ranges_are_the_same_bits_in_any_order_of_images(network, images):
    first = collect(network, images, 6)
    for order in (images[::-1], shuffled(images, 1), sorted(images, key=lambda image: image.name)):
        other = collect(network, order, 6)
        assert bits(other) == bits(first)
        assert other == first


def test_ranges_are_the_same_bits_with_more_threads(network, images):
    stream = ImageStream(images, PREPROCESS, 8, images[0].path.parent)
    assert bits(collect_module.collect(network, stream, threads=2)) == bits(collect(network, images))


def test_another_image_can_only_widen_the_ranges(network, images):
    few, more = collect(network, images[:5]), collect(network, images)
    assert all(more.tensors[n].min <= t.min and t.max <= more.tensors[n].max for n, t in few.tensors.items())
    assert bits(few) != bits(more)


QUANTIZED = ("image", "relu1", "conv2", "relu2", "pooled")


@pytest.mark.parametrize("budget", [1, 100_000, 1 << 28])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_histograms_are_the_same_bits_for_any_batches_and_passes(network, images, batch_size, budget):
    whole = collect(network, images, 8, histograms=QUANTIZED, budget=budget)
    assert {name for name, found in whole.tensors.items() if found.histogram} == set(QUANTIZED)
    other = collect(network, shuffled(images, 3), batch_size, histograms=QUANTIZED, budget=budget)
    assert other == whole


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_histograms_are_the_same_bits_for_any_threads(network, images, threads):
    stream = ImageStream(images, PREPROCESS, 8, images[0].path.parent)
    found = collect_module.collect(network, stream, histograms=QUANTIZED, threads=threads)
    assert found == collect(network, images, 8, histograms=QUANTIZED)


def test_ranges_that_are_known_are_taken_over_and_the_others_observed(network, images):
    names = sorted(collect(network, images).tensors)
    whole = collect(network, images, histograms=names)
    kept = {name: whole.tensors[name].model_copy(update={"max": 1e6}) for name in names[::2]}
    found = collect(network, images, histograms=names, known={**kept, "gone": whole.tensors[names[0]]})
    assert sorted(found.tensors) == names
    for name, tensor in found.tensors.items():
        expected = kept.get(name, whole.tensors[name])
        # Fewer tensors are outputs, so that other operators fuse.
        assert [tensor.min, tensor.max] == pytest.approx([expected.min, expected.max], rel=1e-5)
        assert (tensor == expected) or name not in kept
        assert tensor.histogram


def test_others_may_all_be_zero_if_ranges_are_known(tmp_path, images):
    def silent(weights: dict[str, np.ndarray]) -> None:
        weights["stem.weight"][...], weights["stem.bias"][...] = 0, 0

    path = tiny_network(tmp_path / "graph.onnx", silent)
    names = collect(path, images).tensors
    dead = [name for name, found in names.items() if found.min == found.max == 0]
    assert dead
    known = {name: found for name, found in names.items() if name not in dead}
    assert collect(path, images, histograms=dead, known=known).tensors.keys() == names.keys()
    with pytest.raises(BadInputError, match="all tensors are 0"):
        collect(path, images, histograms=dead)


def test_shards_merge_to_the_bits_of_the_whole(network, images):
    shards = [collect(network, images[start::3], 4, histograms=QUANTIZED) for start in range(3)]
    whole = collect(network, images, 8, histograms=QUANTIZED)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        first, second, third = (shards[index] for index in order)
        assert first.merged(second).merged(third) == whole
        assert first.merged(second.merged(third)) == whole


def test_shards_that_share_images_or_differ_are_not_merged(network, images, tmp_path):
    ranges = collect(network, images[:6])
    with pytest.raises(BadInputError, match="1 images are in both"):
        ranges.merged(collect(network, images[5:9]))
    other = tiny_network(tmp_path / "other.onnx", lambda weights: weights["block.weight"].__imul__(2))
    with pytest.raises(BadInputError, match="graph_sha256 differs"):
        ranges.merged(collect(other, images[6:9]))


def test_all_values_of_small_images_are_counted(network, images):
    ranges = collect(network, images, histograms=QUANTIZED)
    values, counts = Histogram.decode(ranges.tensors["image"].histogram).values()
    assert counts.sum() == len(images) * 3 * 28 * 32
    pixels = np.stack([read_pixels(i.path.read_bytes(), PREPROCESS)[0] for i in images])
    everything = normalize(pixels, PREPROCESS).astype(np.float64)
    assert np.average(values, weights=counts) == pytest.approx(everything.mean(), abs=1e-3)


def test_the_image_that_widens_a_range_is_known(network, images):
    ranges = collect(network, images, 4)
    alone = {image.sha256: collect(network, [image]) for image in images}
    for name, found in ranges.tensors.items():
        sizes = {sha: max(-r.tensors[name].min, r.tensors[name].max) for sha, r in alone.items()}
        widest = max(sizes, key=lambda sha: (sizes[sha], sha))
        assert found.widest == widest
        assert found.others == max(size for sha, size in sizes.items() if sha != widest)


def test_an_image_that_alone_widens_ranges_is_named(network, images, tmp_path):
    from PIL import Image

    dim = []
    for index, image in enumerate(images[:6]):
        path = tmp_path / f"{index}.png"
        gray = Image.open(image.path).convert("RGB").point(lambda value: 116 + value // 60)
        gray.save(path)
        dim.append(ImageFile(path, path.name, hashlib.sha256(path.read_bytes()).hexdigest(), None))
    few = [f"calibrated on {count} images only: 300 to 1,000 are usual" for count in (6, 7)]
    assert warnings_of(collect(network, dim, histograms=QUANTIZED), {}) == few[:1]
    ranges = collect(network, [*dim, images[7]], histograms=QUANTIZED)
    first, second = warnings_of(ranges, {images[7].sha256: "the bright one.jpg"})
    assert first == few[1]
    assert second.startswith("the bright one.jpg alone widens the range of ")


def test_a_tensor_to_be_quantized_that_is_always_zero_is_warned_of_with_its_module(tmp_path, images):
    def dead(weights):
        weights["stem.weight"][...] = 0
        weights["stem.bias"][...] = -1

    graph = tiny_network(tmp_path / "dead.onnx", dead)
    assert collect(graph, images[:3]).tensors["relu1"].max == 0
    told = warnings_of(collect(graph, images[:3], histograms=QUANTIZED), {})[1]
    assert "are 0 on all calibration images, the first at stem.act" in told
    assert "--keep-float stem" in told
    with pytest.raises(BadInputError, match="all tensors are 0 on all calibration images"):
        collect(graph, images[:3], histograms=["relu1"])


def test_ranges_record_where_they_come_from(network, images, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    unreadable = ImageFile(bad, bad.name, hashlib.sha256(b"no image").hexdigest(), None)
    steps: list[int] = []
    ranges = collect(network, [*images, unreadable], progress=steps.append)
    assert ranges.graph_sha256 == hashlib.sha256(network.read_bytes()).hexdigest()
    assert ranges.preprocess == PREPROCESS
    assert ranges.image_sha256 == sorted(image.sha256 for image in images)
    assert ranges.unreadable == ["bad.jpg"]
    assert ranges.versions["onnxruntime"] == ort.__version__
    assert steps == [8, 8, 8, 1]


def test_collecting_leaves_the_graph_and_its_folder_alone(network, images):
    before = {path.name: path.read_bytes() for path in network.parent.iterdir()}
    collect(network, images[:2])
    assert {path.name: path.read_bytes() for path in network.parent.iterdir()} == before


def test_a_graph_with_external_weights_gives_the_same_ranges(network, images, tmp_path):
    files = graph_io.save(graph_io.load(network), tmp_path / "external.onnx", external_threshold=1)
    assert len(files) == 2
    assert bits(collect(files[0], images)) == bits(collect(network, images))


def test_no_usable_image_is_an_error(network, tmp_path):
    with pytest.raises(BadInputError, match="no image could be used") as caught:
        collect_module.collect(network, ImageStream([], PREPROCESS, 8, tmp_path))
    assert str(tmp_path) in caught.value.message


def test_tensors_that_fuse_with_their_reader_or_are_no_floats_have_no_range(tmp_path):
    nodes = [
        helper.make_node("Relu", ["image"], ["first"]),
        helper.make_node("Add", ["first", "image"], ["fuses"]),
        helper.make_node("Relu", ["fuses"], ["second"]),
        helper.make_node("Add", ["second", "image"], ["read twice"]),
        helper.make_node("Relu", ["read twice"], ["third"]),
        helper.make_node("Mul", ["read twice", "third"], ["not fusing"]),
        helper.make_node("Relu", ["not fusing"], ["fourth"]),
        helper.make_node("Add", ["fourth", "image"], ["an output"]),
        helper.make_node("Relu", ["an output"], ["fifth"]),
        helper.make_node("Add", ["fifth", "image"], ["clipped"]),
        helper.make_node("Clip", ["clipped"], ["logits"]),
        helper.make_node("Shape", ["image"], ["integers"]),
    ]
    path = save(tmp_path / "graph.onnx", nodes, outputs=("logits", "an output", "integers"))
    expected = "image/first/second/read twice/third/not fusing/fourth/an output/fifth/logits"
    assert activation_tensors(graph_io.load(path)) == expected.split("/")


def spoiled(path: Path, weight: str, index, value: float) -> Path:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights[weight][index] = value

    return tiny_network(path, change)


def not_finite(graph: Path, images) -> str:
    with pytest.raises(BadInputError) as caught:
        collect(graph, images[:4])
    assert caught.value.exit_code == 5
    assert "is not finite" in caught.value.message
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("weight", "index", "tensor", "module"),
    [
        ("block.weight", ..., "conv2", "block.conv"),
        ("block.bias", ..., "conv2", "block.conv"),
        ("head.weight", ..., "logits", "head"),
        ("head.bias", 0, "logits", "head"),
    ],
)
def test_weights_that_are_not_finite_are_named_by_tensor_and_module(
    tmp_path, images, weight, index, tensor, module, value
):
    message = not_finite(spoiled(tmp_path / "bad.onnx", weight, index, value), images)
    assert f"tensor '{tensor}' (module {module}) is not finite" in message


@pytest.mark.parametrize("index", range(16))
def test_an_infinite_weight_of_one_channel_is_found(tmp_path, images, index):
    message = not_finite(spoiled(tmp_path / "bad.onnx", "block.bias", index, np.inf), images)
    assert "tensor 'conv2' (module block.conv)" in message


@pytest.mark.parametrize(
    ("weight", "index", "tensor", "module"),
    [
        ("block.bias", 7, "conv2", "block.conv"),
        ("block.weight", (15, 3, 1, 1), "conv2", "block.conv"),
        ("stem.weight", (9, 0, 0, 0), "relu1", "stem.act"),
        ("head.weight", (3, 2), "logits", "head"),
        ("head.bias", 4, "logits", "head"),
    ],
)
def test_a_nan_in_one_weight_is_found_and_named_where_it_begins(
    tmp_path, images, weight, index, tensor, module
):
    message = not_finite(spoiled(tmp_path / "bad.onnx", weight, index, np.nan), images)
    assert f"tensor '{tensor}' (module {module}) is not finite" in message


def test_a_tensor_without_a_module_is_named_all_the_same(tmp_path, images):
    weights = numpy_helper.from_array(np.full((1, 3, 1, 1), np.inf, np.float32), "scale")
    path = save(tmp_path / "graph.onnx", [helper.make_node("Mul", ["image", "scale"], ["logits"])], [weights])
    assert "tensor 'logits' (module unknown)" in not_finite(path, images)


MEASURE = """
import sys
from pathlib import Path
from export_zoo.calibration.collect import collect
from export_zoo.calibration.images import ImageStream, scan
from export_zoo.calibration.preprocess import Preprocess

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

graph, folder = map(Path, sys.argv[1:3])
images = scan(folder, option="--calib").images
mean = (0.5, 0.5, 0.5)
preprocess = Preprocess(resize_size=128, crop_height=128, crop_width=128, interpolation="bilinear", mean=mean,
                        std=mean, source="test")
for count in map(int, sys.argv[3:]):
    done = collect(graph, ImageStream(images[:count], preprocess, 4, folder), threads=1, budget=32 << 20)
    assert len(done.image_sha256) == count
    print(peak())
"""


def _peaks(graph: Path, folder: Path, *counts: int) -> list[int]:
    """Peak memory in KiB of a process of its own, after calibrating on so many images in turn."""
    command = [sys.executable, "-c", MEASURE, str(graph), str(folder), *map(str, counts)]
    # Freed blocks go back at once: the tests' own tunables keep them, and glibc's defaults keep up to a pass's memory.
    environment = {
        **os.environ,
        "GLIBC_TUNABLES": f"glibc.malloc.arena_max=2:glibc.malloc.mmap_threshold={1 << 16}",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("layers", ["Conv", "Sigmoid"])
@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_depth_of_the_network(layers, photos, tmp_path):
    """Tensors that are more than the budget are looked at in several passes."""
    from PIL import Image

    for index, path in enumerate(sorted(photos.iterdir())[:16]):
        Image.open(path).convert("RGB").resize((128, 128)).save(tmp_path / f"{index}.bmp")

    def graph(depth: int) -> Path:
        weights = [
            numpy_helper.from_array(np.full((16, count, 1, 1), 0.06, dtype=np.float32), name)
            for name, count in (("widen", 3), ("weight", 16))
        ]
        nodes = [helper.make_node("Conv", ["image", "widen"], ["x0"], name="widen")]
        for index in range(depth):
            inputs = [f"x{index}", "weight"] if layers == "Conv" else [f"x{index}"]
            nodes.append(helper.make_node(layers, inputs, [f"x{index + 1}"], name=f"layer{index}"))
        nodes.append(helper.make_node("GlobalMaxPool", [f"x{depth}"], ["logits"], name="pool"))
        return save(tmp_path / f"{depth}.onnx", nodes, weights)

    (shallow,), (deep,) = _peaks(graph(40), tmp_path, 16), _peaks(graph(240), tmp_path, 16)
    kept = 200 * 16 * 128 * 128 * 4 / 1024  # KiB, were the further layers' tensors of one image all kept
    assert deep - shallow < kept / 4


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_images(photos, tmp_path):
    # Few and small activations: what the runtime's arena takes must not drown what is measured.
    # getrusage's ru_maxrss would start at the peak of this process, which fork() hands down; VmHWM does not.
    from PIL import Image

    sources = [Image.open(path).convert("RGB").resize((140, 140)) for path in sorted(photos.iterdir())[:16]]
    for index in range(256):
        left, top = index // 16 % 12, index // 32
        sources[index % 16].crop((left, top, left + 128, top + 128)).save(tmp_path / f"{index}.bmp")
    nodes = [helper.make_node("Relu", ["image"], ["wide"])]
    nodes += [helper.make_node("GlobalMaxPool", ["wide"], ["logits"])]
    graph = save(tmp_path / "graph.onnx", nodes)
    _, few, many = _peaks(graph, tmp_path, 16, 16, 256)
    retained = 240 * 128 * 128 * 3 / 1024  # KiB, were only the decoded bytes of the other images kept
    assert many - few < retained / 2


# --- ranges


def ranges_of(**tensors: TensorRange) -> Ranges:
    return Ranges(
        graph_sha256="a" * 64,
        preprocess=PREPROCESS,
        image_sha256=["b" * 64, "c" * 64],
        unreadable=["größe/ß.jpg"],
        instruction_set="avx2",
        versions={"onnxruntime": "1.31.1"},
        tensors=tensors,
    )


def test_a_ranges_file_gives_back_what_was_written(network, images, tmp_path):
    ranges = collect(network, images[:5])
    ranges.write(tmp_path / "ranges.json")
    read = Ranges.read(tmp_path / "ranges.json")
    assert read == ranges
    assert bits(read) == bits(ranges)


def test_a_ranges_file_is_exact_for_any_float_and_name(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 500, dtype=np.uint32).view(np.float32)
    values = [float(v) for v in values if np.isfinite(v)] + [0.0, -0.0, 1e-45, 3.4028234663852886e38, 0.1]
    tensors = {f"t{i}": TensorRange(min=-abs(v), max=abs(v)) for i, v in enumerate(values)}
    odd = {'a"b\\c\n': TensorRange(min=-1.5, max=2, module='m"ü'), "": TensorRange(min=0, max=1)}
    ranges = ranges_of(**tensors, **odd)
    ranges.write(tmp_path / "ranges.json")
    read = Ranges.read(tmp_path / "ranges.json")
    assert read == ranges
    assert bits(read) == bits(ranges)


def test_a_ranges_file_without_tensors_can_be_read(tmp_path):
    ranges_of().write(tmp_path / "ranges.json")
    assert Ranges.read(tmp_path / "ranges.json") == ranges_of()


def test_a_ranges_file_is_the_same_bytes_for_any_order_of_tensors(tmp_path):
    one, two = TensorRange(min=0, max=1), TensorRange(min=-1, max=2)
    ranges_of(a=one, b=two).write(tmp_path / "1.json")
    ranges_of(b=two, a=one).write(tmp_path / "2.json")
    text = (tmp_path / "1.json").read_text()
    assert text == (tmp_path / "2.json").read_text()
    assert [line for line in text.splitlines() if '"max": 2' in line] == [
        '  "b": {"min": -1.0, "max": 2.0, "module": "", "widest": "", "others": 0.0, "histogram": "", "channels": ""}'
    ]


def test_an_infinite_range_cannot_be_made():
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="finite"):
            TensorRange(min=0.0, max=value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "null",
        lambda text: text.replace('"schema_version": 1', '"schema_version": 2'),
        lambda text: text.replace('"graph_sha256"', '"graph"'),
        lambda text: text.replace('"min": -1.0', '"min": NaN'),
        lambda text: text.replace('"min": -1.0', '"min": -Infinity'),
        lambda text: text.replace('"min": -1.0', '"min": -1e999'),
        lambda text: text.replace('"min": -1.0', '"min": "low"'),
        lambda text: text.replace('"min": -1.0, ', ""),
        lambda text: text.replace('"channels": ""', '"channels": "AAAA"', 1),
        lambda text: text.replace('"channels": ""', '"channels": "?"', 1),
        lambda text: text.replace('"resize_size": 36', '"resize_size": 0'),
        lambda text: "\xff\xfe\x00" + text,
    ],
)
def test_a_damaged_ranges_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "ranges.json"
    ranges_of(logits=TensorRange(min=-1, max=2)).write(path)
    text = path.read_text(encoding="utf-8")
    damaged = damage(text)
    assert damaged != text
    path.write_bytes(damaged.encode("latin-1", errors="replace"))
    with pytest.raises(BadInputError, match="not a ranges file") as caught:
        Ranges.read(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_range_that_is_upside_down_is_refused(tmp_path):
    path = tmp_path / "ranges.json"
    ranges_of(logits=TensorRange(min=-1, max=2)).write(path)
    path.write_text(path.read_text().replace('"min": -1.0', '"min": 3.0'))
    with pytest.raises(BadInputError):
        Ranges.read(path)


def test_a_missing_ranges_file_is_refused_by_name(tmp_path):
    with pytest.raises(BadInputError, match=r"gone\.json"):
        Ranges.read(tmp_path / "gone.json")


# --- graph_io


@pytest.fixture(scope="module")
def batch(images) -> np.ndarray:
    pixels = [read_pixels(image.path.read_bytes(), PREPROCESS)[0] for image in images[:3]]
    return normalize(np.stack(pixels), PREPROCESS)


def logits(path: Path, batch: np.ndarray) -> bytes:
    return session_of(path).run(["logits"], {"image": batch})[0].tobytes()


def test_a_small_graph_is_saved_as_one_file(network, batch, tmp_path):
    assert graph_io.save(graph_io.load(network), tmp_path / "graph.onnx") == [tmp_path / "graph.onnx"]
    assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"]
    assert graph_io.external_files(tmp_path / "graph.onnx") == []
    assert logits(tmp_path / "graph.onnx", batch) == logits(network, batch)


def test_external_weights_are_named_by_their_hash_and_can_be_copied(network, batch, tmp_path):
    written = tmp_path / "written"
    written.mkdir()
    graph, data = graph_io.save(graph_io.load(network), written / "graph.onnx", external_threshold=1)
    assert graph == written / "graph.onnx"
    assert data == written / f"weights-{hashlib.sha256(data.read_bytes()).hexdigest()[:32]}.bin"
    assert sorted(written.iterdir()) == [graph, data]
    assert data.stat().st_size >= 16 * 16 * 9 * 4
    assert graph.stat().st_size < network.stat().st_size - 16 * 16 * 9 * 4
    assert graph_io.external_files(graph) == [data]

    copied = tmp_path / "copied"
    copied.mkdir()
    for path in (graph, data):
        shutil.copy(path, copied)
    shutil.rmtree(written)
    assert logits(copied / "graph.onnx", batch) == logits(network, batch)
    loaded = graph_io.load(copied / "graph.onnx")
    weight = loaded.graph.initializers["block.weight"].const_value.numpy()
    assert np.array_equal(
        weight, graph_io.load(network).graph.initializers["block.weight"].const_value.numpy()
    )


def test_external_weights_have_the_same_name_wherever_they_are_saved(network, tmp_path):
    names = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        target = tmp_path / folder / f"{folder}.onnx"
        names.append(graph_io.save(graph_io.load(network), target, external_threshold=1)[1].name)
    other = tiny_network(tmp_path / "other.onnx", lambda weights: weights["block.weight"].__imul__(2))
    names.append(graph_io.save(graph_io.load(other), tmp_path / "o.onnx", external_threshold=1)[1].name)
    assert names[0] == names[1] != names[2]


def test_the_threshold_decides_where_the_weights_go(network, tmp_path):
    model = graph_io.load(network)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    assert len(graph_io.save(model, tmp_path / "below.onnx", external_threshold=size + 1)) == 1
    assert len(graph_io.save(graph_io.load(network), tmp_path / "at.onnx", external_threshold=size)) == 2


def test_external_weights_can_be_taken_into_the_graph_again(network, batch, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files = graph_io.save(graph_io.load(network), tmp_path / "a" / "graph.onnx", external_threshold=1)
    moved = graph_io.save(graph_io.load(files[0]), tmp_path / "b" / "graph.onnx", external_threshold=1)
    whole = graph_io.save(graph_io.load(files[0]), tmp_path / "b" / "whole.onnx")
    shutil.rmtree(tmp_path / "a")
    assert moved[1].name == files[1].name
    assert whole == [tmp_path / "b" / "whole.onnx"]
    assert logits(moved[0], batch) == logits(whole[0], batch) == logits(network, batch)


@pytest.mark.parametrize("threshold", [1, graph_io.EXTERNAL_DATA_THRESHOLD])
def test_modules_survive_saving_and_describe_nodes(network, tmp_path, threshold):
    graph_io.save(graph_io.load(network), tmp_path / "graph.onnx", external_threshold=threshold)
    nodes = {node.outputs[0].name: node for node in graph_io.load(tmp_path / "graph.onnx").graph}
    assert graph_io.module_of(nodes["conv2"]) == "block.conv"
    assert graph_io.module_of(nodes["flat"]) == graph_io.module_of(None) == ""
    assert graph_io.describe(nodes["conv2"]) == "Conv 'node_conv2' (module block.conv)"
    assert graph_io.describe(nodes["flat"]) == "Flatten 'node_flat'"


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3_000_000])
def test_sha256_of_is_that_of_the_whole_file(tmp_path, size):
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(data)
    assert graph_io.sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("old", [False, True])
def test_sha256_of_reads_a_file_again_only_if_it_changed(tmp_path, old, monkeypatch):
    """A file that was just written may change without showing it: the file system's clock ticks."""
    monkeypatch.setattr(graph_io, "_TICK_NS", 50_000_000 if old else 10**12)
    path = tmp_path / "file"
    for data in (b"one", b"two"):
        path.write_bytes(data)
        time.sleep(0.1)
        assert graph_io.sha256_of(path) == hashlib.sha256(data).hexdigest()
    monkeypatch.setattr(graph_io, "_HASHES", dict.fromkeys(graph_io._HASHES, "known"))
    assert (graph_io.sha256_of(path) == "known") == old


def test_collections_leave_out_what_lived_before_and_free_the_rest(monkeypatch):
    class Cycle:
        def __init__(self) -> None:
            self.own = self

    monkeypatch.setattr(gc, "get_freeze_count", lambda: 0)  # the tests freeze what they import
    before, after = Cycle(), Cycle()
    gone = [weakref.ref(before), weakref.ref(after)]
    with graph_io.quick_collections():
        after = Cycle()
        gone.append(weakref.ref(after))
        del before, after
        gc.collect()
        assert [found() is None for found in gone] == [False, False, True]
    gc.collect()
    assert [found() is None for found in gone] == [True, True, True]
