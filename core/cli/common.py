"""What every command shares: its options, and how it comes to a store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from layerfs.errors import InvalidArgument

if TYPE_CHECKING:
    from layerfs.backing import BackingSpec
    from layerfs.store import Store

_Made = TypeVar("_Made", bound=Callable[..., Any])

ROOT_VARIABLE, DRIVER_VARIABLE = "LAYERFS_ROOT", "LAYERFS_DRIVER"


@dataclass
class Settings:
    """What ``--root`` and ``--driver`` said, before or after the command's name; the later one wins."""

    root: Path | None = None
    driver: str | None = None

    def place(self) -> Path:
        """The store's directory, absolute. Asked for before a user namespace makes every user look like root."""
        return Path(os.path.abspath(self.root or default_root()))  # lexical: `Path.resolve` would follow links


def default_root() -> Path:
    """``/var/lib/layerfs`` for root, ``$XDG_DATA_HOME/layerfs`` (XDG Base Directory Specification) for others."""
    if os.geteuid() == 0:
        return Path("/var/lib/layerfs")
    given = Path(os.environ.get("XDG_DATA_HOME", ""))
    return (given if given.is_absolute() else Path("~/.local/share").expanduser()) / "layerfs"


def settings() -> Settings:
    """Those of the running command."""
    return click.get_current_context().ensure_object(Settings)


def store_options(*, environment: bool = False) -> list[click.Option]:
    """``--root`` and ``--driver``; the environment's values are read once, by the group (``environment``)."""

    def remember(context: click.Context, option: click.Parameter, value: Any) -> None:
        if value is not None and option.name is not None:
            setattr(context.ensure_object(Settings), option.name, value)

    return [
        click.Option(
            ["--root"],
            type=click.Path(path_type=Path),
            metavar="DIR",
            envvar=ROOT_VARIABLE if environment else None,
            expose_value=False,
            callback=remember,
            help=f"The store's directory [env {ROOT_VARIABLE}; default: /var/lib/layerfs, or without root "
            "~/.local/share/layerfs].",
        ),
        click.Option(
            ["--driver"],
            metavar="NAME",
            envvar=DRIVER_VARIABLE if environment else None,
            expose_value=False,
            callback=remember,
            shell_complete=_drivers,
            help=f"The storage driver, needed only when a store is made [env {DRIVER_VARIABLE}].",
        ),
    ]


class Command(click.Command):
    """A command with the options that all share, and examples below its help.

    Args:
        examples: one command line each, without the leading ``layerfs``.
    """

    def __init__(self, name: str | None, *, examples: tuple[str, ...] = (), **attributes: Any) -> None:
        super().__init__(name, **attributes)
        self.params += store_options()
        self.epilog = "\b\n" + "\n".join(["Examples:", *(f"  layerfs {line}" for line in examples)])


def commas_option(*names: str, help: str, default: str | None = None) -> Callable[[_Made], _Made]:  # noqa: A002 - click's
    """An option that may be repeated or given with commas between; the command gets it with commas."""

    def joined(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> str | None:
        return ",".join(given) or None

    default_values = [default] if default else None
    return click.option(
        *names, multiple=True, callback=joined, default=default_values, show_default=bool(default), help=help
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@contextmanager
def open_store(
    *,
    create: bool = False,
    options: Mapping[str, str] | None = None,
    backing: BackingSpec | None = None,
    force: bool = False,
    sync: str = "commit",
    background: bool = False,
) -> Iterator[Store]:
    """The store that the options name, in a user namespace where the caller is not root.

    ``sync`` is one of `layerfs.settling.Sync`; for the others see `layerfs.store.Store`.

    Raises what `layerfs.store.Store` and `layerfs.kernel.userns.enter` do.
    """
    from layerfs.kernel import userns
    from layerfs.settling import Sync
    from layerfs.store import Store

    chosen = settings()
    root = chosen.place()
    userns.enter()
    when = Sync(sync)
    with Store(
        root,
        chosen.driver,
        options=options or {},
        backing=backing,
        create=create,
        force=force,
        sync=when,
        background=background,
    ) as store:
        yield store


def pairs(given: tuple[str, ...], option: str) -> dict[str, str]:
    """``("k=v", …)`` as a dict. Raises `InvalidArgument`."""
    for item in given:
        if "=" not in item:
            raise InvalidArgument(f"{option} {item!r}: write it as KEY=VALUE")
    return dict(item.split("=", 1) for item in given)


def labels_option(command: Callable[..., None]) -> Callable[..., None]:
    """``--label KEY=VALUE``, as often as wanted."""
    return click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label; may be repeated.")(
        command
    )


def _drivers(_context: click.Context, _option: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from layerfs import registry

    return [CompletionItem(name) for name in registry.names() if name.startswith(incomplete)]
