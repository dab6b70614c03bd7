"""The command ``layerfs claims``."""

from __future__ import annotations

import secrets
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console

from layerfs import registry
from layerfs.bench import runfile, runner
from layerfs.bench.claims import catalogue, evidence, plan, scoreboard
from layerfs.bench.claims.catalogue import LARGEST, Catalogue, Claim, Scale
from layerfs.bench.claims.evidence import Evidence
from layerfs.bench.claims.judge import judge
from layerfs.bench.cli import PIPE_WIDTH, bar, default_backing, default_scratch, in_guest
from layerfs.bench.interrupts import Interrupts
from layerfs.bench.journal import Journal
from layerfs.bench.native import NATIVE
from layerfs.bench.profiles import PROFILES
from layerfs.bench.results import Run
from layerfs.bench.target_name import driver_of
from layerfs.bench.workload import discover
from layerfs.cli.common import commas_option, json_option
from layerfs.cli.output import print_json, print_table
from layerfs.errors import InvalidArgument
from layerfs.guest import KINDS
from layerfs.kernel import userns
from layerfs.sizes import parse_size

_FEWEST_ROUNDS = 5  # below that no difference of times is ever significant
_SECONDS = {"smoke": 0.0, "default": 1800.0, "full": None}  # after which nothing more is repeated

_file = click.Path(path_type=Path)


