"""The command line. Imports PyTorch and ONNX Runtime only inside the commands that need them."""

from __future__ import annotations

import contextlib
import difflib
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from calibration.errors import UsageError
from exporter import __version__, options, outcome
from exporter.report import ConsoleReporter, show_log

EXIT_CODES = """\b
Exit codes:
    0  ok
    1  unexpected error: a defect, please report it
    2  usage: wrong or conflicting options
    3  parity gate failed; everything is kept under OUT.failed/
    4  a requested target is not available here
    5  bad input: model, weights, images or bundle
    6  an engine did not reach the state that --require asks for
    7  network, disk or memory
  130  interrupted
"""


class _Group(click.Group):
    """`export-zoo MODEL ...` is `export-zoo export MODEL ...`; mistyped commands are answered with a guess."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        group_options = {"--help", "-h", "--version"}
        flags = _leading_flags(args)
        args = [*args[len(flags) : len(flags) + 1], *flags, *args[len(flags) + 1 :]]
        if args and args[0] not in self.commands and args[0] not in group_options:
            _refuse_mistyped(args[0], list(self.commands))
            args = ["export", *args]
        return super().parse_args(ctx, args)


def _leading_flags(args: Sequence[str]) -> list[str]:
    """Options of every command that stand before it: `export-zoo --json out.json list`."""
    taken = 0
    while taken < len(args):
        if args[taken] == "--json" and taken + 1 < len(args):
            taken += 2
        elif args[taken] in ("-q", "--quiet", "-v", "--verbose") or args[taken].startswith("--json="):
            taken += 1
        else:
            break
    return list(args[:taken])


def _refuse_mistyped(word: str, commands: Sequence[str]) -> None:
    """A word near to a command and not near to the name of a model is a mistyped command."""
    near = difflib.get_close_matches(word.lower(), commands, n=1, cutoff=0.6)
    if word.startswith("-") or not near:
        return
    from exporter.zoo import model_names

    if word not in model_names():
        raise UsageError(f"no command or model {word!r}", hint=f"did you mean `export-zoo {near[0]}`?")


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=_Group, context_settings=CONTEXT, epilog=EXIT_CODES, no_args_is_help=True)
@click.version_option(__version__, prog_name="export-zoo")
def app() -> None:
    """Export zoo models to engines whose logits were compared with eager PyTorch.

    \b
    export-zoo resnet50 --precision int8 --calib ./imgs

    `export-zoo MODEL` is short for `export-zoo export MODEL`.
    """


_json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the result as JSON here, on every exit code.",
)
_quiet_option = click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors.")
_verbose_option = click.option(
    "-v", "--verbose", is_flag=True, help="TensorRT's log, and tracebacks of unexpected errors."
)


@app.command(epilog=EXIT_CODES)
@click.argument("model")
@click.option(
    "--precision", "precisions", multiple=True, metavar="fp32|fp16|int8", help="Repeatable. Default: fp32."
)
@click.option(
    "--calib",
    type=click.Path(path_type=Path, readable=False),
    metavar="DIR",
    help="Images to calibrate on (INT8); divided into calibrate, select and verify sets.",
)
@click.option(
    "--calib-images",
    type=int,
    default=options.DEFAULT_CALIB_IMAGES,
    show_default=True,
    metavar="N",
    help="At most so many images calibrate.",
)
@click.option(
    "--verify",
    type=click.Path(path_type=Path, readable=False),
    metavar="DIR",
    help="Images to verify on. Default: a part of --calib.",
)
@click.option(
    "--verify-images",
    type=int,
    default=options.DEFAULT_VERIFY_IMAGES,
    show_default=True,
    metavar="N",
    help="At most so many images verify.",
)
@click.option(
    "--weights",
    default="DEFAULT",
    show_default=True,
    metavar="W",
    help="DEFAULT, a name (IMAGENET1K_V1), a .pth or .safetensors file, or none (random).",
)
@click.option(
    "--transforms",
    metavar="NAME",
    help="Preprocess as these torchvision weights do, for a file that does not tell.",
)
@click.option(
    "--num-classes", type=int, metavar="N", help="Classes of the head. Default: that of the zoo's weights."
)
@click.option(
    "--init-missing",
    multiple=True,
    metavar="PATTERN",
    help="Parameters that the file may lack, as a glob; initialized at random. Repeatable.",
)
@click.option(
    "--transform-input/--no-transform-input",
    default=None,
    help="googlenet, inception_v3: as trained. Default: on, off with --weights none.",
)
@click.option("--input-size", metavar="N|HxW", help="Input in pixels. Default: the weights' own.")
@click.option(
    "--resize-size",
    type=int,
    metavar="N",
    help="Shorter side before the crop. Default: the weights' own, in proportion to --input-size.",
)
@click.option(
    "--batch",
    default=options.DEFAULT_BATCH,
    show_default=True,
    metavar="MIN:OPT:MAX",
    help="Batch sizes to accept; OPT is tuned and timed.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME",
    help="onnxruntime, tensorrt, tensorrt-rtx or auto. Repeatable. Default: auto, all that is available here.",
)
@click.option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="[TARGET:]METRIC=VALUE",
    help="Limit of the parity gate. Repeatable. Defaults by precision: docs/parity.md.",
)
@click.option(
    "--require",
    default="graph",
    show_default=True,
    metavar="graph|verified",
    help="State that every engine must reach.",
)
@click.option(
    "--method", default="minmax", show_default=True, metavar="minmax", help="How INT8 ranges are chosen."
)
@click.option(
    "--reduce-range", is_flag=True, help="7-bit weights, for CPUs without VNNI, where 8 bits can saturate."
)
@click.option(
    "--workspace",
    "workspace_mb",
    type=int,
    metavar="MIB",
    help="TensorRT: scratch memory on the device. Default: all of it.",
)
@click.option("--refittable", is_flag=True, help="TensorRT: weights can be replaced later.")
@click.option("--strip-weights", is_flag=True, help="TensorRT: plan without weights, to be refitted.")
@click.option("--hardware-compatible", is_flag=True, help="tensorrt: runs on GPUs from Ampere on.")
@click.option("--version-compatible", is_flag=True, help="tensorrt: runs with later versions, too.")
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="X.Y",
    help="tensorrt-rtx: GPUs to build for. Repeatable. Default: 8.0, 8.6, 8.9 and 12.0.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="The bundle. Default: ./MODEL.bundle."
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="Of the splits, synthetic images and random weights.",
)
@click.option("--no-cache", is_flag=True, help="Make everything anew, and keep nothing.")
@_json_option
@_quiet_option
@_verbose_option
def export(model: str, json_path: Path | None, quiet: bool, verbose: bool, **given: Any) -> None:
    """Export MODEL, build its engines, and check their logits against eager PyTorch."""
    if verbose:
        show_log()
    from engines import target

    chosen = options.ExportOptions(
        model=model,
        precisions=tuple(given["precisions"]) or ("fp32",),
        targets=tuple(given["targets"]) or ("auto",),
        calib=given["calib"],
        calib_images=given["calib_images"],
        verify=given["verify"],
        verify_images=given["verify_images"],
        weights=given["weights"],
        transforms=given["transforms"],
        num_classes=given["num_classes"],
        init_missing=tuple(given["init_missing"]),
        transform_input=given["transform_input"],
        input_size=options.parse_size(given["input_size"]) if given["input_size"] else None,
        resize_size=given["resize_size"],
        batch=options.BatchRange.parse(given["batch"]),
        tolerances=tuple(options.Tolerance.parse(text) for text in given["tolerances"]),
        require=given["require"],
        method=given["method"],
        reduce_range=given["reduce_range"],
        build=target.BuildOptions(
            workspace_mb=given["workspace_mb"],
            refittable=given["refittable"],
            strip_weights=given["strip_weights"],
            hardware_compatible=given["hardware_compatible"],
            version_compatible=given["version_compatible"],
            compute_capabilities=tuple(given["compute_capabilities"]),
        ),
        out=given["out"],
        cache=not given["no_cache"],
        seed=given["seed"],
    )
    if json_path is not None and chosen.out_dir.resolve() in json_path.resolve().parents:
        raise UsageError(f"--json {json_path}: lies inside the bundle", hint="write it beside --out")
    now = outcome.current()
    now.reporter = ConsoleReporter(quiet=quiet)
    chosen.build.check([t.name for t in target.choose(chosen.targets)])  # before PyTorch is loaded
    from exporter.pipeline import KeptError, export_zoo
    from exporter.report import print_table

    try:
        result = export_zoo(chosen, reporter=now.reporter)
    except KeptError as error:
        now.document |= _described(error.result.bundle, error.result.manifest)
        if not quiet:
            with contextlib.suppress(BrokenPipeError, SystemExit):  # the verdict is what counts
                print_table(error.result.engines, random=error.result.manifest.recipe.source.weights.random)
        raise
    now.document |= _described(result.bundle, result.manifest)
    if not quiet:
        print_table(result.engines, random=result.manifest.recipe.source.weights.random)
    del json_path


def _described(bundle: Path, manifest: Any) -> dict[str, Any]:
    document = manifest.model_dump(mode="json")
    return {"bundle": str(bundle), "engines": document["artifacts"]["engines"], "recipe": document["recipe"]}


@app.command("list")
@click.argument("pattern", default="")
@_json_option
@_quiet_option
@_verbose_option
def list_models(pattern: str, json_path: Path | None, quiet: bool, verbose: bool) -> None:
    """List the zoo's models whose name matches PATTERN (a glob, or a part of the name)."""
    del json_path, verbose
    from exporter import listing

    found = listing.listed(pattern)
    outcome.current().document["models"] = [asdict(row) for row in found]
    if not quiet:
        listing.print_models(found)


