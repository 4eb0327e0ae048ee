"""Where checkpoints are, as the command line says it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from persistence import SecurityConfig, StateConfig
from persistence.checkpoint.opening import SERVERS, open_store
from persistence.checkpoint.stores import CheckpointStore
from persistence.cli.directory import shares_sessions
from persistence.cli.failure import CommandError
from persistence.cli.key_source import of_environment, security_for, source_of
from persistence.disk.threads import Threads

StoreOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL_OR_DIR",
        help="Where the checkpoints are: the URL of a Redis or PostgreSQL, or a directory. Others "
        "can see a password that stands here; in --config or PERSISTENCE_REDIS__URL they cannot.",
    ),
]
NamespaceOption = Annotated[
    str | None,
    typer.Option(help="In Redis or PostgreSQL, with --store: the workers' redis.namespace."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A worker's configuration, instead of --store."),
]
_KEEP_ALL: Final = 2**63 - 1


def config_of(
    store: str | None,
    namespace: str | None,
    config: Path | None,
    directory: Path | None = None,
    *,
    key_file: Path | None = None,
) -> StateConfig:
    """Return the configuration for work on checkpoints: nothing in it happens by itself.

    Without `store` and `config` it is that of the environment.

    Args:
        store: a URL of Redis or PostgreSQL, or a directory.
        namespace: of what is there.
        config: a file.
        directory: of the worker, where the command has one; its neighbour is the default.
        key_file: what opens encrypted ones; None: as `config` or the environment says.

    Raises:
        ConfigError: the configuration is wrong.
        CommandError: it does not say where checkpoints are, or says it twice, or nothing is there.
    """
    if store is not None and config is not None:
        raise CommandError("--store and --config both say where the checkpoints are: give one")
    is_url = store is not None and "://" in store
    if namespace is not None and not is_url:
        raise CommandError("--namespace needs --store with a URL")
    if store is None:
        return _with_keys(_of_worker(config, directory), directory, key_file)
    if is_url:
        redis = {"url": store} if namespace is None else {"url": store, "namespace": namespace}
        sections: dict[str, Any] = {"redis": redis, "checkpoint": {"store": "auto"}}
    else:
        # A bare name is a directory, also where the configuration would read a word of its own.
        sections = {"checkpoint": {"store": str(Path(store).absolute())}}
        if directory is None and not Path(store).is_dir():
            raise CommandError(f"{store} is not a directory with checkpoints: there is none")
    # What a worker keeps is not known here: nothing of it is dropped.
    sections["checkpoint"]["keep"] = _KEEP_ALL
    # Sessions go to no Redis from here, only checkpoints.
    sections.setdefault("redis", {})["write"] = "checkpoint"
    made = _at(StateConfig.model_validate(sections), directory)
    return _with_keys(made, directory, key_file)


def _with_keys(config: StateConfig, directory: Path | None, key_file: Path | None) -> StateConfig:
    """Return `config` with the keys that are given, unless it says itself how to encrypt."""
    if key_file is None and config.security.encrypt:
        return config
    if directory is not None:
        security = security_for(directory, key_file)
    elif key_file is not None:
        security = SecurityConfig(encrypt=True, **source_of(key_file))
    else:
        security = of_environment()
    return config.model_copy(update={"security": security})


def _of_worker(file: Path | None, directory: Path | None) -> StateConfig:
    config = StateConfig.load(file)
    says_where = config.checkpoint.store != "auto" or config.redis.url is not None
    if file is None and directory is None and not says_where:
        raise CommandError("say where the checkpoints are: --store URL_OR_DIR or --config FILE")
    return _at(config, directory)


def _at(config: StateConfig, directory: Path | None) -> StateConfig:
    """Let a worker with this configuration be at `directory`, and do nothing by itself."""
    path = config.disk.path if directory is None else str(directory)
    return config.model_copy(
        update={
            "session": config.session.model_copy(update={"cleanup_interval_seconds": 0}),
            "disk": config.disk.model_copy(update={"path": path}),
            "redis": config.redis.model_copy(update={"on_outage": "fail"}),
            "checkpoint": config.checkpoint.model_copy(update={"interval_seconds": 0}),
            "shutdown": config.shutdown.model_copy(update={"checkpoint": False}),
        }
    )


def require_told_where_shared(
    directory: Path, store: str | None, file: Path | None, config: StateConfig
) -> None:
    """Check that it is known where a directory's sessions are shared, if they are.

    What is restored only in the directory would be undone: the server has what was there before,
    and the worker would take it over from there when it is opened next.

    Args:
        directory: whose sessions are to be replaced.
        store: as for `config_of`; it says where checkpoints are, and not how sessions are shared.
        file: the configuration that was given; what it says goes, also that nothing is shared.
        config: what came of that.

    Raises:
        CommandError: it is not known.
    """
    is_told = store is None and (file is not None or config.redis.url is not None)
    if not is_told and shares_sessions(directory):
        raise CommandError(
            f"{directory} shares its sessions, and nothing says where: the state before would come "
            "back from there; nothing was changed; give the worker's configuration with --config "
            "FILE instead of --store, and the sessions are replaced for all workers"
        )


def without_sharing(config: StateConfig) -> StateConfig:
    """Return `config` with its server for checkpoints only, or none where they are elsewhere."""
    update: dict[str, Any] = {"write": "checkpoint"}
    if config.checkpoint.store not in ("auto", *SERVERS):
        update["url"] = None
    return config.model_copy(update={"redis": config.redis.model_copy(update=update)})


@asynccontextmanager
async def opened_store(config: StateConfig) -> AsyncIterator[CheckpointStore]:
    """Open the store of checkpoints, without a worker."""
    threads = Threads()
    try:
        opened = open_store(config.checkpoint, config.redis, config.disk.path, threads)
        try:
            yield opened.store
        finally:
            await opened.close()
    finally:
        threads.close()
