"""Reports of run files: what is drawn, what is left out and said, and run files from strangers."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import random
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from layerfs import registry
from layerfs.bench import recorded, runfile
from layerfs.bench.claims import evidence
from layerfs.bench.cli import bench
from layerfs.bench.report import article, axes, board, claims, data, page, panels, svg, tables
from layerfs.bench.report.data import Machine
from layerfs.bench.results import Run, Sample
from layerfs.bench.workload import Timing, chosen
from layerfs.errors import InvalidArgument

_MIB = 1 << 20
_LAYERFS = [sys.executable, "-m", "layerfs.cli"]
_BEGIN = datetime(2026, 1, 31, tzinfo=UTC)
_FACTS = {
    "machine": {"processor": "x", "cpus": 2, "kernel": "6.1"},
    "kernel": "Linux 6.1",
    "cpus": 2,
    "processor": "x",
    "memory": {"total": 4 << 30, "available": 3 << 30, "limit": None},
    "vm": {"dirty_ratio": "20", "dirty_background_ratio": "10", "dirty_bytes": "0", "dirty_background_bytes": "0"},
}
_TIMES = {"native": 0.01, "overlay2": 0.02, "btrfs": 0.04}

Make = Callable[..., dict[str, Any]]


def _document(
    names: Sequence[str],
    sizes: Sequence[int] = (16 * _MIB,),
    *,
    times: Mapping[str, float] = _TIMES,
    started: datetime = _BEGIN,
    machine: Mapping[str, object] = {},
    seed: int = 1,
    full: bool = False,
) -> dict[str, Any]:
    """A run file of these workloads, with what each of them keeps, but for the time that it would take."""
    source = random.Random(seed)
    samples = []
    for work in chosen(names, sizes, 1, full=full):
        for target, middle in times.items():
            if target == "native" and work.about_layers:
                continue
            for number in range(6):
                seconds = middle * source.gauss(1, 0.05) * math.sqrt(work.size / _MIB)
                samples.append(Sample(target, work, number, _timings(work.name, work.size, seconds), _COUNTERS, None))
    facts = {
        **_FACTS,
        "machine": {**_FACTS["machine"], **machine},  # type: ignore[dict-item]
        "targets": {target: {"backing": {"filesystem": "ext4"}, "options": {}} for target in times},
    }
    run = Run(started, max(sizes), 7, list(times), samples, facts, ["it was hot"])
    contents: dict[str, Any] = json.loads(json.dumps(runfile.document(run)))
    return contents


_COUNTERS = {"bytes copied up": 16 * _MIB, "bytes when fresh": 4096, "bytes cached": 64 * _MIB, "bytes of one layer": 1}
_STEPS = {
    "copyup-first-write": ("open", "first write", "fsync", "second write"),
    "cache-share": ("first reader", "further reader"),
    "seqwrite-new": ("write",),
    "reread": ("first read", "second read"),
    "knee-sweep": ("write", "read"),
    "start-stop-density": ("up", "down"),
    "randread": ("read",),
    "copyup-crossover": ("change",),
}


def _timings(name: str, size: int, seconds: float) -> list[Timing]:
    if name == "start-stop-density":
        course = [seconds * (number + 1) / 20 for number in range(20)]
        return [Timing(step, seconds, operations=20, course=course) for step in _STEPS[name]]
    moved = size if name in ("seqwrite-new", "reread", "knee-sweep", "cache-share") else 0
    latencies = {seconds / 100 * (1 + part / 10): 100 - part for part in range(50)} if name == "randread" else {}
    done = 1000 if name == "randread" else 0
    return [Timing(step, seconds, bytes=moved, operations=done, latencies=latencies) for step in _STEPS[name]]


def _machines(*documents: dict[str, Any]) -> list[Machine]:
    return data.grouped(data.parse(document, f"run {number}") for number, document in enumerate(documents))


def _all() -> list[dict[str, Any]]:
    """Enough for every panel."""
    sizes = [_MIB, 16 * _MIB]
    days = [_BEGIN + timedelta(days=number) for number in range(10)]
    return [
        _document(["seqwrite-new", "reread", "randread", "copyup-first-write"], sizes),
        _document(["knee-sweep", "cache-share", "copyup-crossover", "start-stop-density"], sizes, full=True),
        *(
            _document(
                ["copyup-first-write"],
                times={**_TIMES, "overlay2": 0.04 if number > 5 else 0.02},
                started=day,
                seed=number,
            )
            for number, day in enumerate(days)
        ),
    ]


@pytest.fixture(scope="module")
def machine() -> Machine:
    """Of which every panel can be drawn."""
    (found,) = _machines(*_all())
    return found


class _Page(HTMLParser):
    """Tags with their attributes, and the text that is shown."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def _render(machines: Sequence[Machine], judged: Sequence[claims.Claim] = ()) -> str:
    sections = [(machine, panels.all_panels(machine)) for machine in machines]
    return page.render(sections, judged, {number: tables.html(machine) for number, machine in enumerate(machines)})


