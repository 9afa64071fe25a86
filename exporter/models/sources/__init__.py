"""Sources of models: torchvision, timm and the user's code."""
