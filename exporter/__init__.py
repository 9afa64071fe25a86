"""From a zoo model to a bundle: the network, its graph, the stages of an export and the command line."""
