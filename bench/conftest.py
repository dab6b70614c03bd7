"""Options of ``pytest bench``, where pytest-benchmark measures unless told not to."""

from __future__ import annotations

import pytest

from layerfs import registry


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("layerfs")
    group.addoption("--layerfs-drivers", default="all", help="Drivers to measure, with commas between [all].")
    group.addoption("--layerfs-size", default="4M", help="Size of the large file [4M].")
    group.addoption("--layerfs-rounds", type=int, default=5, help="Samples of each [5].")


def pytest_configure(config: pytest.Config) -> None:
    if "--benchmark-disable" not in config.invocation_params.args:  # given by the project's settings, for its tests
        config.option.benchmark_disable = False


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "driver" in metafunc.fixturenames:
        given = metafunc.config.getoption("--layerfs-drivers")
        names = registry.names() if given == "all" else given.split(",")
        if unknown := [name for name in names if name not in registry.names()]:
            raise pytest.UsageError(f"there is no driver {unknown[0]!r}; there are {', '.join(registry.names())}")
        metafunc.parametrize("driver", names, scope="module")