@app.command(epilog=EXIT_CODES)
@click.argument("bundle", type=click.Path(path_type=Path))
@_json_option
@_quiet_option
@_verbose_option
def verify(bundle: Path, json_path: Path | None, quiet: bool, verbose: bool) -> None:
    """Check a bundle's hashes and its engines' logits on this machine; write an attestation. Needs no PyTorch."""
    del json_path, verbose
    from calibration.errors import ParityError
    from engines import bundle as room
    from engines.gate import images_compared

    now = outcome.current()
    now.reporter = reporter = ConsoleReporter(quiet=quiet)
    manifest = room.read_manifest(bundle)
    per_engine = images_compared(manifest.artifacts.held_out.count, manifest.recipe.batch)
    with reporter.stage("verify") as stage:
        with reporter.bar("verify", per_engine * len(manifest.artifacts.engines)) as progress:
            attestation, path = room.verify(bundle, progress=progress)
        stage.detail = (
            f"{bundle}: hashes and logits of {len(attestation.engines)} engine(s), on {attestation.machine}"
        )
    for warning in attestation.warnings:
        reporter.warn(warning)
    now.document |= {
        "bundle": str(bundle),
        "attestation": str(path) if path else None,
        "engines": attestation.model_dump(mode="json")["engines"],
    }
    for name, gate in attestation.engines.items():
        sqnr, top1 = gate.eager_metrics["sqnr"] or 0.0, gate.eager_metrics["top1"] or 0.0
        state = "FAILED" if gate.failures else attestation.states[name]
        if not quiet:
            images = f"{100 * top1:.1f} % of {gate.metrics['images']} images"
            click.echo(f"{name}: {state}, SQNR {sqnr:.1f} dB, top-1 agreement {images}")
    if not quiet:
        click.echo(f"attestation: {path or 'not written, the bundle is read-only'}")
    failures = [f"{name}: {text}" for name, gate in attestation.engines.items() for text in gate.failures]
    if failures:
        raise ParityError(
            f"{bundle}: logits are outside the tolerance on this machine: {'; '.join(failures)}",
            hint="INT8 differs between instruction sets: export on this kind of machine"
            if attestation.warnings
            else "the bundle failed when it was exported, or libraries differ: compare `versions` in the manifest",
        )
    if manifest.status != "ok":
        raise ParityError(f"{bundle}: failed its parity gate when it was exported", hint="export again")


