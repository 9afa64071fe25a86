"""TensorRT's interface, every function of which aborts, for fake_tensorrt.cpp: fake_tensorrt.py INCLUDE OUT."""

import re
import sys
from pathlib import Path

text = (Path(sys.argv[1]) / "NvInferImpl.h").read_text()
lines = [
    "#include <cstdlib>",
    "#include <NvInferRuntime.h>",
    "namespace nothing {",
    "using namespace nvinfer1;",
]
for name in ("Runtime", "CudaEngine", "ExecutionContext"):
    found = re.search(rf"class V{name} : public VRoot\n{{(.*?)\n}};", text, re.DOTALL)
    assert found is not None, name
    functions = re.findall(r"virtual\s+([^;]*?)\s*=\s*0\s*;", found[1])
    lines += [f"class {name} : public nvinfer1::apiv::V{name} {{", " public:"]
    lines += [f"  {' '.join(function.split())} override {{ std::abort(); }}" for function in functions]
    lines.append("};")
Path(sys.argv[2]).write_text("\n".join([*lines, "}", ""]))
