"""From eager modules to ONNX graphs: names, dynamic batch, metadata; and simplifying, which must change nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from support.paths import ROOT
from support.tiny import Tiny, made
from torch import nn

from export_zoo.base import graph_io
from export_zoo.base.errors import BadInputError, ExportDefectError, ParityError
from export_zoo.base.graph_io import external_files, sha256_of
from export_zoo.engines.targets.onnxruntime.engine import OnnxRuntimeEngine
from export_zoo.exporter.graph import against_eager, simplify, to_onnx


class Means(nn.Module):
    """Ends as ResNets do: convolution, global mean, dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).mean([2, 3]))


class Bakes(nn.Module):
    """Bakes the exporter's sample batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).reshape(7, -1)


class Decides(nn.Module):
    """Python's control flow on data: torch.export refuses it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) if x.sum() > 0 else 2 * x.flatten(1)


class Branches(nn.Module):
    """Control flow that torch.export takes: becomes an If with two subgraphs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: y.sin() + 1, lambda y: y.cos() * 2, (x,)).flatten(1)


def _batch(count: int = 5, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, size, size)).astype(np.float32)


def _eager(module: nn.Module, batch: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return module(torch.from_numpy(batch)).numpy()


def _modules(path: Path) -> dict[str, str]:
    """Node metadata of a graph: node name -> module path; nothing but module paths may be there."""
    found = {}
    for node in onnx.load(path).graph.node:
        properties = {entry.key: entry.value for entry in node.metadata_props}
        assert set(properties) <= {"module"}
        found[node.name] = properties.get("module", "")
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`Tiny`, exported: the module and the graph's path. Copy the graph before changing it."""
    module, path = made(Tiny), tmp_path_factory.mktemp("export") / "model.onnx"
    assert to_onnx.export(module, 8, 8, path) == [path]
    return module, path


# -- export ----------------------------------------------------------------------------------------------------


def test_graph_is_valid_onnx_of_our_opset(exported):
    model = onnx.load(exported[1])
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == to_onnx.OPSET


def test_input_and_logits_are_named_and_their_batch_is_symbolic(exported):
    found = onnx.load(exported[1]).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*found.input, *found.output]
    }
    assert shapes == {"input": ["batch", 3, 8, 8], "logits": ["batch", 10]}


def test_graph_gives_eagers_logits_at_any_batch(exported):
    module, path = exported
    engine = OnnxRuntimeEngine(path)
    for count in (1, 2, 5, 7, 16):
        np.testing.assert_allclose(engine.run(_batch(count)), _eager(module, _batch(count)), atol=1e-5)
    assert against_eager.check_batches(path, module, _batch()) < 1e-5


def test_nothing_but_module_paths_is_left_of_the_metadata(exported):
    module, path = exported
    model = onnx.load(path)
    known = dict(module.named_modules())
    assert set(_modules(path).values()) <= set(known)
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer]
    assert not model.metadata_props
    assert not model.graph.metadata_props
    assert not any(value.metadata_props for value in values)
    assert not any(thing.doc_string for thing in [model, model.graph, *model.graph.node, *values])


def _traces(path: Path) -> list[bytes]:
    """Traces of the machine and of Python in a file's bytes."""
    known = [b"/work", b"/home", b"/tmp", b"/usr", b"site-packages", b"dist-packages", b".py", b"pkg."]
    known += [b'File "', b"line ", b"stack_trace", b"Traceback", str(ROOT).encode(), sys.prefix.encode()]
    content = path.read_bytes()
    return [text for text in known if text in content]


def test_file_holds_no_path_and_no_stack_trace(exported):
    assert _traces(exported[1]) == []


def test_file_with_subgraphs_holds_no_path_and_no_stack_trace(tmp_path):
    to_onnx.export(made(Branches), 8, 8, tmp_path / "model.onnx")
    assert "If" in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert _traces(tmp_path / "model.onnx") == []


def test_module_paths_are_those_of_the_weights(exported):
    found = onnx.load(exported[1]).graph
    modules = _modules(exported[1])
    weighted = {}
    for node in found.node:
        for name in node.input:
            if name.endswith(".weight"):
                weighted[name] = modules[node.name]
    names = {"stem.0.weight", "block.left.weight", "block.right.weight", "norm.weight", "head.weight"}
    assert set(weighted) >= names - {"norm.weight"}
    assert all(f"{module}.weight" == name for name, module in weighted.items())