# What is drawn


def test_every_panel_is_drawn_where_its_figures_are_there(machine: Machine) -> None:
    shown = panels.all_panels(machine)
    assert [panel.name for panel in shown if not panel.pictures or panel.wanted] == []
    names = {name for panel in shown for name in panel.pictures}
    assert {"heat", "copy-up", "copied", "crossover", "size-seqwrite-new", "cache", "density"} <= names
    assert "memory-write-256M" in names
    assert "history-copyup-first-write-open" in names


def test_what_a_run_does_not_hold_is_left_out_and_the_command_that_would_measure_it_is_one() -> None:
    (machine,) = _machines(_document(["copyup-first-write"]))
    shown = {panel.name: panel for panel in panels.all_panels(machine)}
    assert shown["copy-up"].pictures
    missing = [panel for panel in shown.values() if panel.wanted]
    assert {panel.name for panel in missing} == {"size", "memory", "latency", "cache", "density", "history"}
    text = _Page(_render([machine])).text
    for panel in missing:
        assert panel.wanted in text
        command = shlex.split(panel.wanted.partition(", ")[0])
        assert command[:2] == ["layerfs", "bench"]
        context = bench.make_context("bench", command[2:])
        names = [name for given in context.params["names"] for name in given.split(",")]
        assert chosen(names, [_MIB], 1)


def test_the_copy_up_picture_has_one_row_of_each_driver_for_each_step() -> None:
    document = _document(["copyup-first-write"])
    deep = copy.deepcopy(document["benchmarks"])
    for one in deep:
        one["params"]["depth"] = 16
    document["benchmarks"] += deep
    picture = panels.copy_up(*_machines(document)).pictures["copy-up"]
    assert [element.text for element in picture.iter()].count("overlay2") == 4
    document["benchmarks"] = deep
    shown = panels.copy_up(*_machines(document))
    assert not shown.pictures
    assert shown.wanted


def test_each_figure_has_its_interval_and_each_driver_one_colour_everywhere(machine: Machine) -> None:
    for panel in panels.all_panels(machine):
        for name, picture in panel.pictures.items():
            classes = {word for one in picture.iter() for word in one.attrib.get("class", "").split()}
            for target in ("overlay2", "btrfs"):
                marked = [
                    one
                    for one in picture.iter()
                    if (about := one.find("title")) is not None
                    and f"{target}" in str(about.text).split(",")[0].split(":")[0]
                ]
                for one in marked:
                    words = one.attrib.get("class", "").split()
                    assert f"d{svg.colour(target)}" in words or {"worse", "better"} & set(words), (name, target)
            if name.startswith(("size", "copy-up", "history", "memory")):
                assert "whisker" in classes, name
    assert len({svg.colour(name) for name in registry.names()}) == len(registry.names())


def test_the_size_sweep_marks_memory_and_shows_the_articles_points() -> None:
    big = [256 * _MIB, 4096 * _MIB]
    (machine,) = _machines(_document(["seqwrite-new"], big))
    picture = panels.size_sweep(machine).pictures["size-seqwrite-new"]
    words = [one.text for one in picture.iter("text")]
    assert {"memory", "dirty limit", "write-back begins"} <= set(words)
    theirs = [one for one in picture.iter("path") if "theirs" in one.attrib.get("class", "")]
    assert len(theirs) == 2, "overlay2 and btrfs; the article has no bare directory"
    assert all(one.attrib["d"].count(",") == 19 for one in theirs)


def _given(document: dict[str, Any], size: int, **parameters: object) -> None:
    """The figures of a size are of other parameters."""
    for benchmark in document["benchmarks"]:
        if benchmark["params"]["size"] == size:
            benchmark["params"] |= parameters


