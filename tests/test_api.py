"""`import export_zoo`: its names, and what they load."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.paths import ROOT

import export_zoo
from export_zoo.base.errors import EnvironmentFailureError

HEAVY = {"numpy", "onnx", "onnx_ir", "onnxruntime", "pydantic", "torch", "torchvision"}


def _loaded(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after `code`."""
    program = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.slow
def test_import_loads_nothing_heavy():
    assert (
        not _loaded("import export_zoo; export_zoo.ExportZooError, export_zoo.__version__, dir(export_zoo)")
        & HEAVY
    )


@pytest.mark.slow
def test_options_and_registries_load_nothing_heavy():
    code = "import export_zoo; export_zoo.ExportOptions('resnet18')\n"
    code += "import export_zoo.engines.targets.registry, export_zoo.engines.precision.registry"
    assert not _loaded(code) & HEAVY


@pytest.mark.parametrize("name", ["load", "verify", "LoadedEngine"])
@pytest.mark.slow
def test_what_serves_bundles_does_not_load_pytorch(name):
    loaded = _loaded(f"import export_zoo; export_zoo.{name}")
    assert "numpy" in loaded
    assert not loaded & {"torch", "torchvision", "onnxscript", "safetensors"}


def test_every_public_name_is_there():
    for name in export_zoo.__all__:
        assert getattr(export_zoo, name) is not None
    assert set(export_zoo.__all__) <= set(dir(export_zoo))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        export_zoo.nothing  # noqa: B018


def test_c_and_cpp_have_the_same_version():
    header = (ROOT / "engines" / "cpp" / "include" / "export_zoo" / "version.h").read_text()
    assert f'#define EXPORT_ZOO_VERSION "{export_zoo.__version__}"\n' in header


@pytest.mark.slow
def test_a_package_that_is_not_installed_is_named():
    """As where export-zoo-runtime is installed."""
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from export_zoo.exporter.cli.app import main; sys.exit(main(['resnet18', '--weights', 'none']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == EnvironmentFailureError.exit_code
    assert "the package of the module torch is not installed" in done.stderr
    assert "export-zoo-runtime" in done.stderr


@pytest.mark.slow
def test_python_names_a_package_that_is_not_installed():
    program = "import sys; sys.modules['torch'] = None; import export_zoo; export_zoo.export"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "export_zoo.export needs torch: install export-zoo" in done.stderr
