"""A Ray cluster that runs functions, and the files that they read there."""
