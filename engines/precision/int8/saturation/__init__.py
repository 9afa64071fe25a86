"""INT8 on CPUs without VNNI: kernels that add two products in 16 bits, and graphs that cannot overflow them."""
