"""``persistence checkpoints``: list, make, restore and delete restore points."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from persistence import StateConfig, StateManager
from persistence.checkpoint.catalogue import (
    CheckpointInfo,
    delete_checkpoint,
    list_checkpoints,
)
from persistence.checkpoint.create import OnProgress
from persistence.checkpoint.restore import RestoredInfo, restore_into
from persistence.cli import screen
from persistence.cli.checkpoint_place import (
    ConfigOption,
    NamespaceOption,
    StoreOption,
    config_of,
    opened_store,
    require_told_where_shared,
    without_sharing,
)
from persistence.cli.directory import require_directory
from persistence.cli.failure import EXIT_FAILED, EXIT_OK
from persistence.cli.key_source import KeyFileOption
from persistence.cli.options import DirectoryArgument, JsonOption
from persistence.cli.running import run
from persistence.cli.screen import format_bytes, note, say
from persistence.clock import SystemClock
from persistence.keys import seals_for
from persistence.sealer import Sealer

commands = typer.Typer(
    help="List, make, restore and delete checkpoints.\n\n"
    "Where they are is said by --store or --config, or by variables such as "
    "PERSISTENCE_REDIS__URL.",
    short_help="List, make, restore and delete checkpoints.",
    rich_markup_mode=None,
)
_HEADERS: Final = ("ID", "TIME (UTC)", "KIND", "SESSIONS", "BYTES", "REASON", "PROBLEM")
_NUMBERS: Final = frozenset({"SESSIONS", "BYTES"})
_IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Of a checkpoint; see list.")]


@commands.command("list", short_help="Show which there are.")
def show(
    store: StoreOption = None,
    namespace: NamespaceOption = None,
    config: ConfigOption = None,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show all checkpoints, oldest first, those of other workers too.

    BYTES is what a checkpoint shipped itself. Manifests are read, chunks are not: damage in a
    chunk shows when it is restored.
    """
    with _said_once():
        infos = run(_list(config_of(store, namespace, config, key_file=key_file)))
    if as_json:
        screen.print_json({"checkpoints": [_fields(info) for info in infos]})
    elif infos:
        screen.print_columns(_HEADERS, map(_row, infos), _NUMBERS)
    else:
        note("there is no checkpoint")
    return EXIT_OK


@commands.command("create", short_help="Make one of a directory's sessions.")
def create(
    directory: DirectoryArgument,
    reason: Annotated[str, typer.Option(help="Any text; list shows it.")] = "manual",
    store: StoreOption = None,
    namespace: NamespaceOption = None,
    config: ConfigOption = None,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> int:
    """Make a checkpoint of a directory, which must not be open elsewhere.

    It ships what has changed since the last one, where it can. Without --store, as many stay as
    checkpoint.keep says; with it, all do. Where nothing says where to, it goes to the directory's
    neighbour, as a worker's do.
    """
    require_directory(directory)
    made_with = without_sharing(config_of(store, namespace, config, directory, key_file=key_file))
    with _said_once(), _bar("create", as_json) as on_progress:
        info = run(_create(made_with, reason, on_progress))
    if as_json:
        screen.print_json(_fields(info))
    else:
        say(
            f"Made {info.id}: {info.kind}, {info.sessions:,} sessions, "
            f"{format_bytes(info.bytes)} shipped."
        )
    return EXIT_OK


@commands.command("restore", short_help="Restore one into a directory.")
def restore(
    checkpoint: Annotated[str, typer.Argument(metavar="ID", help="Which; or: latest.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; a new directory.")],
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="DIR is a directory with sessions: replace all of them. It must not be open "
            "elsewhere. If its sessions are shared through Redis or PostgreSQL, it takes the "
            "worker's --config, and they are replaced there too.",
        ),
    ] = False,
    store: StoreOption = None,
    namespace: NamespaceOption = None,
    config: ConfigOption = None,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> int:
    """Restore a checkpoint into a new directory, or one without sessions.

    Everything is verified first. When a checkpoint is damaged, the one before is restored. Damaged
    ones that were passed over are named, and so is each session that was damaged already when it
    was shipped; the exit code is 1 then.
    """
    if live:
        require_directory(directory)
    restored_with = config_of(
        store, namespace, config, directory if live else None, key_file=key_file
    )
    if live:
        require_told_where_shared(directory, store, config, restored_with)
    with _said_once(), _bar("restore", as_json) as on_progress:
        work = _restore_live if live else _restore_fresh
        restored = run(work(restored_with, checkpoint, directory, on_progress))
    if as_json:
        screen.print_json(_fields(restored))
    for line in _losses(restored):
        note(line)
    if not as_json:
        say(
            f"Restored {restored.id} of {_time(restored)}: {restored.sessions:,} sessions, "
            f"{format_bytes(restored.bytes)} read."
        )
    is_whole = not (restored.skipped or restored.damaged or restored.unnamed)
    return EXIT_OK if is_whole else EXIT_FAILED


