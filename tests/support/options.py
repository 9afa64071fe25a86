"""Options of exports that several tests give."""

UNTUNED = ("--steps", "none", "--method", "minmax")
"""INT8 as it is calibrated."""

TUNED_LITTLE = ("--steps", "bias", "--method", "minmax")
"""The quickest tuning: rounding the weights of the digits resnet18 alone takes half a minute for each target."""
