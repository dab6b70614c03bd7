"""The commands ``layerfs compare`` and ``layerfs gate``."""

from __future__ import annotations

import secrets
import sys
from contextlib import ExitStack
from pathlib import Path

import click
from rich.console import Console

from layerfs.bench import interleaved, recorded, runfile, verdicts
from layerfs.bench.cli import PIPE_WIDTH, bar, default_backing, default_scratch, without_effect
from layerfs.bench.compare import SMALLEST_THRESHOLD, Comparison, Verdict, compare
from layerfs.bench.recorded import Key, Recorded, Subject
from layerfs.cli.common import commas_option, json_option
from layerfs.cli.output import print_json
from layerfs.errors import InvalidArgument, refused
from layerfs.guest import KINDS
from layerfs.sizes import parse_size

EXIT_REGRESSION, EXIT_UNCLEAR = 1, 5
_MEASURING = (
    *("guest", "drivers", "size", "names", "backing", "scratch", "rounds", "seconds", "seed", "calibrate", "keep"),
)
"""Options about what is measured, by their names here."""

_file = click.Path(path_type=Path)
_found = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("compare")
@click.argument("base", type=_found)
@click.argument("head", type=_found)
@click.option(
    "--calibration", type=_found, help="Run file of `layerfs bench --calibrate` [default: BASE, if it is one]."
)
@click.option("--force", is_flag=True, help="Compare runs of different machines, too.")
@json_option
def compare_command(base: Path, head: Path, calibration: Path | None, force: bool, as_json: bool) -> None:
    """Compare two run files, figure by figure.

    Says what is worse, better, the same or cannot be told; `layerfs gate` makes exit codes of it.
    """
    _print(_of_files(base, head, calibration, SMALLEST_THRESHOLD, force=force), as_json)