@commands.command("delete", short_help="Delete one.")
def delete(
    checkpoint: _IdArgument,
    store: StoreOption = None,
    namespace: NamespaceOption = None,
    config: ConfigOption = None,
    key_file: KeyFileOption = None,
) -> int:
    """Delete a checkpoint, and what no other one needs of it. Damaged ones can be deleted too."""
    with _said_once():
        run(_delete(config_of(store, namespace, config, key_file=key_file), checkpoint))
    say(f"Deleted {checkpoint}.")
    return EXIT_OK


def _sealer(config: StateConfig) -> Sealer | None:
    seals = seals_for(config.security)
    return None if seals is None else seals.checkpoints


# --- the work -------------------------------------------------------------------------------------


async def _list(config: StateConfig) -> list[CheckpointInfo]:
    async with opened_store(config) as store:
        return await list_checkpoints(store, _sealer(config))


async def _create(config: StateConfig, reason: str, on_progress: OnProgress) -> CheckpointInfo:
    async with StateManager(config=config) as state:
        return await state.create_checkpoint(reason, on_progress=on_progress)


async def _restore_fresh(
    config: StateConfig, wanted: str, directory: Path, on_progress: OnProgress
) -> RestoredInfo:
    async with opened_store(config) as store:
        return await restore_into(
            store,
            str(directory),
            SystemClock(),
            wanted,
            segment_bytes=config.disk.segment_bytes,
            on_progress=on_progress,
            seals=seals_for(config.security),
        )


async def _restore_live(
    config: StateConfig, wanted: str, _: Path, on_progress: OnProgress
) -> RestoredInfo:
    async with StateManager(config=config) as state:
        return await state.restore_checkpoint(wanted, on_progress=on_progress)


async def _delete(config: StateConfig, checkpoint_id: str) -> None:
    async with opened_store(config) as store:
        await delete_checkpoint(store, checkpoint_id, _sealer(config))


# --- what is shown --------------------------------------------------------------------------------


@contextmanager
def _said_once() -> Iterator[None]:
    """Keep what the engine logs about checkpoints from stderr: the command says it itself."""
    logger = logging.getLogger("persistence.checkpoint")
    handler = logging.NullHandler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def _bar(label: str, is_quiet: bool) -> Iterator[OnProgress]:
    with screen.progress_of(label, is_quiet) as told:
        yield lambda progress: told(progress.done_bytes, progress.total_bytes)


def _time(info: CheckpointInfo | RestoredInfo) -> str:
    return info.created_at.strftime("%Y-%m-%d %H:%M:%S")


def _row(info: CheckpointInfo) -> tuple[str, ...]:
    is_known = info.problem is None
    return (
        info.id,
        _time(info),
        info.kind,
        f"{info.sessions:,}" if is_known else "",
        format_bytes(info.bytes) if is_known else "",
        info.reason,
        info.problem or "",
    )


def _fields(info: CheckpointInfo | RestoredInfo) -> dict[str, Any]:
    return {**asdict(info), "created_at": info.created_at.isoformat()}


def _losses(restored: RestoredInfo) -> Iterator[str]:
    for skipped, reason in restored.skipped:
        yield f"skipped, because it is damaged: {skipped}: {screen.escaped(reason)}"
    for name in restored.damaged:
        yield f"left out, because it was damaged when it was shipped: session {name}"
    if restored.unnamed:
        yield f"left out: {restored.unnamed:,} damaged records of sessions that are not known"