@app.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@_json_option
@_quiet_option
@_verbose_option
def inspect(bundle: Path, json_path: Path | None, quiet: bool, verbose: bool) -> None:
    """Show what a bundle holds, from its manifest. Runs nothing."""
    del json_path, verbose
    from engines import bundle as room
    from exporter.report import print_table

    manifest = room.read_manifest(bundle)
    outcome.current().document |= {"bundle": str(bundle), "manifest": manifest.model_dump(mode="json")}
    if quiet:
        return
    recipe, p = manifest.recipe, manifest.recipe.preprocess
    trained, held = recipe.source.weights, manifest.artifacts.held_out
    lines = {
        "bundle": f"{bundle} ({manifest.status}, by {manifest.tool}, {manifest.artifacts.created})",
        "model": f"{recipe.source.name}, {recipe.source.num_classes} classes",
        "weights": trained.name + (f" (SHA-256 {trained.sha256[:16]}...)" if trained.sha256 else ""),
        "input": f"{recipe.input.name}: float32 {recipe.input.shape} {recipe.input.layout}",
        "output": f"{recipe.output.name}: float32 {recipe.output.shape}",
        "batch": f"{recipe.batch.min} to {recipe.batch.max}, best at {recipe.batch.opt}",
        "preprocess": f"RGB, resize {p.resize_size} {p.interpolation} antialiased, "
        f"crop {p.crop_height}x{p.crop_width}, /255, mean {list(p.mean)}, std {list(p.std)} ({p.source})",
        "labels": f"{len(recipe.labels)} names" if recipe.labels else "not known",
        "calibration": f"{recipe.calibration.method}, {recipe.calibration.images} images"
        if recipe.calibration
        else "none",
        "held out": f"{held.count} {'synthetic ' if held.synthetic else ''}images with eager logits",
        "machine": recipe.instruction_set,
    }
    for name, text in lines.items():
        click.echo(f"{name:<12} {text}")
    for warning in manifest.warnings:
        click.echo(f"{'warning':<12} {warning}")
    print_table(manifest.artifacts.engines, random=trained.random)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return outcome.execute(app, sys.argv[1:] if arguments is None else arguments)


def run() -> None:
    """Entry point of the `export-zoo` console script. SIGTERM ends it as Ctrl-C does: cleanly."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, outcome.on_signal)
    code = main()
    outcome.ignore_signals()  # libraries take most of a second to leave
    sys.exit(code)


if __name__ == "__main__":
    run()