@click.command()
@click.argument("runs", metavar="[RUN]...", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--only", "ids", multiple=True, metavar="ID", help="Only this claim; may be repeated, or with commas.")
@click.option("--list", "listing", is_flag=True, help="List the claims with their rules and end.")
@click.option("--profile", type=click.Choice(list(_SECONDS)), default="default", show_default=True, help="How much.")
@commas_option("--driver", "drivers", default="all", help="Drivers with commas between, or all.")
@click.option("--size", help="Size of the large file [default: the profile's: 16M, 256M or 1G].")
@click.option("--rounds", type=click.IntRange(1), help="Samples of each figure [default: as many as it takes].")
@click.option("--max-time", type=click.FloatRange(0), metavar="SECONDS", help="Then nothing more is repeated.")
@click.option("--backing", metavar="FS", help="As for layerfs bench [default: ext4 as root, else dir].")
@click.option("--scratch", type=_file, help="As for layerfs bench.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="As for layerfs bench.")
@click.option(
    "--guest",
    type=click.Choice(KINDS),
    is_flag=False,
    flag_value=KINDS[0],
    help=f"Measure in a guest kernel, where all drivers work [default kind: {KINDS[0]}].",
)
@click.option("-o", "--output", type=_file, help="The verdict file [default: in ./results if it is there].")
@json_option
def claims(
    runs: tuple[Path, ...],
    ids: tuple[str, ...],
    listing: bool,
    profile: str,
    drivers: str,
    size: str | None,
    rounds: int | None,
    max_time: float | None,
    backing: str | None,
    scratch: Path | None,
    seed: int | None,
    guest: str | None,
    output: Path | None,
    as_json: bool,
) -> int | None:
    """Test what others have claimed of storage drivers.

    Measures what the claims are about, or judges by the run files given, and says of each claim whether it is
    reproduced, partly so, refuted, cannot be told, or cannot be tested here, beside the source's own figure. The
    claims and the rules that decide were written before; --list shows them. Each takes both sides of a comparison from
    one run. A stopped run (but for smoke) goes on with the same command.

    \b
    Examples:
      layerfs claims --profile smoke --only docs-overlay2-shares,docs-devicemapper-64k
      layerfs claims --guest                   all drivers on one kernel
      layerfs claims native.json guest.json    judge by runs that were kept
    """
    known = catalogue.load()
    chosen = known.chosen([name for given in ids for name in given.split(",") if name])
    if listing:
        _list(chosen, as_json)
        return None
    scale = _scale(known, profile, size)
    folder = Path("results") if Path("results").is_dir() else Path()
    verdicts = output or folder / f"{datetime.now(UTC).astimezone():%Y%m%d-%H%M%S}-claims.json"
    runfile.check(verdicts)
    if guest and not runs:
        return in_guest("claims", guest, scale["large"], output, scratch)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    if runs:
        found = [evidence.read(file, scale) for file in runs]
    else:
        file = verdicts.with_name(f"{verdicts.stem}-run.json")
        runfile.check(file)
        found = [_measured(chosen, scale, profile, drivers, rounds, max_time, backing, scratch, seed, file, errors)]
    judgements = [judge(claim, found) for claim in chosen]
    contents = scoreboard.document(judgements, found)
    runfile.write(contents, verdicts)
    if as_json:
        print_json(contents)
    else:
        Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(scoreboard.render(judgements))
    click.echo(f"Verdict file: {verdicts}", err=as_json)
    return None


def _list(chosen: Sequence[Claim], as_json: bool) -> None:
    if as_json:
        print_json(scoreboard.listed(chosen))
        return
    rows = []
    for claim in chosen:
        rows.append((claim.id, claim.says, claim.source))
        rows += [("", f"- {test.shows}", test.rule) for test in claim.tests]
        if claim.cannot:
            rows.append(("", "- cannot be tested", claim.cannot))
    print_table(("claim", "says", "source, or rule"), rows)


def _scale(known: Catalogue, profile: str, size: str | None) -> Scale:
    scale = dict(known.scales[profile])
    if size:
        scale["large"] = parse_size(size)
        scale[LARGEST] = max(scale[LARGEST], scale["large"])
    return scale


def _measured(
    chosen: Sequence[Claim],
    scale: Scale,
    profile: str,
    drivers: str,
    rounds: int | None,
    max_time: float | None,
    backing: str | None,
    scratch: Path | None,
    seed: int | None,
    file: Path,
    errors: Console,
) -> Evidence:
    """Measure what the claims need, and keep it in the run file ``file``."""
    place = (scratch or default_scratch()).absolute()
    backing = backing or default_backing()
    usual = PROFILES[profile]
    resumes = profile != "smoke"
    seed = (1 if resumes else secrets.randbelow(2**31)) if seed is None else seed
    userns.enter()
    left_out = _left_out(chosen, drivers, place)
    for name, reason in left_out.items():
        errors.print(f"Left out: {name}: {reason}", markup=False)
    experiments = plan.union(chosen, scale, left_out, seed)
    own = {"claims": {"profile": profile, "scale": dict(scale), "left_out": left_out}}
    if not experiments.workloads:
        return Evidence("nothing measured", scale, {}, "", [], [], left_out)
    wanted = runner.Plan(
        targets=experiments.targets,
        workloads=experiments.workloads,
        size=scale["large"],
        rounds=rounds,
        seed=seed,
        place=place,
        filesystem=backing,
        precision=usual.precision,
        seconds=_SECONDS[profile] if max_time is None else max_time,
        fewest=_FEWEST_ROUNDS,
        measured_on=experiments.measured_on,
        goes_on=True,
    )
    kept = Journal(file.with_name(f"claims-{profile}.stopped"), wanted.identity) if resumes else None
    with Interrupts() as interrupts, bar(errors) as progress:
        run = runner.run(wanted, interrupts, progress, kept)
    contents = runfile.document(run, own)
    runfile.write(contents, file)
    if kept:
        kept.finish()
    _tell(run, file, errors)
    return evidence.parse(contents, file.name, scale)


def _left_out(chosen: Sequence[Claim], drivers: str, place: Path) -> dict[str, str]:
    """Drivers and workloads that the claims need and that cannot be used here, with the reason."""
    cells = [cell for claim in chosen for test in claim.tests for cell in test.cells]
    named = None if drivers == "all" else {name for name in drivers.split(",") if name}
    unknown = sorted((named or set()) - set(registry.names()))
    if unknown:
        raise InvalidArgument(f"there is no driver {unknown[0]!r}; the known ones are {', '.join(registry.names())}")
    reasons: dict[str, str] = {}
    for driver in sorted({driver_of(cell.target) for cell in cells} - {NATIVE}):
        probe = registry.load(driver).probe(place)
        if named is not None and driver not in named:
            reasons[driver] = "not chosen with --driver"
        elif not probe.usable:
            reasons[driver] = f"{probe.reason}{f'; {probe.remedy}' if probe.remedy else ''}"
    for name in sorted({cell.workload for cell in cells}):
        kind = discover()[name]
        missing = [program for program in kind.programs if not shutil.which(program)]
        if reason := kind.hindrance() or "".join(f"{program} is not installed" for program in missing):
            reasons[name] = reason
    return reasons


def _tell(run: Run, file: Path, errors: Console) -> None:
    for note in dict.fromkeys([*run.warnings, *(failure.words for failure in run.failures)]):
        errors.print(f"Note: {note}", markup=False)
    errors.print(f"Run file: {file}", markup=False)
