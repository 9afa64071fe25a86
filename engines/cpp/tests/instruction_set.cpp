// The name of this CPU's instruction set, for check_cpus.py.

#include <iostream>

#include "cpu.hpp"

int main() { std::cout << export_zoo::detail::instruction_set() << '\n'; }