@click.command("gate")
@click.argument("base", type=_file, required=False)
@click.argument("head", type=_file, required=False)
@click.option("--build-base", metavar="CMD", help="Makes the base's environment in the directory {} (see below).")
@click.option("--build-head", metavar="CMD", help="The same for the head.")
@click.option("--base-kernel", metavar="IMAGE", help="Measure in guests instead: the base's kernel.")
@click.option("--head-kernel", metavar="IMAGE", help="The head's kernel.")
@click.option("--guest", type=click.Choice(KINDS), default=KINDS[0], show_default=True, help="Their kind of guest.")
@commas_option("--driver", "drivers", default="all", help="What to measure; as for layerfs bench.")
@click.option("--size", default="64M", show_default=True, help="As for layerfs bench.")
@click.option("--workload", "names", multiple=True, help="As for layerfs bench.")
@click.option("--backing", metavar="FS", help="As for layerfs bench [default: ext4 as root, else dir].")
@click.option("--scratch", type=_file, help="As for layerfs bench.")
@click.option("--rounds", type=click.IntRange(5), default=10, show_default=True, help="Samples of each side at least.")
@click.option(
    "--max-time",
    "seconds",
    type=click.FloatRange(0),
    metavar="SECONDS",
    default=600,
    show_default=True,
    help="For more rounds of what cannot be told yet.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="As for layerfs bench.")
@click.option("--calibrate/--no-calibrate", default=True, help="Measure the base twice: its noise [default: on].")
@click.option("--calibration", type=_file, help="Run file to take thresholds from, where BASE and HEAD are run files.")
@click.option("--threshold", type=click.FloatRange(0), metavar="%", help="Slowdown always tolerated [default: 5 %].")
@click.option("--strict", is_flag=True, help="Exit with 5 where something cannot be told.")
@click.option("--force", is_flag=True, help="Compare runs of different machines, too.")
@click.option("--junit", type=_file, help="Write JUnit XML there.")
@click.option("--markdown", type=_file, help="Append Markdown there, such as to $GITHUB_STEP_SUMMARY.")
@click.option("--keep", type=_file, help="Directory for the run files of every round.")
@json_option
def gate(
    base: Path | None,
    head: Path | None,
    build_base: str | None,
    build_head: str | None,
    base_kernel: str | None,
    head_kernel: str | None,
    guest: str,
    drivers: str,
    size: str,
    names: tuple[str, ...],
    backing: str | None,
    scratch: Path | None,
    rounds: int,
    seconds: float,
    seed: int | None,
    calibrate: bool,
    calibration: Path | None,
    threshold: float | None,
    strict: bool,
    force: bool,
    junit: Path | None,
    markdown: Path | None,
    keep: Path | None,
    as_json: bool,
) -> int:
    """Fail where HEAD is slower than BASE, or does more.

    BASE and HEAD are run files of one machine, or directories: Python environments with layerfs, which are measured
    in turn in this one job. --build-base and --build-head make such environments. With --base-kernel and --head-kernel,
    the two sides are kernels: each round is a guest of its own, and its kernel is all that differs.

    \b
    Exit codes:
      0  nothing is worse
      1  a regression, or something that works in the base and fails in the head
      2  the command line is wrong, or nothing can be told: too few samples, or nothing that was measured alike
      3  this host lacks something, for the base as well, or the run files are of different machines
      4  a build or a benchmark failed
      5  some figures cannot be told: too noisy, too few samples, or not in both alike (only with --strict, else 0)

    \b
    Example, in a checkout of the head:
      layerfs gate --driver overlay2 --markdown "$GITHUB_STEP_SUMMARY" \\
        --build-base 'sh -c "git worktree add {}.src origin/main && python3 -m venv {} && {}/bin/pip install {}.src"' \\
        --build-head 'sh -c "python3 -m venv {} && {}/bin/pip install ."'

    \b
    Two kernels, of User-Mode Linux and of QEMU:
      layerfs gate --driver overlay2 --base-kernel /usr/bin/linux.uml --head-kernel ./linux
      layerfs gate --driver all --guest qemu --base-kernel ./old/boot/vmlinuz --head-kernel ./new/boot/vmlinuz
    """
    smallest = SMALLEST_THRESHOLD if threshold is None else threshold / 100
    if build_base and base and not head:
        base, head = None, base  # the one that is left to name
    builds, kernels = (build_base, build_head), (base_kernel, head_kernel)
    for file in (junit, markdown, keep and keep / "000-base.json"):
        if file:
            runfile.check(file)
    if base and head and base.is_file() and head.is_file() and not any((*builds, *kernels)):
        without_effect("on two run files, for nothing is measured", *_MEASURING)
        comparison = _of_files(base, head, calibration, smallest, force=force)
    else:
        without_effect("where both sides are measured", "calibration", *(() if any(kernels) else ("guest",)))
        largest = max(map(parse_size, size.split(",")))
        options = [f"--driver={drivers}", f"--size={size}", f"--backing={backing or default_backing()}"]
        place = (scratch or default_scratch()).absolute()
        with ExitStack() as stack:
            if any(kernels):
                if base or head or any(builds) or not all(kernels):
                    raise InvalidArgument("give --base-kernel and --head-kernel, and no other sides beside them")
                sides = [interleaved.on_kernel(guest, str(kernel), largest, place) for kernel in kernels]
            else:
                options += [f"--scratch={place}"] if scratch else []
                given = ((build_base, base, "base"), (build_head, head, "head"))
                sides = [
                    interleaved.in_environment(
                        stack.enter_context(interleaved.built(command, _needed(there, command, side), side))
                    )
                    for command, there, side in given
                ]
            progress = stack.enter_context(bar(Console(stderr=True, highlight=False)))

            def judged(found: interleaved.Measured) -> Comparison:
                return compare(found.base, found.head, found.thresholds, smallest=smallest, force=force)

            measured = interleaved.measure(
                sides[0],
                sides[1],
                options,
                names,
                rounds=rounds,
                seed=secrets.randbelow(2**30) if seed is None else seed,
                calibrate=calibrate,
                untold=lambda found: judged(found).untold,
                seconds=seconds,
                keep=keep,
                progress=progress,
                ignoring=("kernel",) if any(kernels) else (),
            )
            comparison = judged(measured)
    _print(comparison, as_json)
    _write(comparison, junit, markdown)
    if comparison.verdict is Verdict.WORSE:
        return EXIT_REGRESSION
    if comparison.blind:
        raise InvalidArgument(
            f"no time has enough samples to be told from chance, so this gate cannot fail; measure both sides with "
            f"--rounds {comparison.fewest} at least"
        )
    return EXIT_UNCLEAR if strict and comparison.verdict is Verdict.UNCLEAR else 0


def _needed(given: Path | None, command: str | None, side: str) -> Path | None:
    if (given is None) == (command is None):
        raise InvalidArgument(f"give the {side} as a directory or with --build-{side}, or give two run files")
    if given is not None and not given.is_dir():
        raise InvalidArgument(f"{str(given)!r} is no environment's directory; two run files may be given instead")
    return given


def _of_files(base: Path, head: Path, calibration: Path | None, smallest: float, *, force: bool) -> Comparison:
    first, second = recorded.read(base).joined(), recorded.read(head).joined()
    calibrated = recorded.read(calibration) if calibration else first
    if calibration and not calibrated.thresholds:
        raise InvalidArgument(f"{str(calibration)!r} holds no calibration; make one with layerfs bench --calibrate")
    return compare(first, second, _fitting(calibrated, first, force=force), smallest=smallest, force=force)


def _fitting(calibrated: Recorded, base: Recorded, *, force: bool) -> dict[Key, float]:
    """The thresholds of what both measured alike."""
    if recorded.differences(calibrated.machine, base.machine) and not force:
        raise InvalidArgument(f"the calibration {calibrated.name!r} is of another machine than {base.name!r}")
    unlike = recorded.unlike(calibrated, base)
    return {key: part for key, part in calibrated.thresholds.items() if Subject.of(key) not in unlike}


def _print(comparison: Comparison, as_json: bool) -> None:
    if as_json:
        print_json(verdicts.as_json(comparison))
        return
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(verdicts.table(comparison))
    for warning in comparison.warnings:
        click.echo(f"Note: {warning}", err=True)


def _write(comparison: Comparison, junit: Path | None, markdown: Path | None) -> None:
    for file, mode, text in ((junit, "w", verdicts.junit), (markdown, "a", verdicts.markdown)):
        if file is not None:
            try:
                with open(file, mode, encoding="utf-8") as out:  # whatever the locale
                    out.write(text(comparison))
            except OSError as error:
                raise refused(f"writing {str(file)!r}", error) from error
