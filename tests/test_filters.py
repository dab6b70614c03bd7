"""Filters as containerd's snapshotter suite and users write them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from layerfs import filters
from layerfs.errors import InvalidArgument
from layerfs.layer import Kind, Layer

NOW = datetime.now(UTC)
LAYERS = [
    Layer("base", Kind.COMMITTED, "", NOW, NOW, {"team": "web", "a.b/c": "x y"}),
    Layer("work", Kind.ACTIVE, "base", NOW, NOW, {"team": "db", "empty": ""}),
    Layer("a look, really", Kind.VIEW, "base", NOW, NOW, {"my-label": "/x", "1": "é"}),
]
ALL = {layer.key for layer in LAYERS}


def found(*given: str) -> set[str]:
    fits = filters.parse(given)
    return {layer.key for layer in LAYERS if fits(layer)}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ALL),
        ([""], ALL),
        (["kind==active"], {"work"}),
        (["kind!=active"], ALL - {"work"}),
        (["name==base"], {"base"}),
        (["name==base", "kind==view"], {"base", "a look, really"}),
        (["parent==base,kind==view"], {"a look, really"}),
        (['parent!=""'], ALL - {"base"}),
        (['parent==""'], {"base"}),
        (["labels.team"], {"base", "work"}),
        (["labels.empty"], {"work"}),
        (["labels.team==web"], {"base"}),
        (["labels.team!=web"], ALL - {"base"}),
        (['labels."a.b/c"=="x y"'], {"base"}),
        (["labels.a.b"], set()),
        (["name~=^w"], {"work"}),
        (["name~=/look, r/"], {"a look, really"}),
        (['name=="a look, really"'], {"a look, really"}),
        (["name==nothing"], set()),
        (["unknown==x"], set()),
        (["labels.my-label"], {"a look, really"}),
        (["labels.my-label~=|^/|"], {"a look, really"}),
        (['labels.1=="\\xc3\\xa9"'], {"a look, really"}),
        (['labels.1=="\\u00e9"'], {"a look, really"}),
        (['labels.none!=""'], set()),
        (["labels.none!=x"], ALL),
        ([" kind == active, name ~= w"], {"work"}),
        ([r"name~=/^look\\b|\\w, r/"], {"a look, really"}),
        ([r"name~=/^\x77/"], {"work"}),
        ([r'name~="^w\\w+$"'], {"work"}),
        ([r"labels.my-label~=/^\/x$/"], {"a look, really"}),
    ],
)
def test_what_fits(given: list[str], expected: set[str]) -> None:
    assert found(*given) == expected


@pytest.mark.parametrize(
    "given",
    [
        "==",
        "name=",
        "name==",
        "name==a b",
        "name~=(",
        "kind==active,",
        'name=="open',
        "na me==x",
        "labels.",
        "name==a,,b",
        "name==a ,kind",
        "name ",
        r"name~=/\d/",
        "labels .team",
    ],
)
def test_what_cannot_be_understood_is_shown(given: str) -> None:
    with pytest.raises(InvalidArgument, match="»"):
        filters.parse([given])
