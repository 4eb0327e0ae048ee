r"""A service whose sessions have what no disk can hold: a connection and a registry of listeners.

The first line of a client names its session. What follows goes to a backend, over a connection that
all clients of the session share and that is closed with the session; every client of the session
hears the replies. ``stop`` ends the session. The backend is brought along::

    python examples/live_service.py 8765
    printf 'ada\nhello\n' | nc -q 1 localhost 8765
"""
# ruff: noqa: T201 - an example prints

import asyncio
import sys
from asyncio import StreamReader, StreamWriter
from functools import partial
from itertools import count

from persistence import DiskConfig, StateConfig, StateManager, worker
from persistence.errors import SessionNotFound

CONFIG = StateConfig(disk=DiskConfig(path=".persistence/live"))
_numbers = count(1)


class Connection:
    """A connection to the backend."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self.number = next(_numbers)
        self._reader, self._writer = reader, writer
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, port: int) -> "Connection":
        """Connect: the factory of the resource."""
        return cls(*await asyncio.open_connection("localhost", port))

    async def ask(self, text: str) -> str:
        """Send a line and return the reply."""
        async with self._turn:
            self._writer.write(f"{text}\n".encode())
            return (await self._reader.readline()).decode().strip()

    async def close(self) -> None:
        """Disconnect: called once, when the session ends, leaves memory, or at shutdown."""
        self._writer.close()
        print(f"connection {self.number} closed", flush=True)


async def serve(port: int, state: StateManager) -> None:
    """Serve until this is cancelled, which is what a signal does."""
    backend = await asyncio.start_server(shout, "localhost", 0)
    connect = partial(Connection.open, backend.sockets[0].getsockname()[1])

    async def talk(reader: StreamReader, writer: StreamWriter) -> None:
        sid = (await reader.readline()).decode(errors="replace").strip() or "nobody"
        listeners: set[StreamWriter] = set()
        try:
            await state.get_or_create_session(sid, data={"calls": 0})
            # The registry: a plain set, the same one for all clients of the session.
            listeners = await state.resources(sid, "listeners", set)
            listeners.add(writer)
            while text := (await reader.readline()).decode(errors="replace").strip():
                if text == "stop":
                    await state.terminate_session(sid)  # which closes the connection
                    break
                await call(sid, text)
        except SessionNotFound:
            pass  # another client of the session has stopped it
        except ConnectionError:
            pass  # the client is gone
        finally:
            listeners.discard(writer)
            writer.close()

    async def call(sid: str, text: str) -> None:
        async with state.request(sid, text):  # while it runs, the resources stay
            connection = await state.resources(sid, "backend", connect, Connection.close)
            reply = await connection.ask(text)
            session = await state.update_session(
                sid, lambda data: data.update(calls=data["calls"] + 1)
            )
            line = f"connection {connection.number}, call {session['calls']}: {reply}\n"
            for listener in list(await state.resources(sid, "listeners", set)):
                listener.write(line.encode())

    server = await asyncio.start_server(talk, "localhost", port)
    print(f"listening on port {server.sockets[0].getsockname()[1]}", flush=True)
    async with backend, server:
        await server.serve_forever()


async def shout(reader: StreamReader, writer: StreamWriter) -> None:
    """Answer lines in capitals: the backend."""
    while line := await reader.readline():
        writer.write(line.upper())
    writer.close()


if __name__ == "__main__":
    worker.run(partial(serve, int(sys.argv[1]) if len(sys.argv) > 1 else 8765), CONFIG)
    print("closed")
