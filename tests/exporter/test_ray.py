"""A matrix on a real Ray cluster: three nodes with different resources, on this machine."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from export_zoo.base.errors import EnvironmentFailureError
from export_zoo.base.graph_io import sha256_of
from export_zoo.calibration.images import scan
from export_zoo.exporter.cli.export import read_arguments
from export_zoo.exporter.cluster import ray_cluster
from export_zoo.exporter.cluster.files import Named, Part, content_of, packed
from export_zoo.exporter.cluster.ray_cluster import Needs, RayCluster
from export_zoo.exporter.matrix import cell as cells_of_matrix
from export_zoo.exporter.matrix import cluster_place, plan
from export_zoo.exporter.matrix import run as matrix_run
from export_zoo.exporter.matrix.cluster_place import ClusterPlace, Delivery, Order
from export_zoo.exporter.matrix.results import CellResult, stored
from export_zoo.exporter.publish import failed_place
from export_zoo.exporter.run.at_once import StoppedError
from export_zoo.exporter.stages import evaluate, ranges, shards

ray = pytest.importorskip("ray")

GIB = 1 << 30
SMALL = """\
models: squeezenet1_1
precisions: fp32
targets: onnxruntime
options: {weights: none, input-size: 64, verify-images: 32, batch: "1:2:3"}
"""


@pytest.fixture(scope="module")
def cluster():
    """A head without cores for cells, a node of 2 cores and 3 GiB, and one with what calls itself an H100."""
    import test_ray
    from ray import cloudpickle
    from ray.cluster_utils import Cluster

    cloudpickle.register_pickle_by_value(test_ray)
    found = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "memory": GIB, "object_store_memory": 78 << 20}
    )
    small = {"object_store_memory": 78 << 20}
    found.add_node(num_cpus=2, memory=3 * GIB, **small)
    found.add_node(num_cpus=1, num_gpus=1, memory=GIB, resources={"accelerator_type:H100": 1}, **small)
    ray.init(address=found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


def cell(tmp_path: Path, model: str = "squeezenet1_1", **changes: object) -> plan.Cell:
    path = tmp_path / "m.yaml"
    path.write_text(SMALL)
    names = plan.Names(("squeezenet1_1",))
    (found,) = plan.cells(path, plan.read(path), names, read_arguments)
    return dataclasses.replace(found, model=model, **changes)


def ended(order: Order, **fields: object) -> CellResult:
    one = order.cell
    versions = cells_of_matrix.versions(one)
    return CellResult(one.model, one.target, one.precision, (), "ok", versions=versions, **fields)


def where(places, order) -> Delivery:
    """Tells where it ran, and with which GPU."""
    resources = ray.get_runtime_context().get_assigned_resources()
    return Delivery(
        ended(order, machine=str(sorted(resources)), warnings=(order.accelerator,)), packed(Path())
    )


def run(tmp_path: Path, task, cells: list[plan.Cell], expected: int = GIB // 2, **options: object):
    place = ClusterPlace(RayCluster(None), cores=2, task=task)
    return matrix_run.run(
        cells, tmp_path / "out", seconds=300, place=place, expected=lambda _: expected, **options
    )


def test_an_export_that_failed_leaves_an_earlier_bundle(tmp_path):
    bundle, node = tmp_path / "x.bundle", tmp_path / "node"
    failed = failed_place(bundle)
    for folder, text in ((bundle, "good"), (failed, "old"), (node / failed.name, "new")):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(text)
    cluster_place._deliver(packed(node, failed.name), bundle)
    texts = [(place / "manifest.json").read_text() for place in (bundle, failed)]
    assert texts == ["good", "new"]
    assert sorted(tmp_path.iterdir()) == sorted([bundle, failed, node])


def test_a_cell_gets_cores_memory_and_the_first_of_its_accelerators_that_there_is(cluster, tmp_path):
    plain, h100 = cell(tmp_path), cell(tmp_path, "vgg11", accelerators=("H200", "H100"))
    first, second = run(tmp_path, where, [plain, h100])
    assert "GPU" not in first.machine
    assert "accelerator_type:H100" in second.machine
    assert second.warnings == ("H100",)


@pytest.mark.parametrize(
    ("accelerators", "expected", "said"),
    [
        (("H200", "A100"), GIB, "no node of the cluster has a H200 or A100"),
        ((), 5 * GIB, "expected to take 5.0 GiB of memory, the largest node has 3.0 GiB"),
        (("H100",), 2 * GIB, "expected to take 2.0 GiB of memory, the largest node has 1.0 GiB"),
    ],
)
def test_a_cell_that_no_node_can_ever_take_is_told_at_once(accelerators, expected, said, cluster, tmp_path):
    began = time.monotonic()
    (result,) = run(tmp_path, where, [cell(tmp_path, accelerators=accelerators)], expected)
    assert result.status == "failed"
    assert said in result.reason
    assert time.monotonic() - began < 30


def test_a_node_whose_gpu_is_another_builds_nothing(cluster, tmp_path):
    (result,) = run(tmp_path, cluster_place.run_on_node, [cell(tmp_path, accelerators=("H100",))])
    assert result.status == "failed"
    assert "calls itself H100; its GPU is absent" in result.reason


@pytest.mark.parametrize(
    ("kind", "device", "same"),
    [
        ("H100", "NVIDIA H100 80GB HBM3, 9.0", True),
        ("A100-80G", "NVIDIA A100-SXM4-80GB, 8.0", True),
        ("A100-40G", "NVIDIA A100-SXM4-80GB, 8.0", False),
        ("A10", "NVIDIA A100-SXM4-80GB, 8.0", False),
        ("L4", "NVIDIA L40S, 8.9", False),
        ("H100", "NVIDIA H100 80GB HBM3, 8.9", False),
        ("RTX5090", "NVIDIA RTX5090, 12.0", True),
        ("H100", None, False),
    ],
)
def test_a_gpu_is_what_the_node_calls_it_by_name_and_compute_capability(kind, device, same):
    assert (cluster_place.why_not_accelerator(kind, device) == "") == same


def dies_once(places, order) -> Delivery:
    mark = Path(dict(a.partition("=")[::2] for a in order.cell.arguments)["--mark"])
    if order.cell.model == "dies" and len([*mark.glob("*")]) < 1:
        (mark / str(os.getpid())).touch()
        os._exit(1)
    return Delivery(ended(order), packed(Path()))


def dies_always(places, order) -> Delivery:
    if order.cell.model == "dies":
        os._exit(1)
    return Delivery(ended(order), packed(Path()))


def raises(places, order) -> Delivery:
    raise ValueError("a fault of ours")


def test_cells_whose_worker_dies_run_again_and_the_others_go_on(cluster, tmp_path):
    (tmp_path / "mark").mkdir()
    arguments = (f"--mark={tmp_path / 'mark'}",)
    cells = [cell(tmp_path, model, arguments=arguments) for model in ("dies", "squeezenet1_1")]
    assert [result.status for result in run(tmp_path, dies_once, cells)] == ["ok", "ok"]
    assert len([*(tmp_path / "mark").iterdir()]) == 1


def test_a_cell_whose_worker_always_dies_fails_after_three_and_the_others_go_on(cluster, tmp_path):
    first, second = run(tmp_path, dies_always, [cell(tmp_path, "dies"), cell(tmp_path)])
    assert (first.status, second.status) == ("failed", "ok")
    assert "its node or worker died 3 times" in first.reason


def test_a_fault_of_a_task_is_told_and_not_tried_again(cluster, tmp_path):
    (result,) = run(tmp_path, raises, [cell(tmp_path)])
    assert result.status == "failed"
    assert "a fault of ours" in result.reason


def large(places, order) -> Delivery:
    return Delivery(ended(order), packed(Path(order.cell.arguments[0]), order.bundle))


def test_a_bundle_larger_than_the_object_store_comes_back(cluster, tmp_path):
    one = cell(tmp_path, arguments=(str(tmp_path / "made"),))
    (tmp_path / "made" / one.bundle).mkdir(parents=True)
    (tmp_path / "made" / one.bundle / "weights").write_bytes(os.urandom(100 << 20))
    (result,) = run(tmp_path, large, [one])
    assert result.status == "ok", result.reason
    assert (tmp_path / "out" / "bundles" / one.bundle / "weights").stat().st_size == 100 << 20


def reads(places) -> dict[str, str]:
    """Tells where the node has what is wanted, and its texts."""
    return {
        place: "".join(
            path.read_text() for path in sorted([Path(place), *Path(place).rglob("*")]) if path.is_file()
        )
        for place in places
    }


def test_a_file_is_read_where_it_is_and_travels_where_it_is_not(cluster, tmp_path, monkeypatch):
    weights, images, found = tmp_path / "best.pth", tmp_path / "images", RayCluster(None)
    weights.write_text("these")
    images.mkdir()
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        (images / name).write_text(name)
    part = Part(str(images), {name: sha256_of(images / name) for name in ("1.jpg", "3.jpg")})
    wanted, needs = [Named.of(weights), Named.of(images), part], Needs(GIB // 2, 1)
    here = found.run(reads, needs=needs, wanted=wanted)
    assert here == {str(weights): "these", str(images): "1.jpg2.jpg3.jpg"}
    # As on a node that has another file there, and an image more, and no part of the folder.
    elsewhere = [Named(str(tmp_path / "no" / "best.pth"), wanted[0].content)]
    elsewhere += [
        Named(str(tmp_path / "no" / "images"), wanted[1].content),
        Part(str(tmp_path / "no"), part.files),
    ]
    monkeypatch.setattr(Named, "pack", lambda self: packed(tmp_path, Path(self.path).name))
    monkeypatch.setattr(Part, "pack", lambda self: packed(images, *self.files))
    there = found.run(reads, needs=needs, wanted=elsewhere)
    assert [*there.values()] == ["these", "1.jpg2.jpg3.jpg", "1.jpg3.jpg"]
    kept, folder, once = map(Path, there)
    assert kept.parent.name == content_of(weights)
    assert folder.exists()
    assert not once.exists()


def test_a_node_with_another_version_is_named_before_anything_runs(cluster, monkeypatch):
    monkeypatch.setattr(ray_cluster, "__version__", "9.9.9")
    with pytest.raises(EnvironmentFailureError, match=r"node \S+ .* has export-zoo .*, this machine 9\.9\.9"):
        RayCluster(None)


def waits(places, order) -> Delivery:
    Path(order.cell.arguments[0]).touch()
    for _ in range(3000):
        time.sleep(0.1)  # as `process._watch`
    raise AssertionError


def test_ctrl_c_ends_the_tasks(cluster, tmp_path):
    cluster_ = RayCluster(None)
    place = ClusterPlace(cluster_, cores=2, task=waits)
    began = tmp_path / "began"
    one = cell(tmp_path, arguments=(str(began),))
    real = cluster_._wait

    def wait(reference):
        while not began.exists():
            time.sleep(0.1)
        place.stop()
        return real(reference)

    cluster_._wait = wait
    with pytest.raises(StoppedError):
        matrix_run.run([one], tmp_path / "out", seconds=300, place=place, expected=lambda _: GIB // 2)
    for _ in range(300):
        free = ray.available_resources().get("CPU", 0)
        if free == ray.cluster_resources()["CPU"]:
            return
        time.sleep(0.2)
    pytest.fail("the task still runs")


def waits_once(places, order) -> Delivery:
    mark = Path(order.cell.arguments[0])
    here = ray.get_runtime_context().get_node_id()
    if not mark.exists():
        mark.write_text(here)
        for _ in range(3000):
            time.sleep(0.1)
    return Delivery(ended(order, warnings=(here,)), packed(Path()))


def test_a_node_that_dies_in_the_middle_gives_its_cells_to_another(cluster, tmp_path):
    given = {"num_cpus": 1, "num_gpus": 1, "memory": GIB, "resources": {"accelerator_type:L4": 1}}
    nodes = [cluster.add_node(**given) for _ in range(2)]
    cluster.wait_for_nodes()
    mark = tmp_path / "mark"
    one = cell(tmp_path, arguments=(str(mark),), accelerators=("L4",))
    found: list[CellResult] = []
    running = threading.Thread(target=lambda: found.extend(run(tmp_path, waits_once, [one])))
    running.start()
    while not (mark.exists() and mark.read_text()):
        time.sleep(0.1)
    first = next(node for node in nodes if node.node_id == mark.read_text())
    cluster.remove_node(first, allow_graceful=False)
    running.join(timeout=120)
    (result,) = found
    assert result.status == "ok", result.reason
    assert result.warnings == (next(node.node_id for node in nodes if node is not first),)


def test_a_calibration_in_shards_has_the_bytes_of_one_on_one_machine(cluster, cli, digits, tmp_path):
    arguments = [*digits.arguments(), "--calib", digits.images]
    assert cli("calibrate", *arguments, "--out", tmp_path / "one.json").code == 0
    for count in (1, 3, 7):
        given = ["--no-cache", "--on", "ray", "--shards", count, "--out", tmp_path / f"{count}.json"]
        told = cli("calibrate", *arguments, *given)
        assert told.code == 0, told.err
        assert (tmp_path / f"{count}.json").read_bytes() == (tmp_path / "one.json").read_bytes()


def waits_at_first(mark: Path, places, order, threads, progress):
    """The task of a shard; the first that runs waits for its node to die."""
    from export_zoo.exporter.stages import ranges

    try:
        with mark.open("x") as file:
            file.write(ray.get_runtime_context().get_node_id())
        time.sleep(300)
    except FileExistsError:
        return ranges._collect(places, order, threads, progress)
    raise AssertionError


def test_a_calibration_goes_on_when_a_node_dies(cluster, cli, digits, tmp_path, monkeypatch):
    arguments, mark = [*digits.arguments(), "--calib", digits.images], tmp_path / "mark"
    assert cli("calibrate", *arguments, "--out", tmp_path / "one.json").code == 0
    cluster.add_node(num_cpus=2, memory=3 * GIB)
    cluster.wait_for_nodes()
    monkeypatch.setattr(ranges, "_collect", partial(waits_at_first, mark))
    found = []
    given = ["--no-cache", "--on", "ray", "--shards", "4", "--out", tmp_path / "s.json"]
    running = threading.Thread(target=lambda: found.append(cli("calibrate", *arguments, *given)))
    running.start()
    while not (mark.exists() and mark.read_text()):
        time.sleep(0.1)
    (first,) = (node for node in cluster.list_all_nodes() if node.node_id == mark.read_text())
    cluster.remove_node(first, allow_graceful=False)
    running.join(timeout=120)
    assert found[0].code == 0, found[0].err
    assert (tmp_path / "s.json").read_bytes() == (tmp_path / "one.json").read_bytes()


def test_nodes_whose_ranges_could_differ_are_refused_before_the_export(
    cluster, cli, digits, tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "facts", other_machine)
    given = ["--no-cache", "--on", "ray", "--out", tmp_path / "s.json"]
    cluster.add_node(num_cpus=1, memory=GIB)
    cluster.wait_for_nodes()
    done = cli("calibrate", *digits.arguments(), "--calib", digits.images, *given)
    assert done.code == 7
    assert "results of shards could not be merged" in done.json["error"]["message"]


def other_machine() -> dict[str, str]:
    """As on nodes of which each has its own kind of CPU."""
    return {"instruction set": ray.get_runtime_context().get_node_id()}


def test_an_error_of_a_shard_is_told_as_on_one_machine(cluster, cli, digits, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(scan(digits.images, option="--calib").images[:64]):
        data = image.path.read_bytes()
        (folder / f"{index}.png").write_bytes(data[: len(data) // 2] if index % 2 else data)
    arguments = [*digits.arguments(), "--calib", folder, "--out", tmp_path / "x.json"]
    for more in ((), ("--on", "ray", "--shards", "2")):
        done = cli("calibrate", *arguments, *more)
        assert done.code == 5, done.err
        assert "image files cannot be read" in done.json["error"]["message"]
        assert "up to 10%" in done.json["error"]["hint"]


def test_engines_are_compared_in_shards_with_the_figures_of_one_machine(
    cluster, cli, digits, tmp_path, monkeypatch
):
    """The last bits of PyTorch's logits depend on its threads: two here, as on a node."""
    monkeypatch.setattr(evaluate, "SHARD", 256)
    monkeypatch.setattr(shards.Here, "threads", 2)
    given = [
        *digits.arguments("squeezenet1_1"),
        "--no-cache",
        "--verify",
        digits.images,
        "--verify-images",
        "700",
    ]
    one = cli(*given, "--out", tmp_path / "one")
    many = cli(*given, "--on", "ray", "--out", tmp_path / "many")
    assert (one.code, many.code) == (0, 0), many.err
    assert "1 engine(s) on 700 images in 3 shard(s)" in many.err
    assert many.json["engines"][0]["gate"]["metrics"] == one.json["engines"][0]["gate"]["metrics"]


def test_a_run_whose_driver_is_killed_continues(cluster, tmp_path):
    """One cell is done and another runs when the driver dies; its task dies with it, and the next run has one to do."""
    (tmp_path / "m.yaml").write_text(SMALL.replace("squeezenet1_1", "[squeezenet1_1, mnasnet0_5]"))
    command = [sys.executable, "-m", "export_zoo", "matrix", str(tmp_path / "m.yaml"), "--on", "ray"]
    command += ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "result.json")]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    results = tmp_path / "out" / "results"
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as driver:
        while not [*results.glob("*.json")]:
            assert driver.poll() is None
            time.sleep(0.1)
        driver.kill()
    done = sorted(path.name for path in results.glob("*.json"))
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert again.returncode == 0, again.stderr
    lines = [line for line in again.stderr.splitlines() if line.startswith("[")]
    assert len(lines) == 2
    assert sum("(earlier run)" in line for line in lines) == len(done)
    found = stored(results)
    assert {result.engine["state"] for result in found.values()} == {"verified"}
    bundles = tmp_path / "out" / "bundles"
    assert sorted(path.name for path in bundles.iterdir()) == sorted(f"{name}.bundle" for name in found)
    assert all((path / "manifest.json").exists() for path in bundles.iterdir())
