"""The documentation shows the commands and figures that are tested."""

from __future__ import annotations

from support.paths import ROOT


def test_the_program_in_the_readme_is_the_one_that_ctest_builds():
    program = (ROOT / "engines" / "cpp" / "tests" / "consumer" / "main.cpp").read_text()
    assert f"```cpp\n{program}```" in (ROOT / "README.md").read_text()


def test_the_programs_in_docs_cpp_are_those_that_ctest_runs():
    for language, name in (("c", "classify.c"), ("python", "classify.py")):
        program = (ROOT / "engines" / "cpp" / "tests" / "consumer" / name).read_text()
        assert f"```{language}\n{program}```" in (ROOT / "docs" / "cpp.md").read_text()