def test_a_size_sweep_joins_no_variants_and_names_what_it_shows() -> None:
    sizes = [_MIB, 4 * _MIB, 16 * _MIB, 64 * _MIB]
    document = _document(["seqwrite-new"], sizes)
    for size, block, fsync in zip(sizes, (4096, 4096, 65536, 65536), (True, True, False, False), strict=True):
        _given(document, size, block=block, fsync=fsync)
    (machine,) = _machines(document)
    pictures = panels.size_sweep(machine).pictures
    assert {name: _title(picture) for name, picture in pictures.items()} == {
        "size-seqwrite-new-64k-no-fsync": "Write a new file in 64K blocks, no fsync",
        "size-seqwrite-new-4k-fsync": "Write a new file in 4K blocks, then fsync",
    }
    for picture in pictures.values():
        for target in _TIMES:
            shown = [one.text for one in picture.iter("title") if str(one.text).startswith(f"{target},")]
            assert len(shown) == 2, shown
    _given(document, sizes[1], block=16384)
    _given(document, sizes[3], block=16384)
    (machine,) = _machines(document)
    assert panels.size_sweep(machine).pictures == {}, "one size of each variant is no sweep"


@pytest.mark.parametrize(
    ("panel", "name", "work", "parameters", "words"),
    [
        (panels.memory_sweep, "memory-write-1G", "knee-sweep", {"block": 4096}, "(1M)"),
        (panels.cache_sharing, "cache", "cache-share", {"readers": 4}, "16M file"),
        (panels.density, "density", "start-stop-density", {"tasks": 7}, "tasks"),
        (panels.copy_up, "crossover", "copyup-crossover", {"state": "cold"}, "warm"),
    ],
)
def test_other_panels_name_a_variant_too(
    panel: Callable[[Machine], panels.Panel], name: str, work: str, parameters: Mapping[str, object], words: str
) -> None:
    document = _document([work], [_MIB, 16 * _MIB], full=True)
    other = copy.deepcopy(document)
    for size in (_MIB, 16 * _MIB):
        _given(other, size, **parameters)
    other["benchmarks"] = [b for b in other["benchmarks"] if b["params"]["size"] == _MIB]
    document["benchmarks"] = other["benchmarks"] + document["benchmarks"]
    (machine,) = _machines(document)
    assert words in _title(panel(machine).pictures[name])


def _title(picture: ElementTree.Element) -> str:
    return next(str(one.text) for one in picture.iter("text") if one.attrib.get("class") == "title")


def test_the_articles_points_are_all_there_but_for_the_column_that_is_void() -> None:
    points = article.points()
    assert sum(map(len, points.values())) == 570 - 19
    assert ("read", "aufs") not in points
    assert {driver for _, driver in points} <= set(registry.names())
    assert points["write", "overlay2"][0] == (4096, 32526 * 1024)


def test_a_ratio_that_may_be_one_is_marked_and_a_clear_one_is_not() -> None:
    times = {"native": 0.02, "overlay2": 0.02, "btrfs": 0.04}
    (machine,) = _machines(_document(["seqwrite-new"], times=times))
    words = [one.text or "" for one in panels.heat_map(machine).pictures["heat"].iter("text")]
    ratios = [word for word in words if "×" in word]
    assert ratios[0].startswith("~1.0") or ratios[0].startswith("~0.9")
    assert re.fullmatch(r"[12]\.\d\d×", ratios[1])


def test_targets_with_options_are_told_apart_in_the_colour_of_their_driver() -> None:
    times = {"native": 0.01, "overlay2": 0.02, "overlay2 volatile=on backing=xfs": 0.01}
    (machine,) = _machines(_document(["seqwrite-new", "copyup-first-write"], [_MIB, 4 * _MIB], times=times))
    for panel in panels.all_panels(machine):
        for picture in panel.pictures.values():
            words = " ".join(one.text or "" for one in picture.iter("text"))
            assert "volatile=on" in words, panel.name
    assert svg.colour("overlay2") == svg.colour("overlay2 volatile=on backing=xfs")
    assert svg.is_hollow("overlay2 volatile=on backing=xfs")
    assert not svg.is_hollow("overlay2")


