"""A client that renders pages for its sessions: each may make so many requests, and is measured.

It renders the pages of a small site that it brings along, one of which is broken. Run it twice: the
limit counts all requests of a session, in whatever process::

    python examples/rendering_client.py
"""
# ruff: noqa: T201 - an example prints

import asyncio
from asyncio import StreamReader, StreamWriter
from html.parser import HTMLParser

from persistence import DiskConfig, StateConfig, StateManager
from persistence.errors import RequestLimitReached

CONFIG = StateConfig(disk=DiskConfig(path=".persistence/rendering"))
PAGES = {"/": "<h1>Home</h1><p>Books and more", "/books": "<h1>Books</h1><p>Dune<p>Ubik"}
MAX_REQUESTS = 5


class Text(HTMLParser):
    """Renders a page: as text."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def handle_data(self, data: str) -> None:
        """Take a piece of text."""
        self.lines.append(data)


async def render(port: int, path: str) -> tuple[str, str]:
    """Fetch a page; return its status and what it looks like."""
    reader, writer = await asyncio.open_connection("localhost", port)
    writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    page = Text()
    page.feed(body)
    return head.split(maxsplit=2)[1], " | ".join(page.lines)


async def visit(state: StateManager, sid: str, port: int, path: str) -> str:
    """Render a page for a session, which counts as one of its requests."""
    async with state.request(sid, f"GET {path}") as request:
        status, text = await render(port, path)
        if status != "200":
            request.failed(f"status {status}")
        return f"{path}: {status} {text}"


async def main() -> None:
    """Be two clients: the first one asks for more than it may have."""
    site = await asyncio.start_server(serve_site, "localhost", 0)
    port = site.sockets[0].getsockname()[1]
    async with site, StateManager(config=CONFIG) as state:
        for client, paths in {"ada": ["/", "/books", "/broken"] * 3, "bob": ["/"]}.items():
            await state.get_or_create_session(client, max_requests=MAX_REQUESTS)
            try:
                for path in paths:
                    print(client, await visit(state, client, port, path))
            except RequestLimitReached:
                print(client, "has used up its requests")
            metrics = await state.session_metrics(client)
            print(f"{client} made {metrics.requests} requests, {metrics.errors} failed:", end=" ")
            print(f"{metrics.last_error or 'nothing'}; the last one was {metrics.last_name}")


async def serve_site(reader: StreamReader, writer: StreamWriter) -> None:
    """Answer one request: the site."""
    _, path, _ = (await reader.readline()).decode().split()
    while (await reader.readline()).strip():
        pass
    status = "200 OK" if path in PAGES else "500 Broken"
    writer.write(f"HTTP/1.0 {status}\r\n\r\n{PAGES.get(path, '')}".encode())
    await writer.drain()
    writer.close()


if __name__ == "__main__":
    asyncio.run(main())
