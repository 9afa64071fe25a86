"""What the documentation shows is what is tested."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_program_in_the_readme_is_the_one_that_ctest_builds():
    program = (ROOT / "engines" / "cpp" / "tests" / "consumer" / "main.cpp").read_text()
    assert f"```cpp\n{program}```" in (ROOT / "README.md").read_text()
