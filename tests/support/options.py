"""Options of exports that several tests give."""

PREPROCESS_FILE = {
    "resize_size": 72,
    "crop_height": 64,
    "crop_width": 64,
    "interpolation": "bilinear",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.25, 0.25, 0.25],
}
"""Contents of a file for --preprocess, for networks of our own."""

UNTUNED = ("--steps", "none", "--method", "minmax")
"""INT8 as it is calibrated."""

TUNED_LITTLE = ("--steps", "bias", "--method", "minmax")
"""The quickest tuning: rounding the weights of the digits resnet18 alone takes half a minute for each target."""
