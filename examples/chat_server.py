r"""A chat server that remembers which model each user prefers, shared by all of its processes.

Start one, or several that share a Redis, and talk to any of them; who changes the model in one
place has it changed everywhere, also after all of them were killed and restarted::

    python examples/chat_server.py one 8765 redis://localhost:6379
    python examples/chat_server.py two 8766 redis://localhost:6379
    printf 'ada hello\nada /model large\n' | nc -q 1 localhost 8765
    printf 'ada hello\n' | nc -q 1 localhost 8766
    printf 'ada /follow\n' | nc localhost 8766

``/follow`` shows the changes of a user's preferences as they come, whoever makes them. Without a
URL, a server keeps them alone, in its own directory.
"""
# ruff: noqa: T201 - an example prints

import asyncio
import sys
from asyncio import StreamReader, StreamWriter
from dataclasses import dataclass, field
from functools import partial

from persistence import DiskConfig, RedisConfig, SessionConfig, StateConfig, StateManager, worker

MODELS = ("small", "large")


@dataclass
class Preferences:
    """What is kept of a user; the defaults are what a new one gets."""

    model: str = "small"
    messages: int = 0
    topics: list[str] = field(default_factory=list)


async def answer(state: StateManager, user: str, text: str) -> str:
    """Return what the user is told."""
    await state.get_or_create_session(user, data=Preferences())
    command, _, model = text.partition(" ")
    if command == "/model":
        if model not in MODELS:
            return f"there are {', '.join(MODELS)}"

        def choose(preferences: Preferences) -> None:  # again, if another process was first
            preferences.model = model

        await state.update_typed(user, choose)
        return f"you talk to {model} from now on"

    async with state.edit_typed(user) as preferences:
        preferences.messages += 1
        preferences.topics = [*preferences.topics[-4:], text]
    # `fresh`: as Redis has it now, not as this process has heard of it.
    preferences = await state.get_typed(user, fresh=True)
    return f"[{preferences.model}] message {preferences.messages}: {text}"


async def follow(state: StateManager, user: str, writer: StreamWriter) -> None:
    """Show every change of a user's preferences until the user, or the server, is gone."""
    await state.get_or_create_session(user, data=Preferences())
    changes = state.watch(user)
    preferences = await state.get_typed(user)
    writer.write(f"model {preferences.model}\n".encode())
    await writer.drain()
    async for change in changes:
        if change.may_affect("model") and not change.is_end:
            preferences = await state.get_typed(user)
            writer.write(f"model {preferences.model}\n".encode())
            await writer.drain()


async def serve(port: int, state: StateManager) -> None:
    """Serve until this is cancelled, which is what a signal does."""

    async def talk(reader: StreamReader, writer: StreamWriter) -> None:
        try:
            while line := (await reader.readline()).decode(errors="replace").strip():
                user, _, text = line.partition(" ")
                if text == "/follow":
                    await follow(state, user, writer)
                    return
                writer.write(f"{await answer(state, user, text)}\n".encode())
                await writer.drain()
        except ConnectionError:
            pass  # the user is gone
        finally:
            writer.close()

    server = await asyncio.start_server(talk, "localhost", port)
    print(f"listening on port {server.sockets[0].getsockname()[1]}", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    NAME, PORT, *URL = sys.argv[1:] or ("one", "8765")
    worker.run(
        partial(serve, int(PORT)),
        StateConfig(
            session=SessionConfig(ttl_seconds=30 * 86_400),
            disk=DiskConfig(path=f".persistence/chat-{NAME}"),
            redis=RedisConfig(url=URL[0] if URL else None, namespace="chat"),
        ),
        schema=Preferences,
    )
    print("closed")
