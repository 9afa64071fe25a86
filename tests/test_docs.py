"""The documentation shows the commands and figures that are tested."""

from __future__ import annotations

from support.paths import ROOT


def test_the_program_in_the_readme_is_the_one_that_ctest_builds():
    program = (ROOT / "engines" / "cpp" / "tests" / "consumer" / "main.cpp").read_text()
    assert f"```cpp\n{program}```" in (ROOT / "README.md").read_text()