def test_module_paths_of_nodes_without_a_weight_are_their_scope(exported):
    by_operator = {}
    for node in onnx.load(exported[1]).graph.node:
        by_operator.setdefault(node.op_type, []).append(_modules(exported[1])[node.name])
    assert by_operator["MaxPool"] == ["stem.3"]
    assert by_operator["Relu"][0] == "stem.2"
    assert by_operator["MatMul"] == ["tokens"]


def test_two_exports_are_the_same_bytes(exported, tmp_path):
    to_onnx.export(made(Tiny), 8, 8, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == exported[1].read_bytes()


@pytest.mark.slow
def test_export_in_another_process_and_folder_is_the_same_bytes(exported, tmp_path):
    script = (
        "import sys; from pathlib import Path; from support.tiny import Tiny, made\n"
        "from export_zoo.exporter.graph import to_onnx\n"
        "to_onnx.export(made(Tiny), 8, 8, Path(sys.argv[1]))"
    )
    folders = [ROOT, ROOT / "tests"]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", script, str(tmp_path / "other.onnx")]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    assert (tmp_path / "other.onnx").read_bytes() == exported[1].read_bytes()


def test_wrong_input_size_is_the_users_and_names_the_size(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3 * 8 * 8, 10)

        def forward(self, x):
            return self.head(x.flatten(1))

    with pytest.raises(BadInputError, match="does not run at input 9x8") as raised:
        to_onnx.export(made(Fixed), 9, 8, tmp_path / "model.onnx")
    assert "--input-size" in raised.value.hint
    assert not list(tmp_path.iterdir())


def test_what_the_exporter_refuses_is_a_defect_of_the_export(tmp_path):
    with pytest.raises(ExportDefectError, match=r"torch\.onnx\.export failed"):
        to_onnx.export(made(Decides), 8, 8, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_the_exporter_refuses_is_told_in_plain_text(tmp_path):
    with pytest.raises(ExportDefectError) as raised:
        to_onnx.export(made(Decides), 8, 8, tmp_path / "model.onnx")
    assert "\x1b" not in str(raised.value)


def test_exporting_prints_nothing(tmp_path, capfd):
    to_onnx.export(made(Means), 8, 8, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")


# -- baked batches ---------------------------------------------------------------------------------------------


def test_module_that_bakes_the_batch_is_refused_by_node(tmp_path):
    with pytest.raises(ExportDefectError, match=r"baked the batch size .* Reshape 'node_\w+'"):
        to_onnx.export(made(Bakes), 14, 14, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_batch_baked_by_the_head_is_refused_by_node_and_module(tmp_path):
    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x).reshape(7 if x.shape[0] == 7 else -1, 4 * 8 * 8)

    with pytest.raises(ExportDefectError, match=r"first at Conv 'node_\w+' \(module conv\)"):
        to_onnx.export(made(Bilinear), 8, 8, tmp_path / "model.onnx")


def test_baked_input_is_refused(exported):
    from export_zoo.base.graph_io import load

    model = load(exported[1])
    model.graph.inputs[0].shape = type(model.graph.inputs[0].shape)([7, 3, 8, 8])
    with pytest.raises(ExportDefectError, match="baked the batch size"):
        to_onnx.check_dynamic_batch(model)


def _edited_reshape(source: Path, out: Path, shape: list[int]) -> Path:
    """The graph with the target shape of its first Reshape changed."""
    model = onnx.load(source)
    reshape = next(node for node in model.graph.node if node.op_type == "Reshape")
    target = next(t for t in model.graph.initializer if t.name == reshape.input[1])
    target.CopyFrom(numpy_helper.from_array(np.array(shape, dtype=np.int64), target.name))
    del model.graph.value_info[:]
    onnx.save(model, out)
    return out


@pytest.mark.parametrize(("batch", "fails_at"), [(7, 1), (1, 3)])
def test_reshape_to_a_fixed_batch_is_found_by_running_other_batches(exported, tmp_path, batch, fails_at):
    module, path = exported
    baked = _edited_reshape(path, tmp_path / "baked.onnx", [batch, 16, 16])
    with pytest.raises(ExportDefectError, match=f"(?s)fails at batch {fails_at}: .*a batch is baked in"):
        against_eager.check_batches(baked, module, _batch())


def test_output_of_another_batch_is_found(exported, tmp_path):
    module, path = exported
    baked = _edited_reshape(path, tmp_path / "baked.onnx", [-1, 16, 4])  # four rows for each image
    with pytest.raises(ExportDefectError, match=r"logits are \[4, 10\] at batch 1, .*, eager's \[1, 10\]"):
        against_eager.check_batches(baked, module, _batch())


def test_other_logits_than_eagers_are_found(exported, tmp_path):
    module, path = exported
    model = onnx.load(path)
    weight = next(t for t in model.graph.initializer if t.name == "head.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportDefectError, match="logits differ from eager's at batch 1"):
        against_eager.check_batches(tmp_path / "model.onnx", module, _batch())


def test_logits_that_are_wrong_at_three_images_only_are_found(exported):
    class Wrong(nn.Module):
        def forward(self, x):
            return exported[0](x) * (1.5 if len(x) == 3 else 1.0)

    with pytest.raises(ExportDefectError, match="at batch 3"):
        against_eager.check_batches(exported[1], Wrong(), _batch())


def test_nan_logits_of_the_graph_are_found(exported, tmp_path):
    model = onnx.load(exported[1])
    _scale_head(model, float("nan"))
    onnx.save(model, tmp_path / "poisoned.onnx")
    with pytest.raises(ExportDefectError, match="differ"):
        against_eager.check_batches(tmp_path / "poisoned.onnx", exported[0], _batch())


def test_nan_logits_of_the_eager_model_are_nothing_to_compare_with(exported):
    class Poisoned(nn.Module):
        def forward(self, x):
            return exported[0](x) * torch.nan

    with pytest.raises(ParityError, match="eager model's own logits are not finite"):
        against_eager.check_batches(exported[1], Poisoned(), _batch())


def test_graph_that_does_not_load_is_a_defect_of_the_export(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportDefectError, match="does not load"):
        against_eager.check_batches(tmp_path / "model.onnx", made(Tiny), _batch())


# -- external data ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def external(exported, tmp_path_factory):
    """`Tiny` with its larger weights beside the graph."""
    path = tmp_path_factory.mktemp("external") / "model.onnx"
    return to_onnx.export(exported[0], 8, 8, path, external_threshold=1024)


def test_large_weights_go_beside_the_graph_under_their_hash(external, exported):
    path, data = external
    assert sorted(path.parent.iterdir()) == sorted(external)
    assert data.name == f"weights-{sha256_of(data)[:32]}.bin"
    assert external_files(path) == [data]
    assert path.stat().st_size < exported[1].stat().st_size
    assert {
        t.external_data[0].value
        for t in onnx.load(path, load_external_data=False).graph.initializer
        if t.data_location == onnx.TensorProto.EXTERNAL
    } == {data.name}


def test_graph_with_external_data_gives_eagers_logits(external, exported):
    assert against_eager.check_batches(external[0], exported[0], _batch()) < 1e-5


def test_graph_with_external_data_can_be_moved(external, exported, tmp_path):
    for path in external:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    logits = OnnxRuntimeEngine(tmp_path / "model.onnx").run(_batch())
    np.testing.assert_allclose(logits, _eager(exported[0], _batch()), atol=1e-5)
    (tmp_path / external[1].name).unlink()
    with pytest.raises(BadInputError, match="cannot load it"):
        OnnxRuntimeEngine(tmp_path / "model.onnx")


def test_small_graphs_have_no_external_data(exported):
    assert external_files(exported[1]) == []
    assert [path.name for path in exported[1].parent.iterdir()] == ["model.onnx"]


def test_graph_with_external_data_is_simplified_without_onnxsim_and_stands_alone(
    external, exported, tmp_path
):
    (tmp_path / "here").mkdir()
    for path in external:
        (tmp_path / "here" / path.name).write_bytes(path.read_bytes())
    done = simplify.simplify(tmp_path / "here" / "model.onnx", tmp_path, _batch())
    assert done.summary.startswith("onnxsim skipped: weights over 2 GiB")
    for path in (tmp_path / "here").iterdir():
        path.unlink()
    logits = OnnxRuntimeEngine(done.files[0]).run(_batch())
    np.testing.assert_allclose(logits, _eager(exported[0], _batch()), atol=1e-5)


# -- simplify --------------------------------------------------------------------------------------------------


def _left_alone(exported, directory: Path) -> simplify.Simplified:
    """Simplify `Tiny` where onnxsim is of no use: a valid graph with its metadata must come out all the same."""
    module, source = exported
    done = simplify.simplify(source, directory, _batch())
    assert done.files == [directory / "graph.onnx"]
    assert [path.name for path in directory.iterdir() if path.suffix != ".sh"] == ["graph.onnx"]
    onnx.checker.check_model(onnx.load(done.files[0]), full_check=True)
    assert against_eager.check_batches(done.files[0], module, _batch()) < 1e-5
    assert _modules(done.files[0]) == _modules(source)
    return done


BROKEN = {
    "crashes": ("kill -SEGV $$", "killed by signal 11"),
    "fails with a reason": ("echo first >&2; echo the reason >&2; exit 1", "onnxsim failed: the reason"),
    "fails on standard output": ("echo the reason; exit 2", "onnxsim failed: the reason"),
    "fails silently": ("exit 3", "onnxsim failed: exit code 3"),
    "writes nothing": ("exit 0", "onnxsim failed"),
    "hangs": ("exec sleep 60", "took more than 0.5 s"),
}


@pytest.mark.parametrize(("script", "says"), BROKEN.values(), ids=BROKEN)
def test_onnxsim_that_breaks_is_left_out_with_a_warning(exported, tmp_path, monkeypatch, script, says):
    program = tmp_path / "onnxsim.sh"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(simplify, "TIMEOUT_SECONDS", 0.5)
    done = _left_alone(exported, tmp_path)
    assert says in done.warning
    assert done.summary.startswith(done.warning)


def test_onnxsim_does_not_import_what_lies_beside_the_user(exported, tmp_path, monkeypatch):
    (tmp_path / "user").mkdir()
    for name in ("onnx", "onnxsim", "numpy"):
        (tmp_path / "user" / f"{name}.py").write_text("raise ImportError('the one of the user')")
    monkeypatch.chdir(tmp_path / "user")
    assert simplify._run_onnxsim(exported[1], Path("..") / "out.onnx") == ""
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"))


def _pretend(monkeypatch, change) -> None:
    """In place of onnxsim: `change(model)` edits the graph."""

    def run(source: Path, out: Path) -> str:
        model = onnx.load(source)
        change(model)
        onnx.save(model, out)
        return ""

    monkeypatch.setattr(simplify, "_run_onnxsim", run)


def _append_identity(model: onnx.ModelProto) -> None:
    """One node more, the logits behind it: counts as a change."""
    last = model.graph.node[-1]
    last.output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Identity", ["before"], ["logits"], name="identity"))


def _scale_head(model: onnx.ModelProto, factor: float) -> None:
    weight = next(t for t in model.graph.initializer if t.name == "head.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name))


def test_simplifier_that_changes_nothing_is_left_out_without_a_warning(exported, tmp_path, monkeypatch):
    _pretend(monkeypatch, lambda model: None)
    done = _left_alone(exported, tmp_path)
    assert done.summary.startswith("onnxsim skipped: it changes nothing")
    assert done.warning == ""


def test_simplifier_that_keeps_the_logits_is_taken(exported, tmp_path, monkeypatch):
    _pretend(monkeypatch, _append_identity)
    done = simplify.simplify(exported[1], tmp_path, _batch())
    nodes = len(onnx.load(exported[1]).graph.node)
    assert done.summary.startswith(f"onnxsim: {nodes} -> {nodes + 1} nodes")
    assert done.warning == ""
    assert onnx.load(done.files[0]).graph.node[-1].op_type == "Identity"


@pytest.mark.parametrize("factor", [1.01, 0.0, 1e30, float("nan")])
def test_simplifier_that_changes_the_logits_is_refused(exported, tmp_path, monkeypatch, factor):
    def change(model: onnx.ModelProto) -> None:
        _append_identity(model)
        _scale_head(model, factor)

    _pretend(monkeypatch, change)
    assert _left_alone(exported, tmp_path).warning.startswith("onnxsim skipped: it changes the logits")


def test_simplifier_that_changes_weights_and_no_node_is_not_taken(exported, tmp_path, monkeypatch):
    _pretend(monkeypatch, lambda model: _scale_head(model, 1.01))
    _left_alone(exported, tmp_path)


def _bake_reshape(model: onnx.ModelProto) -> None:
    _append_identity(model)
    reshape = next(node for node in model.graph.node if node.op_type == "Reshape")
    target = next(t for t in model.graph.initializer if t.name == reshape.input[1])
    target.CopyFrom(numpy_helper.from_array(np.array([1, 16, 16], dtype=np.int64), target.name))


def _bake_input(model: onnx.ModelProto) -> None:
    _append_identity(model)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def _break_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "NoSuchOperator"


@pytest.mark.parametrize("change", [_bake_reshape, _bake_input, _break_operator])
def test_simplifier_whose_graph_does_not_run_is_refused(exported, tmp_path, monkeypatch, change):
    _pretend(monkeypatch, change)
    assert "onnxsim skipped" in _left_alone(exported, tmp_path).warning


def test_simplifier_that_writes_no_graph_is_refused(exported, tmp_path, monkeypatch):
    def run(source: Path, out: Path) -> str:
        out.write_bytes(b"\xff" * 100)
        return ""

    monkeypatch.setattr(simplify, "_run_onnxsim", run)
    assert "onnxsim skipped" in _left_alone(exported, tmp_path).warning


def test_rewriting_that_changes_the_logits_is_undone(exported, tmp_path, monkeypatch):
    def harm(edited: ir.Graph) -> int:
        head = edited.initializers["head.weight"]
        head.const_value = ir.tensor(2 * head.const_value.numpy(), name=head.name)
        return 1

    _pretend(monkeypatch, lambda model: None)
    monkeypatch.setattr(simplify, "average_pool_instead_of_mean", harm)
    assert "rewriting changes the logits" in _left_alone(exported, tmp_path).warning


def test_mean_becomes_average_pooling(tmp_path):
    module = made(Means)
    to_onnx.export(module, 8, 8, tmp_path / "model.onnx")
    with pytest.MonkeyPatch.context() as patch:
        _pretend(patch, lambda model: None)
        done = simplify.simplify(tmp_path / "model.onnx", tmp_path, _batch())
    assert "1 mean -> average pooling" in done.summary
    operators = [node.op_type for node in onnx.load(done.files[0]).graph.node]
    assert "GlobalAveragePool" in operators
    assert "ReduceMean" not in operators
    assert against_eager.check_batches(done.files[0], module, _batch()) < 1e-5


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A tiny ViT, exported and simplified by the real onnxsim: it folds MatMul + Add to Gemm."""
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    module = VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=10).eval()
    module.heads.head.reset_parameters()
    directory = tmp_path_factory.mktemp("vit")
    to_onnx.export(module, 16, 16, directory / "model.onnx")
    return module, directory, simplify.simplify(directory / "model.onnx", directory, _batch(size=16))


@pytest.mark.slow
def test_onnxsim_simplifies_a_vision_transformer_and_keeps_its_logits(vit):
    module, directory, done = vit
    assert done.warning == ""
    assert done.summary.startswith("onnxsim: ")
    before, after = (len(onnx.load(directory / name).graph.node) for name in ("model.onnx", "graph.onnx"))
    assert f"{before} -> {after} nodes" in done.summary
    assert after < before
    assert against_eager.check_batches(done.files[0], module, _batch(size=16)) < 1e-4


@pytest.mark.slow
def test_module_paths_survive_onnxsim(vit):
    _, directory, _ = vit
    before, after = (_modules(directory / name) for name in ("model.onnx", "graph.onnx"))
    found = onnx.load(directory / "graph.onnx").graph
    for node in found.node:
        if node.op_type in ("Conv", "Gemm", "LayerNormalization", "Softmax"):
            assert after[node.name], node.name
    assert set(after.values()) <= set(before.values())
    assert {path for path in before.values() if ".mlp." in path} <= set(after.values())
    assert _traces(directory / "graph.onnx") == []


@pytest.mark.slow
def test_every_node_has_a_name_of_its_own_after_onnxsim(vit):
    names = [node.name for node in onnx.load(vit[1] / "graph.onnx").graph.node]
    assert all(names)
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_module_paths_name_modules(vit):
    module, directory, _ = vit
    assert set(_modules(directory / "model.onnx").values()) <= set(dict(module.named_modules()))


@pytest.mark.slow
def test_modules_with_equal_weights_keep_their_own_path(vit):
    nodes = [n for n in onnx.load(vit[1] / "model.onnx").graph.node if n.op_type == "LayerNormalization"]
    modules = _modules(vit[1] / "model.onnx")
    layers = [f"encoder.layers.encoder_layer_{i}.ln_{j}" for i in (0, 1) for j in (1, 2)]
    assert [modules[node.name] for node in nodes] == [*layers, "encoder.ln"]


def test_large_graphs_that_nobody_needs_do_not_pile_up(tmp_path, monkeypatch):
    """They refer to themselves: tuning a VGG loads its half gigabyte some forty times."""
    values = [numpy_helper.from_array(np.zeros((5, 1 << 20), np.float32), "weight")]
    made = onnx.helper.make_graph([], "large", [], [], values)
    onnx.save(onnx.helper.make_model(made), tmp_path / "g.onnx")
    monkeypatch.setattr(graph_io, "_PILE", 50 << 20)
    monkeypatch.setattr(graph_io._Pile, "size", 0)
    graphs = [weakref.ref(graph_io.load(tmp_path / "g.onnx").graph) for _ in range(5)]
    assert graphs[0]() is graphs[1]() is None
