"""`export-zoo verify`, `inspect`, `triton` and `ovms`: commands that take a bundle. Never import PyTorch."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from export_zoo.base.errors import ParityError, TargetUnavailableError, UsageError
from export_zoo.exporter.cli import outcome
from export_zoo.exporter.cli.common_options import EXIT_CODES, json_option, quiet_option, verbose_option
from export_zoo.exporter.run.report import RANDOM, ConsoleReporter, show_log

if TYPE_CHECKING:
    from export_zoo.engines.bundle.manifest import Manifest
    from export_zoo.engines.bundle.triton import CpuGraph

Command = Callable[..., Any]


@click.command(epilog=EXIT_CODES)
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--cpu",
    "cpus",
    multiple=True,
    metavar="NAME",
    help="Run engines of ONNX Runtime and OpenVINO on CPU NAME, emulated by qemu-user, and on this machine's CPU. "
    "Repeatable. `--cpu list`, without BUNDLE, lists the CPUs.",
)
@click.option(
    "--images",
    type=click.IntRange(2),
    metavar="N",
    help="Held-out images that INT8 engines run on each --cpu; float engines run at most 2. Default: 16.",
)
@click.option(
    "--no-latency",
    is_flag=True,
    help="Do not time the engines. Loading on such a machine then times them at first load.",
)
@json_option
@quiet_option
@verbose_option
def verify(
    bundle: Path | None,
    cpus: tuple[str, ...],
    images: int | None,
    no_latency: bool,
    json_path: Path | None,
    quiet: bool,
    verbose: bool,
) -> None:
    """Check a bundle's hashes and its engines' logits on this machine, and time the engines; write an attestation.

    Needs no PyTorch.
    """
    del json_path
    if verbose:
        show_log()
    now = outcome.current()
    now.reporter = reporter = ConsoleReporter(quiet=quiet)
    if "list" in cpus:
        if bundle is not None or images is not None or no_latency or cpus != ("list",):
            raise UsageError(
                "--cpu list: cannot be combined with BUNDLE or other options", hint="leave them out"
            )
        _list_cpus(quiet=quiet)
        return
    if bundle is None:
        raise click.MissingParameter(param_hint="'BUNDLE'", param_type="argument")
    if images is not None and not cpus:
        raise UsageError(
            "--images has no effect without --cpu", hint="add --cpu haswell, or leave --images out"
        )
    if no_latency and cpus:
        raise UsageError(
            "--no-latency has no effect with --cpu: emulated CPUs are not timed", hint="leave it out"
        )
    if cpus:
        _verify_emulated(bundle, cpus, images, reporter, quiet=quiet)
    else:
        _verify_here(bundle, reporter, latencies=not no_latency, quiet=quiet)


def _list_cpus(*, quiet: bool) -> None:
    from export_zoo.engines.emulation.cpus import CPUS

    outcome.current().document["cpus"] = [asdict(cpu) for cpu in CPUS.values()]
    if not quiet:
        for cpu in CPUS.values():
            click.echo(f"{cpu.name:<12} {cpu.machine:<8} {cpu.description}")


def _manifest(bundle: Path, reporter: ConsoleReporter) -> Manifest:
    """Read a bundle's manifest. Warns about random weights."""
    from export_zoo.engines.bundle.reader import read_manifest

    manifest = read_manifest(bundle)
    if manifest.recipe.source.weights.random:
        reporter.warn(RANDOM)
    return manifest


def _check_status(bundle: Path, manifest: Manifest) -> None:
    """Raise ParityError if the bundle failed its gate when it was exported, whatever this run found."""
    if manifest.status != "ok":
        raise ParityError(f"{bundle}: failed its parity gate when it was exported", hint="export again")


def _written(bundle: Path, attestation: Path | None) -> str:
    """Message that says where the attestation was written."""
    from export_zoo.engines.bundle.reader import ATTESTATIONS

    return f"attestation: {attestation or f'not written, {bundle / ATTESTATIONS} cannot be written to'}"


