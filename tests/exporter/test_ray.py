"""A matrix on a real Ray cluster: three nodes with different resources, on this machine."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from pathlib import Path

import pytest

from export_zoo.base.errors import EnvironmentFailureError
from export_zoo.exporter.cli.export import read_arguments
from export_zoo.exporter.matrix import plan
from export_zoo.exporter.matrix import run as matrix_run
from export_zoo.exporter.matrix.inputs import content_of
from export_zoo.exporter.matrix.results import CellResult, stored
from export_zoo.exporter.publish import failed_place

ray = pytest.importorskip("ray")

from export_zoo.exporter.matrix import ray_cluster  # noqa: E402
from export_zoo.exporter.matrix.ray_cluster import RayCluster, _Delivery, _packed  # noqa: E402

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


def ended(order: ray_cluster._Order, **fields: object) -> CellResult:
    one = order.cell
    versions = ray_cluster.cells.versions(one)
    return CellResult(one.model, one.target, one.precision, (), "ok", versions=versions, **fields)


def where(order, inputs) -> _Delivery:
    """Tells where it ran, and with which GPU."""
    resources = ray.get_runtime_context().get_assigned_resources()
    return _Delivery(
        ended(order, machine=str(sorted(resources)), warnings=(order.accelerator,)), _packed(Path())
    )


def run(tmp_path: Path, task, cells: list[plan.Cell], expected: int = GIB // 2, **options: object):
    place = RayCluster(None, cores=2, task=task)
    return matrix_run.run(
        cells, tmp_path / "out", seconds=300, place=place, expected=lambda _: expected, **options
    )


def test_a_real_cell_runs_on_a_node_and_its_bundle_comes_back(cluster, tmp_path):
    one = cell(tmp_path)
    place = RayCluster(None, cores=2)
    (result,) = matrix_run.run([one], tmp_path / "out", seconds=300, place=place, expected=lambda _: GIB)
    assert result.status == "ok", result.reason
    assert result.engine["state"] == "verified"
    assert (tmp_path / "out" / "bundles" / one.bundle / "manifest.json").exists()
    assert stored(tmp_path / "out" / "results") == {one.name: result}
    told: list[bool] = []
    again = matrix_run.run(
        [one], tmp_path / "out", seconds=1, place=place, done=lambda _, cached: told.append(cached)
    )
    assert (again, told) == ([result], [True])


def test_an_export_that_failed_leaves_an_earlier_bundle(tmp_path):
    bundle, node = tmp_path / "x.bundle", tmp_path / "node"
    failed = failed_place(bundle)
    for folder, text in ((bundle, "good"), (failed, "old"), (node / failed.name, "new")):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(text)
    ray_cluster._deliver(_packed(node, failed.name), bundle)
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
    (result,) = run(tmp_path, ray_cluster._run_on_node, [cell(tmp_path, accelerators=("H100",))])
    assert result.status == "failed"
    assert "calls itself H100; its GPU is absent" in result.reason


def dies_once(order, inputs) -> _Delivery:
    mark = Path(dict(a.partition("=")[::2] for a in order.cell.arguments)["--mark"])
    if order.cell.model == "dies" and len([*mark.glob("*")]) < 1:
        (mark / str(os.getpid())).touch()
        os._exit(1)
    return _Delivery(ended(order), _packed(Path()))


def dies_always(order, inputs) -> _Delivery:
    if order.cell.model == "dies":
        os._exit(1)
    return _Delivery(ended(order), _packed(Path()))


def raises(order, inputs) -> _Delivery:
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


def large(order, inputs) -> _Delivery:
    return _Delivery(ended(order), _packed(Path(order.cell.arguments[0]), order.bundle))


def test_a_bundle_larger_than_the_object_store_comes_back(cluster, tmp_path):
    one = cell(tmp_path, arguments=(str(tmp_path / "made"),))
    (tmp_path / "made" / one.bundle).mkdir(parents=True)
    (tmp_path / "made" / one.bundle / "weights").write_bytes(os.urandom(100 << 20))
    (result,) = run(tmp_path, large, [one])
    assert result.status == "ok", result.reason
    assert (tmp_path / "out" / "bundles" / one.bundle / "weights").stat().st_size == 100 << 20


def reads(order, inputs) -> _Delivery:
    """Tells where the node has the file that the cell names."""
    found = {
        path: ray_cluster._here(path, content, lambda path=path: bytes(ray.get(inputs[path][0])))
        for path, content in order.contents.items()
    }
    texts = [Path(place).read_text() for place in found.values()]
    return _Delivery(ended(order, warnings=(*found.values(), *texts)), _packed(Path()))


def elsewhere(order, inputs) -> _Delivery:
    """As on a node that has another file there."""
    for path in order.contents:
        Path(path).write_text("another")
    return reads(order, inputs)


def test_a_file_is_read_where_it_is_and_travels_where_it_is_not(cluster, tmp_path, monkeypatch):
    weights = tmp_path / "best.pth"
    weights.write_text("these")
    one = cell(tmp_path, arguments=(f"--weights={weights}",))
    (result,) = run(tmp_path, reads, [one])
    assert result.warnings == (str(weights), "these")
    content = content_of(weights)
    (result,) = run(tmp_path, elsewhere, [one], again=True)
    place, text = result.warnings
    assert text == "these"
    assert (Path(place).name, Path(place).parent.name) == ("best.pth", content)


def test_a_node_with_another_version_is_named_before_anything_runs(cluster, monkeypatch):
    monkeypatch.setattr(ray_cluster, "__version__", "9.9.9")
    with pytest.raises(EnvironmentFailureError, match=r"node \S+ .* has export-zoo .*, this machine 9\.9\.9"):
        RayCluster(None, cores=2)


def waits(order, inputs) -> _Delivery:
    Path(order.cell.arguments[0]).touch()
    for _ in range(3000):
        time.sleep(0.1)  # as `process._watch`
    raise AssertionError


def test_ctrl_c_ends_the_tasks(cluster, tmp_path):
    place = RayCluster(None, cores=2, task=waits)
    began = tmp_path / "began"
    one = cell(tmp_path, arguments=(str(began),))
    real = place._wait

    def wait(reference):
        while not began.exists():
            time.sleep(0.1)
        place.stop()
        return real(reference)

    place._wait = wait
    with pytest.raises(ray_cluster.StoppedError):
        matrix_run.run([one], tmp_path / "out", seconds=300, place=place, expected=lambda _: GIB // 2)
    for _ in range(300):
        free = ray.available_resources().get("CPU", 0)
        if free == ray.cluster_resources()["CPU"]:
            return
        time.sleep(0.2)
    pytest.fail("the task still runs")


def waits_once(order, inputs) -> _Delivery:
    mark = Path(order.cell.arguments[0])
    here = ray.get_runtime_context().get_node_id()
    if not mark.exists():
        mark.write_text(here)
        for _ in range(3000):
            time.sleep(0.1)
    return _Delivery(ended(order, warnings=(here,)), _packed(Path()))


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
