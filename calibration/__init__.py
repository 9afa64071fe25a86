"""Lowest floor: images, preprocessing and activation ranges. Never imports torch."""