def _verify_here(bundle: Path, reporter: ConsoleReporter, *, latencies: bool, quiet: bool) -> None:
    from export_zoo.engines.parity.intervals import described
    from export_zoo.engines.parity.tasks import headline
    from export_zoo.engines.verification import verify as verification
    from export_zoo.engines.verification.gate import images_compared

    now = outcome.current()
    manifest = _manifest(bundle, reporter)
    held = manifest.artifacts.held_out
    patterns = held.patterns.count if held.patterns is not None else 0
    further = sum(part.count for part in held.sizes)
    per_engine = images_compared(held.count, manifest.recipe.batch, further, patterns)
    with reporter.stage("verify") as stage:
        with reporter.bar("verify", per_engine * len(manifest.artifacts.engines)) as progress:
            attestation, path = verification.verify(bundle, latencies=latencies, progress=progress)
        stage.detail = (
            f"{bundle}: hashes and logits of {len(attestation.engines)} engine(s), on {attestation.machine}"
        )
    for warning in attestation.warnings:
        reporter.warn(warning)
    now.document |= {
        "bundle": str(bundle),
        "attestation": str(path) if path else None,
        **attestation.model_dump(mode="json", include={"engines", "latencies"}),
    }
    if not quiet:
        with outcome.printing():
            for name, gate in attestation.engines.items():
                sqnr, (title, share) = gate.eager_metrics["sqnr"] or 0.0, headline(gate.eager_metrics)
                state = "FAILED" if gate.failures else attestation.states[name]
                images = f"{title} {share}{described(gate.eager_metrics)} of {gate.metrics['images']} images"
                timed = attestation.latencies.get(name)
                speed = f", {timed.speedup:.2f}x the speed of FP32" if timed is not None else ""
                click.echo(f"{name}: {state}, SQNR {sqnr:.1f} dB, {images}{speed}")
            click.echo(_written(bundle, path))
    failures = [f"{name}: {text}" for name, gate in attestation.engines.items() for text in gate.failures]
    if failures:
        raise ParityError(
            f"{bundle}: logits are outside the tolerance on this machine: {'; '.join(failures)}",
            hint="the bundle failed when it was exported, or libraries differ: compare `versions` in the manifest",
        )
    _check_status(bundle, manifest)
    _check_all_ran(bundle, [e.name for e in manifest.artifacts.engines if e.name not in attestation.engines])


def _check_all_ran(bundle: Path, not_run: Sequence[str]) -> None:
    """Raise TargetUnavailableError if engines could not be run. The others have their attestation by then."""
    if not_run:
        raise TargetUnavailableError(
            f"{bundle}: {', '.join(not_run)} cannot be run: see the warning",
            hint="export without it for such CPUs, or verify on another one",
        )


def _verify_emulated(
    bundle: Path, names: Sequence[str], images: int | None, reporter: ConsoleReporter, *, quiet: bool
) -> None:
    from export_zoo.engines.emulation import cpus
    from export_zoo.engines.emulation import verify as emulation
    from export_zoo.engines.precision.registry import PRECISIONS
    from export_zoo.engines.verification.verify import can_saturate

    chosen = [cpus.named(name) for name in dict.fromkeys(names)]
    for cpu in chosen:
        cpus.launch(cpu)  # reports missing tools before anything is run
    manifest = _manifest(bundle, reporter)
    count = emulation.IMAGES if images is None else images
    found, failures, not_run, saturating = [], [], [], False
    for cpu in chosen:
        try:
            with reporter.stage("emulate") as stage:
                total = emulation.images_run(manifest, cpu, count)
                with reporter.bar(f"verify on {cpu.name}", total) as progress:
                    attestation, path = emulation.verify_on(bundle, cpu, images=count, progress=progress)
                stage.detail = f"{bundle}: {len(attestation.engines)} engine(s) on {attestation.machine}"
        except TargetUnavailableError as error:
            if len(chosen) == 1:
                raise
            reporter.warn(f"{error.message}: {error.hint}")
            not_run.append(f"every engine on {cpu.name}")
            continue
        for warning in attestation.warnings:
            reporter.warn(warning)
        found.append({"attestation": str(path) if path else None, **attestation.model_dump(mode="json")})
        outcome.current().document |= {
            "bundle": str(bundle),
            "emulated": found,
        }  # kept if the next CPU cannot be run
        assert attestation.emulation is not None
        if not quiet:
            with outcome.printing():
                for name, gate in attestation.engines.items():
                    click.echo(emulation.describe(name, gate, attestation.emulation.host[name], cpu.name))
                click.echo(_written(bundle, path))
        failures += [
            f"{name} on {cpu.name}: {text}"
            for name, gate in attestation.engines.items()
            for text in gate.failures
        ]
        saturating |= any(
            engine.name in attestation.engines
            and attestation.engines[engine.name].failures
            and can_saturate(bundle / engine.file.path, engine.target)
            for engine in emulation.runnable(manifest, cpu)
            if PRECISIONS[engine.precision].integer_sums
        )
        not_run += [
            f"{engine.name} on {cpu.name}"
            for engine in emulation.runnable(manifest, cpu)
            if engine.name not in attestation.engines
        ]
    if failures:
        raise ParityError(
            f"{bundle}: logits are outside the tolerance on an emulated CPU: {'; '.join(failures)}",
            hint="export the bundle again with this version, whose INT8 cannot saturate; see docs/cpu.md"
            if saturating
            else "compare with `export-zoo verify` without --cpu, and with more --images; see docs/cpu.md",
        )
    _check_status(bundle, manifest)
    _check_all_ran(bundle, not_run)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
