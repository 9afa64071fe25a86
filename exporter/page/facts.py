"""Facts about a bundle, a line each."""

from __future__ import annotations

from pathlib import Path

from export_zoo.engines.bundle.manifest import Attestation, Manifest, Port


def facts(bundle: Path, manifest: Manifest) -> dict[str, str]:
    """Facts about a bundle, by name."""
    recipe, p = manifest.recipe, manifest.recipe.preprocess
    trained, held = recipe.source.weights, manifest.artifacts.held_out
    found = {
        "bundle": f"{bundle} ({manifest.status}, by {manifest.tool}, {manifest.artifacts.created})",
        "model": f"{recipe.source.name}, {recipe.output.head.described}",
        "weights": trained.name + (f" (SHA-256 {trained.sha256[:16]}...)" if trained.sha256 else ""),
        "input": f"{recipe.input.name}: float32 {_shape(recipe.input)} {recipe.input.layout}",
        "output": "; ".join(
            f"{port.name}: float32 {_shape(port)}, {port.head.task}"
            + (f" ({port.head.scores})" if port.head.scores != "values" else "")
            for port in recipe.outputs
        ),
        "batch": f"{recipe.batch.min} to {recipe.batch.max}, best at {recipe.batch.opt}",
        "preprocess": f"{p.mode}, resize {p.resize_size} {p.interpolation} antialiased"
        f"{' to the proportions of the crop' if p.crop_mode == 'squash' else ''}, "
        f"crop {p.crop_height}x{p.crop_width}, /{p.scale:g}, mean {list(p.mean)}, std {list(p.std)} ({p.source})",
        "labels": f"{len(recipe.labels)} names" if recipe.labels else "names are not known",
        "calibration": f"{recipe.calibration.method}, {recipe.calibration.images} images"
        if recipe.calibration
        else "none",
        "held out": f"{held.count} {'synthetic ' if held.synthetic else ''}images with eager logits",
        "made on": recipe.instruction_set,
    }
    if (sizes := recipe.input_size) is not None:
        low, opt, high = (f"{height}x{width}" for height, width in (sizes.min, sizes.opt, sizes.max))
        found["input"] += f", {low} to {high}, best at {opt}"
        found["held out"] += "".join(f", {part.count} at {part.height}x{part.width}" for part in held.sizes)
    for engine in manifest.artifacts.engines:
        if engine.float_for_speed is not None and engine.float_for_speed.layers:
            found["float"] = f"{', '.join(engine.float_for_speed.layers)} ({engine.name}: faster in float)"
    return found


def _shape(port: Port) -> str:
    return f"[{', '.join(map(str, port.shape))}]"


def results(attestation: Attestation) -> str:
    """State of each engine in an attestation, as text."""
    passed = "ok" if attestation.emulation is not None else None
    return ", ".join(
        f"{name} {'FAILED' if gate.failures else passed or attestation.states.get(name, 'ok')}"
        for name, gate in attestation.engines.items()
    )
