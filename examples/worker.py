"""A worker that keeps a session per visitor and ends in order on SIGTERM and Ctrl-C.

Start it, then say who you are, as often as you like, also after it was killed and restarted::

    python examples/worker.py 8765
    echo ada | nc -q 1 localhost 8765
"""
# ruff: noqa: T201 - an example prints

import asyncio
import signal
import sys
from asyncio import StreamReader, StreamWriter

from persistence import (
    DiskConfig,
    MemoryConfig,
    SessionConfig,
    SessionDraft,
    StateConfig,
    StateManager,
)

CONFIG = StateConfig(
    session=SessionConfig(ttl_seconds=86_400),
    memory=MemoryConfig(max_bytes=64 * 2**20),
    disk=DiskConfig(path=".persistence/worker"),
)


async def serve(port: int) -> None:
    """Serve until a signal says stop."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    async with StateManager(config=CONFIG) as state:

        async def greet(reader: StreamReader, writer: StreamWriter) -> None:
            visitor = (await reader.readline()).decode(errors="replace").strip() or "nobody"
            await state.get_or_create_session(visitor, data={"visits": 0})
            session = await state.update_session(visitor, count)
            # Whoever reads this number will never see a smaller one.
            writer.write(f"Hello {visitor}, visit {session['visits']}\n".encode())
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(greet, "localhost", port)
        print(f"listening on port {server.sockets[0].getsockname()[1]}", flush=True)
        await stop.wait()
        server.close()
    print("closed")


def count(data: SessionDraft) -> None:
    """Count one visit: the change that the engine commits."""
    data["visits"] += 1


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]) if len(sys.argv) > 1 else 8765))
