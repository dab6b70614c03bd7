"""The command ``layerfs bench``."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import humanize
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import layerfs.guest
from layerfs import filesystems, registry
from layerfs.backing import DIRECTORY
from layerfs.bench import calibration, runfile, runner, table, workload
from layerfs.bench.interrupts import Interrupts
from layerfs.bench.journal import Journal
from layerfs.bench.native import NATIVE
from layerfs.bench.profiles import PROFILES
from layerfs.bench.results import Run
from layerfs.bench.scratch import TMPFS, Device, stands_on, usual_filesystem
from layerfs.bench.target_name import driver_of, parse
from layerfs.cli.common import commas_option, json_option
from layerfs.cli.output import print_json, print_table
from layerfs.errors import EnvironmentUnfit, InvalidArgument, LayerfsError
from layerfs.guest import KINDS
from layerfs.kernel import userns
from layerfs.sizes import format_size, parse_size

PIPE_WIDTH = 200  # where no terminal tells its own
_BETWEEN_LINES = 30.0  # seconds
_GUEST_MEMORY, _MEMORY_OF_SIZES = 4 << 30, 6  # bytes; times the large file: daemons, and what is cached
_GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)


@click.command()
@commas_option("--driver", "drivers", default="all", help="Drivers with commas between, or all.")
@click.option("--profile", type=click.Choice(list(PROFILES)), help="How much [default: default; in guests: guest].")
@commas_option("--size", help="Size of the large file, from 4K on, such as 64M; several with commas [default: 256M].")
@click.option("--workload", "names", multiple=True, help="Only this workload; may be repeated, or given with commas.")
@click.option("--output", type=click.Path(path_type=Path), help="The run file [default: in ./results if it is there].")
@click.option("--rounds", type=click.IntRange(1), help="Samples of each workload [default: as many as it takes].")
@click.option("--precision", type=click.FloatRange(0.1, 100), metavar="%", help="Interval to reach [default: ±5 %].")
@click.option("--max-time", type=click.FloatRange(0), metavar="SECONDS", help="Then nothing more is repeated.")
@click.option("--calibrate", is_flag=True, help="Measure each driver twice: the noise of this machine.")
@click.option("--native/--no-native", default=True, help="Measure the bare directory in the same blocks [default: on].")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Of the order and of all data [default: a new one].")
@click.option("--backing", metavar="FS", help="For the drivers' data: dir, btrfs, ext4, xfs, xfs-noreflink, tmpfs.")
@click.option("--device", metavar="DEVICE", help="Make the backing of one driver on this device, not in a sparse file.")
@click.option("--force", is_flag=True, help="Even if the device holds data, which is lost then.")
@click.option("--memory", help="Cap on memory and page cache, such as 512M.")
@click.option("--scratch", type=click.Path(path_type=Path), help="Directory for the scratch stores [default: TMPDIR].")
@click.option(
    "--guest",
    type=click.Choice(KINDS),
    is_flag=False,
    flag_value=KINDS[0],
    help=f"Measure in a guest kernel of this kind [default kind: {KINDS[0]}].",
)
@json_option
@click.option("--list", "listing", is_flag=True, help="List the workloads and end.")
def bench(
    drivers: str,
    profile: str | None,
    size: str | None,
    names: tuple[str, ...],
    output: Path | None,
    rounds: int | None,
    precision: float | None,
    max_time: float | None,
    calibrate: bool,
    native: bool,
    seed: int | None,
    backing: str | None,
    device: str | None,
    force: bool,
    memory: str | None,
    scratch: Path | None,
    guest: str | None,
    as_json: bool,
    listing: bool,
) -> int | None:
    """Measure drivers on this machine.

    Makes scratch stores of its own, measures each workload on layers fresh for each sample, prints a table and keeps
    all samples in a run file, which `pytest-benchmark compare` opens too. Nothing else stays.

    \b
    Profiles:
      smoke    a few workloads on small files, below a minute
      default  plain I/O, copy-up, the life of layers, diff and apply, until intervals are narrow or time is spent
      guest    what tells most of that, to a wider interval: guest kernels are slow
      full     every workload with every size and parameter; when it was stopped, the same command goes on

    Below 1M, a sample takes many files of the size, and its figures are those of one. A --device is formatted for one
    driver, with the bare directory beside it, and wiped in the end. To measure several drivers on one disk, mount it
    and give a directory there as --scratch.

    \b
    Examples:
      layerfs bench --driver overlay2,btrfs --size 1G
      layerfs bench --driver all --workload seqwrite-new,reread --size 4K,64K,1M,512M
      layerfs bench --driver overlay2 --backing xfs --device /dev/nvme1n1
    """
    if listing:
        _list(as_json)
        return None
    usual = PROFILES[profile or ("guest" if guest or layerfs.guest.here() else "default")]
    sizes = [parse_size(part) for part in size.split(",")] if size else list(usual.sizes)
    if rounds:
        without_effect("with --rounds, which says how many samples there are", "precision", "max_time")
    if not device:
        without_effect("without --device", "force")
    if guest:
        without_effect("with --guest: a guest sees no device of its host", "device")
        runfile.check(output or _folder() / "run.json")
        return in_guest("bench", guest, max(sizes), output, scratch)
    seed = (1 if usual.resumes else secrets.randbelow(2**31)) if seed is None else seed
    place = (scratch or default_scratch()).absolute()
    wanted = [name for given in names for name in given.split(",") if name] or list(usual.workloads)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    userns.enter()
    runfile.check(output or _folder() / "run.json")
    with Interrupts() as interrupts:
        targets, left_out = _usable(drivers, place, errors)
        if calibrate:
            targets = calibration.twice(targets)
        if device:
            native &= _beside(device, targets, backing, errors)
        if native and NATIVE not in targets:
            targets.insert(0, NATIVE)
        plan = runner.Plan(
            targets=targets,
            workloads=_fitting(_possible(wanted, names, errors), sizes, seed, errors, full=usual.sweeps),
            size=max(sizes),
            rounds=rounds,
            seed=seed,
            place=place,
            filesystem=backing,
            device=Device(device, force) if device else None,
            precision=precision / 100 if precision else usual.precision,
            seconds=max_time if max_time is not None else usual.seconds and usual.seconds * len(targets),
            memory=parse_size(memory) if memory else None,
            goes_on=usual.resumes,
        )
        kept = Journal(_stopped_file(plan, output), plan.identity) if usual.resumes else None
        with bar(errors) as progress:
            run = runner.run(plan, interrupts, progress, kept)
        _report(run, left_out, output, as_json, errors)
        if kept:
            kept.finish()
    return None if all(failure.known for failure in run.failures) else LayerfsError.exit_code


def in_guest(command: str, kind: str, size: int, output: Path | None, scratch: Path | None) -> int:
    """Run the very same command in a guest, with the scratch stores on its disk.

    Args:
        command: its name; its options are those of the running one, but for the guest's own.
        size: bytes of the largest file, which memory is given for.
    """
    words = [command, *_given_options("guest", "scratch")]
    writable = {Path.cwd(), *([output.absolute().parent] if output else [])} - {Path("/")}
    return layerfs.guest.run(guest_request(words, kind, size, scratch or default_scratch(), writable))


def guest_request(
    words: Sequence[str], kind: str, size: int, place: Path, writable: Iterable[Path], kernel: str | None = None
) -> layerfs.guest.Request:
    """The guest for a command of layerfs that measures.

    Args:
        words: the command and its options; ``size``: bytes of the largest file, which memory is given for.
        place, writable, kernel: as `layerfs.guest.Request` has them.
    """
    return layerfs.guest.Request(
        command=(sys.executable, "-m", "layerfs.cli", *words),
        kind=kind,
        memory=max(_GUEST_MEMORY, _MEMORY_OF_SIZES * size),
        cpus=1 if kind == "uml" else len(os.sched_getaffinity(0)),
        place=place,
        kernel=kernel,
        writable=tuple(writable),
        progress=lambda what: click.echo(f"{what} …", err=True),
    )


def without_effect(why: str, *names: str) -> None:
    """Raise `InvalidArgument` where one of these options of the running command was given all the same."""
    context = click.get_current_context()
    for parameter in context.command.params:
        if parameter.name in names and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE:
            raise InvalidArgument(f"{parameter.opts[0]} has no effect {why}; leave it out")


def _given_options(*but: str) -> list[str]:
    """The options of the running command as they were given, except some."""
    context = click.get_current_context()
    words = []
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in but or context.get_parameter_source(name) not in _GIVEN:
            continue
        value = context.params[name]
        for each in value if isinstance(value, tuple) else [value]:
            if isinstance(each, bool):
                words += (parameter.opts if each else parameter.secondary_opts)[:1]
            else:
                words.append(f"{max(parameter.opts, key=len)}={each}")  # a short option takes no equals sign
    return words


def _possible(wanted: list[str], named: tuple[str, ...], errors: Console) -> list[str]:
    """Without the workloads that this host cannot measure, which are said; one that was named is refused."""
    known = workload.discover()
    reasons = {name: known[name].hindrance() for name in wanted or known if name in known}
    refused = {name: reason for name, reason in reasons.items() if reason}
    if named and refused:
        raise EnvironmentUnfit("; ".join(f"the workload {name!r}: {reason}" for name, reason in refused.items()))
    for name, reason in refused.items():
        errors.print(f"Left out: {name}: {reason}", markup=False)
    return [name for name in wanted or known if name not in refused]


def _fitting(
    names: Sequence[str], sizes: Sequence[int], seed: int, errors: Console, *, full: bool
) -> list[workload.Workload]:
    """The workloads with these sizes; what is not measured at one of them is said."""
    reasons: list[str] = []

    def leave_out(work: workload.Workload) -> None:
        label = work.label if "size" in work.swept else f"{work.label} at {format_size(work.size)}"
        reasons.append(f"{label}: {work.misfit}")

    works = workload.chosen(names, sizes, seed, full=full, left_out=leave_out)
    if not works:
        raise InvalidArgument(f"nothing is left to measure: {'; '.join(reasons)}; give a larger --size")
    for reason in reasons:
        errors.print(f"Left out: {reason}", markup=False)
    return works


def _stopped_file(plan: runner.Plan, output: Path | None) -> Path:
    """Where a full run keeps its samples until it is complete."""
    name = f"{output.name if output else 'full-' + ','.join(plan.targets)}.stopped"
    return (output.parent if output else _folder()) / name


def _folder() -> Path:
    """Where run files go that nobody named."""
    usual = Path("results")
    return usual if usual.is_dir() else Path()


def _list(as_json: bool) -> None:
    rows = [(name, kind.summary) for name, kind in workload.discover().items()]
    if as_json:
        print_json([{"name": name, "summary": summary} for name, summary in rows])
    else:
        print_table(("workload", "measures"), rows)


def default_backing() -> str:
    """For comparing drivers and versions: a fresh file system, on which nothing else has left its traces.

    To be asked before a user namespace makes anybody root.
    """
    return "ext4" if os.geteuid() == 0 else DIRECTORY


def default_scratch() -> Path:
    """TMPDIR, else /var/tmp, which unlike /tmp is on a disk everywhere (hier(7))."""
    place = Path("/var/tmp")  # noqa: S108 - the directory made in it has a random name and mode 0700
    return Path(tempfile.gettempdir()) if os.environ.get("TMPDIR") or not place.is_dir() else place


def _usable(given: str, place: Path, errors: Console) -> tuple[list[str], dict[str, str]]:
    """The drivers meant by ``--driver``; of all, those that cannot be used here are left out, with the reason."""
    names = registry.names() if given == "all" else list(dict.fromkeys(name for name in given.split(",") if name))
    probes = {name: registry.load(driver_of(name)).probe(place) for name in names if driver_of(name) != NATIVE}
    refused = {name: f"{p.reason}{f'; {p.remedy}' if p.remedy else ''}" for name, p in probes.items() if not p.usable}
    if given == "all":
        for name, reason in refused.items():
            errors.print(f"Left out: {name}: {reason}", markup=False)
    elif refused:
        raise EnvironmentUnfit("; ".join(f"the driver {name!r} does not work here: {r}" for name, r in refused.items()))
    usable = [name for name in names if name not in refused]
    if not usable:
        raise InvalidArgument("no driver to measure; give --driver a name that `layerfs drivers` calls usable")
    return usable, refused


def _beside(device: str, targets: Sequence[str], backing: str | None, errors: Console) -> bool:
    """Whether a bare directory can be measured on the device, beside the one driver that may be."""
    if len(targets) != 1 or NATIVE in targets:
        raise InvalidArgument(
            f"--device {device} is for one driver, and these are {', '.join(targets)}; name one, without --calibrate, "
            "or mount the device and give a directory there as --scratch"
        )
    driver, own, _ = parse(targets[0])
    kind = own or backing or usual_filesystem(driver)
    if kind in (DIRECTORY, TMPFS):
        raise InvalidArgument(f"a backing of kind {kind} is on no device; leave --device out, or name a file system")
    if not stands_on(driver, kind):
        raise InvalidArgument(f"{driver} does not work on {kind}; name another --backing, or leave it out")
    if kind not in filesystems.KINDS:
        errors.print(f"Left out: native: {kind} has no directory but in its volumes", markup=False)
    return kind in filesystems.KINDS


@contextmanager
def bar(errors: Console) -> Iterator[runner.Progress]:
    """A bar on a terminal, and elsewhere a line from time to time, so that a log shows that it goes on."""
    if not errors.is_terminal:
        yield _lines(errors)
        return
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda text, part: bar.update(task, description=text, completed=part)


def _lines(errors: Console) -> runner.Progress:
    begin = last = time.monotonic()

    def tell(text: str, part: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _BETWEEN_LINES:
            last = now
            errors.print(f"{part:4.0%} after {humanize.naturaldelta(now - begin)}: {text}", markup=False)

    return tell


def _report(run: Run, left_out: Mapping[str, str], output: Path | None, as_json: bool, errors: Console) -> None:
    contents = runfile.document(run, {"left_out": left_out})
    file = output or _folder() / runfile.default_name(run.targets, run.size, run.started)
    runfile.write(contents, file)
    if as_json:
        print_json(contents)
    else:
        Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table.render(run))
    for failure in dict.fromkeys(run.failures):
        errors.print(f"{'Left out' if failure.known else 'Failed'}: {failure.words}", markup=False)
    for warning in run.warnings:
        errors.print(f"Note: {warning}", markup=False)
    click.echo(f"Run file: {file}", err=as_json)
