"""Write a precision into a graph: where Q/DQ pairs go, and graph rewrites around them."""