def test_counters_tell_copies_in_the_cache() -> None:
    (machine,) = _machines(_document(["cache-share"], [16 * _MIB], full=True))
    (picture,) = panels.cache_sharing(machine).pictures.values()
    titles = [str(about.text) for one in picture.iter() if (about := one.find("title")) is not None]
    assert any("4 (4 to 4)" in title for title in titles), titles


def test_pictures_stand_alone_and_are_well_formed(machine: Machine) -> None:
    for panel in panels.all_panels(machine):
        for picture in panel.pictures.values():
            text = svg.standalone(picture)
            root = ElementTree.fromstring(text)  # noqa: S314 - our own
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            assert "prefers-color-scheme:dark" in text
            width = float(root.attrib["width"])
            for one in root.iter("{http://www.w3.org/2000/svg}text"):
                assert 0 <= float(one.attrib["x"]) <= width, (panel.name, one.text)


def test_the_page_needs_nothing_from_elsewhere_and_fits_a_phone(machine: Machine) -> None:
    text = _render([machine])
    found = _Page(text)
    assert not {"script", "img", "iframe", "object", "link", "a"} & {tag for tag, _ in found.tags}
    assert not re.search(r"https?:|url\(|@import", text)
    assert any(about.get("name") == "viewport" for tag, about in found.tags if tag == "meta")
    boxes = [str(about["viewbox"]).split() for tag, about in found.tags if tag == "svg"]
    assert boxes
    assert all(float(box[2]) <= 420 for box in boxes), "wider ones would have small letters on a phone"


# Several runs


def test_runs_of_one_machine_are_put_together_and_of_each_figure_the_newest_counts() -> None:
    slow = {target: 10 * seconds for target, seconds in _TIMES.items()}
    old = _document(["seqwrite-new"], times=slow)
    new = _document(["seqwrite-new", "randread"], started=_BEGIN + timedelta(days=1))
    (machine,) = _machines(new, old)
    (figure,) = [f for f in machine.of("seqwrite-new") if f.target == "overlay2"]
    assert figure.time.middle == pytest.approx(0.08, rel=0.1)
    assert machine.of("randread")


def test_runs_of_two_machines_are_shown_apart() -> None:
    here, there = _document(["seqwrite-new"]), _document(["seqwrite-new"], machine={"kernel": "6.18"})
    machines = _machines(here, there)
    assert len(machines) == 2
    assert "Machine 2" in _Page(_render(machines)).text


# Run files and verdicts from strangers

_EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x1b[31m\x00\u202e\ud800&amp;|`*"


def _hostile() -> dict[str, Any]:
    document = _document(["randread", "copyup-first-write"], [_MIB, 4 * _MIB])
    document["layerfs"]["warnings"] = [_EVIL]
    document["layerfs"]["fingerprint"] |= {"kernel": _EVIL, "processor": _EVIL, "versions": {"layerfs": _EVIL}}
    document["layerfs"]["targets"] = ["native", "overlay2", _EVIL]
    document["layerfs"]["fingerprint"]["targets"][_EVIL] = {"backing": {"filesystem": _EVIL}, "options": {_EVIL: _EVIL}}
    for benchmark in document["benchmarks"]:
        extra = benchmark["extra_info"]
        if extra["target"] == "btrfs":
            extra["target"] = _EVIL
        if extra["step"] == "first write":
            extra["step"] = _EVIL
        extra["workload"] = extra["workload"].replace("randread", _EVIL)
        benchmark["params"][_EVIL] = {"a": [_EVIL]}
    return document


def _claims_document(**fields: object) -> dict[str, Any]:
    entry = {"id": _EVIL, "claim": _EVIL, "source": _EVIL, "theirs": _EVIL, "verdict": "partly", "reason": _EVIL}
    ours = {"ratio": 1.2, "low": 1.1, "high": 1.3}
    return {"layerfs_claims": 1, "fingerprint": {}, "claims": [{**entry, "ours": ours, **fields}]}


def test_nothing_in_a_run_file_or_a_verdict_acts_as_markup() -> None:
    machines = _machines(_hostile())
    judged = claims.parse(_claims_document(), "verdicts")
    text = _render(machines, judged)
    found = _Page(text)
    known = "html head meta title style body main h1 h2 p b ul li dl dt dd div span small code svg rect text path line"
    known += " circle figure details summary table tr td th footer"
    assert {tag for tag, _ in found.tags} <= set(known.split())
    assert not [name for _, about in found.tags for name in about if name.startswith("on") or name in ("src", "href")]
    assert "<script>" in found.text, "it is shown as it is"
    assert not re.search("[\x00-\x08\x0e-\x1f\u202e\ud800-\udfff]", text)
    for picture in (*panels.all_panels(machines[0])[1].pictures.values(), board.scoreboard(judged)):
        ElementTree.fromstring(svg.standalone(picture))  # noqa: S314 - our own
    sections = [(machine, panels.all_panels(machine)) for machine in machines]
    assert "<script>" not in tables.markdown(sections, judged).replace("\\<script\\>", "")


def test_a_spreadsheet_runs_no_cell() -> None:
    document = _document(["seqwrite-new"])
    for benchmark in document["benchmarks"]:
        benchmark["extra_info"]["step"] = "=cmd|'/c calc'!A0"
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(_machines(document)))))
    assert {row["target"] for row in rows} == set(_TIMES)
    assert all(row["step"].startswith("'=") for row in rows)
    overlay = next(row for row in rows if row["target"] == "overlay2")
    assert float(overlay["to_native_median"]) == pytest.approx(2, rel=0.2)
    assert float(overlay["to_native_low"]) <= float(overlay["to_native_median"]) <= float(overlay["to_native_high"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e300, "1", None, [], {}])
def test_what_is_no_figure_is_refused_in_a_sentence(value: object) -> None:
    for place in ("data", "latencies", "bytes"):
        document = _document(["randread"])
        benchmark = document["benchmarks"][0]
        if place == "data":
            benchmark["stats"]["data"][0] = value
        elif place == "bytes":
            benchmark["extra_info"]["bytes"][0] = value
        else:
            benchmark["extra_info"]["latencies"][0] = [[value, 1]]
        if value == "1":  # a number in words is one
            continue
        with pytest.raises(InvalidArgument, match="stranger"):
            data.parse(document, "stranger")


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"layerfs_claims": 2, "claims": []},
        {"layerfs_claims": 1},
        _claims_document(verdict="surely"),
        _claims_document(ours={"ratio": math.nan, "low": 1, "high": 2}),
        _claims_document(ours=3),
    ],
)
def test_what_are_no_verdicts_is_refused(document: object) -> None:
    with pytest.raises(InvalidArgument, match="verdicts"):
        claims.parse(document, "verdicts")


def test_figures_read_as_people_write_them() -> None:
    assert [axes.seconds(value) for value in (0, 1, 0.001, 0.0724, 72.4e-6, 0.01)] == [
        *("0 s", "1 s", "1 ms", "72.4 ms", "72.4 μs", "10 ms")
    ]
    assert [axes.size(value) for value in (0, 1, 4096, 3 << 20, 1 << 30)] == ["0B", "1B", "4K", "3M", "1G"]
    assert [axes.times(value) for value in (0.012, 1, 12.3, 3800, 45_000)] == [
        "0.012×",
        "1.00×",
        "12×",
        "3.8k×",
        "45k×",
    ]
    ticks = axes.scale([3e-5, 0.2], 0, 100, axes.seconds, log=True).ticks()
    assert [axes.seconds(value) for value in ticks] == ["100 μs", "1 ms", "10 ms", "100 ms"]


# The command


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_LAYERFS, "report", *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(_document(["seqwrite-new", "copyup-first-write"])))
    return file


def test_the_command_writes_each_form(run_file: Path, tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts.json"
    verdicts.write_text(json.dumps(_claims_document(claim="AUFS reads slower")))
    out = {name: tmp_path / name for name in ("r.html", "r.md", "r.csv", "pictures")}
    done = _run(
        *(run_file, "-o", out["r.html"], "--markdown", out["r.md"], "--csv", out["r.csv"]),
        *("--svg", out["pictures"], "--claims", verdicts),
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert out["r.html"].read_text().startswith("<!DOCTYPE html>")
    assert "AUFS reads slower" in out["r.html"].read_text()
    assert "| overlay2 |" in out["r.md"].read_text()
    assert out["r.csv"].read_text().startswith("machine,workload,step")
    assert {"claims.svg", "heat.svg", "copy-up.svg", "copied.svg"} == {file.name for file in out["pictures"].iterdir()}
    before = out["r.html"].read_text()
    assert _run(verdicts, run_file, "-o", out["r.html"]).returncode == 0, "as results/*.json gives them"
    assert out["r.html"].read_text() == before


def test_a_dash_for_a_file_is_the_standard_output(run_file: Path) -> None:
    done = _run(run_file, "--csv", "-")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("machine,workload,step")


def test_without_a_file_to_write_it_prints_a_table(run_file: Path) -> None:
    done = _run(run_file)
    assert done.returncode == 0, done.stderr
    assert "copyup-first-write: open" in done.stdout
    assert "Not measured" in done.stdout


def _without(path: str, value: object = None) -> Callable[[dict[str, Any]], None]:
    """Takes a field out of a document, or puts a value there; below ``*`` it is each benchmark's."""

    def change(document: dict[str, Any]) -> None:
        *way, last = path.split("/")
        for place in document["benchmarks"] if way[:1] == ["*"] else [document]:
            for name in way[way[:1] == ["*"] :]:
                place = place[name]
            place[last] = value
            if value is None:
                del place[last]

    return change


@pytest.mark.parametrize(
    "change",
    [
        _without("layerfs"),
        _without("layerfs/format", "x"),
        _without("layerfs/format", 99),
        _without("layerfs/fingerprint", {}),
        _without("layerfs/fingerprint/targets", []),
        _without("layerfs/failures", [{}]),
        _without("benchmarks", {}),
        _without("datetime", 3),
        _without("*/params", []),
        _without("*/params/size"),
        _without("*/stats/data"),
        _without("*/stats/data", []),
        _without("*/stats/data", [0.0] * 6),
        _without("*/stats/data", [math.nan] * 6),
        _without("*/stats/data", ["x"] * 6),
        _without("*/extra_info/bytes", [1]),
        _without("*/extra_info/counters", 1),
    ],
)
def test_no_command_takes_what_is_no_run_file(change: Callable[[dict[str, Any]], None]) -> None:
    document = _document(["copyup-first-write"])
    change(document)
    for read in (
        lambda: data.parse(document, "bad.json"),
        lambda: evidence.parse(document, "bad.json", {"large": 1}),
        lambda: recorded.parse(document, "bad.json"),
    ):
        with pytest.raises(InvalidArgument, match=r"bad\.json"):
            read()


def test_files_that_hold_something_else_are_refused_in_a_sentence_and_passed_over_by_history(
    run_file: Path, tmp_path: Path
) -> None:
    place = tmp_path / "results"
    (place / "folder.json").mkdir(parents=True)
    whole = run_file.read_text()
    for name, text in (
        ("empty", ""),
        ("other", '{"a": 1}'),
        ("deep", "[" * 100_000),
        ("cut", whole[: len(whole) // 2]),
    ):
        (place / f"{name}.json").write_text(text)
    (place / "binary.json").write_bytes(b"\x9e\x00")
    bad = sorted(place.iterdir())
    for file in [*bad, tmp_path / "missing.json"]:
        for arguments in (
            ("report", file),
            ("advise", "--builds", "--elsewhere", file),
            ("claims", "-o", tmp_path / "verdicts.json", file),
            ("compare", file, run_file),
            ("compare", run_file, file),
        ):
            done = subprocess.run([*_LAYERFS, *map(str, arguments)], capture_output=True, text=True, check=False)
            assert done.returncode == 2, (arguments, done.stderr)
            assert len(done.stderr.splitlines()) == 1, done.stderr
            assert file.name in done.stderr
    history = subprocess.run([*_LAYERFS, "history", "--results", place], capture_output=True, text=True, check=False)
    assert history.returncode == 2
    assert len(history.stderr.splitlines()) == len(bad) + 1, history.stderr
    assert history.stderr.splitlines()[-1].startswith("layerfs: ")


def test_a_mistake_is_a_sentence_and_a_usage_error(run_file: Path, tmp_path: Path) -> None:
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    for arguments in ([tmp_path / "missing.json"], [deep], [run_file, "--claims", run_file], []):
        done = _run(*arguments)
        assert done.returncode == 2, arguments
        assert "Traceback" not in done.stderr
    assert _run(run_file, "-o", tmp_path / "no" / "where.html").returncode != 0
