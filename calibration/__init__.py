"""From images to activation ranges. Never imports torch."""