@quiet_option
@verbose_option
def inspect(bundle: Path, json_path: Path | None, quiet: bool, verbose: bool) -> None:
    """Show what a bundle holds, from its manifest. Runs nothing."""
    del json_path, verbose
    from export_zoo.engines.bundle import reader
    from export_zoo.exporter.page.facts import facts, results
    from export_zoo.exporter.run.report import print_table

    manifest = reader.read_manifest(bundle)
    attested = reader.attestations(bundle)
    outcome.current().document |= {
        "bundle": str(bundle),
        "manifest": manifest.model_dump(mode="json"),
        "attestations": {name: found.model_dump(mode="json") for name, found in attested.by_file.items()},
        "unreadable_attestations": attested.unreadable,
    }
    if quiet:
        return
    for name, text in facts(bundle, manifest).items():
        click.echo(f"{name:<12} {text}")
    for name, attestation in attested.by_file.items():
        click.echo(f"{'attestation':<12} {name}, {attestation.machine}: {results(attestation)}")
    for warning in (
        *manifest.warnings,
        *(f"{name} is left out: this version does not know it" for name in manifest.unknown_engines),
        *(f"{name} cannot be read, and is not used" for name in attested.unreadable),
        *(
            f"{name}: {text}"
            for name, attestation in attested.by_file.items()
            for text in attestation.warnings
        ),
    ):
        click.echo(f"{'warning':<12} {warning}")
    print_table(
        manifest.artifacts.engines, manifest.artifacts.refused, random=manifest.recipe.source.weights.random
    )


def _echo_served(model: Path, version: int, server: str, path: Path) -> None:
    click.echo(f"{model}: version {version}; serve it with `{server} {shlex.quote(str(path))}`")


def _repository_options(served: str) -> Callable[[Command], Command]:
    """Arguments and options of the commands that write a model repository.

    Args:
        served: the targets that the server can run, for the help.
    """
    options = (
        click.argument("bundle", type=click.Path(path_type=Path)),
        click.argument("repository", type=click.Path(path_type=Path, file_okay=False)),
        click.option(
            "--engine",
            metavar="NAME",
            help=f"Engine to serve. Default: the fastest verified one of {served}.",
        ),
        click.option("--name", metavar="NAME", help="Name of the model. Default: the network's."),
        click.option(
            "--version",
            type=int,
            default=1,
            show_default=True,
            metavar="N",
            help="Version of the model: the name of its folder.",
        ),
    )

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command(epilog=EXIT_CODES)
@_repository_options("onnxruntime and tensorrt")
@click.option(
    "--queue-delay",
    "delay_us",
    type=click.IntRange(0, 10**7),
    default=1000,
    show_default=True,
    metavar="US",
    help="Maximum time that a request waits to be batched with others, in microseconds.",
)
@click.option(
    "--cpu-graph",
    type=click.Choice(["safe", "exact", "vnni"]),
    default="safe",
    show_default=True,
    help="INT8 engine of onnxruntime. safe: the engine, refused if it can saturate on CPUs without VNNI. exact: uint8 "
    "weights, the same logits, slower on CPUs with VNNI. vnni: the engine as it is.",
)
@json_option
@quiet_option
@verbose_option
def triton(
    bundle: Path,
    repository: Path,
    engine: str | None,
    name: str | None,
    version: int,
    delay_us: int,
    cpu_graph: CpuGraph,
    json_path: Path | None,
    quiet: bool,
    verbose: bool,
) -> None:
    """Add a bundle's engine to a model repository of the Triton Inference Server."""
    del json_path, verbose
    from export_zoo.engines.bundle.triton import write_repository

    model = write_repository(
        bundle,
        repository,
        engine=engine,
        name=name,
        version=version,
        delay_us=delay_us,
        cpu_graph=cpu_graph,
    )
    outcome.current().document |= {"bundle": str(bundle), "model": str(model), "version": version}
    if not quiet:
        _echo_served(model, version, "tritonserver --model-repository", repository)


@click.command(epilog=EXIT_CODES)
@_repository_options("openvino")
@json_option
@quiet_option
@verbose_option
def ovms(
    bundle: Path,
    repository: Path,
    engine: str | None,
    name: str | None,
    version: int,
    json_path: Path | None,
    quiet: bool,
    verbose: bool,
) -> None:
    """Add a bundle's engine to a model repository of OpenVINO Model Server."""
    del json_path, verbose
    from export_zoo.engines.bundle.ovms import write_repository

    model = write_repository(bundle, repository, engine=engine, name=name, version=version)
    outcome.current().document |= {"bundle": str(bundle), "model": str(model), "version": version}
    if not quiet:
        _echo_served(model, version, "ovms --config_path", repository / "config.json")
