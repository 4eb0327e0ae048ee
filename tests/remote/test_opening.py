"""Every way in: TCP, unix socket, TLS, passwords, ACL; and every way that is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from redis.exceptions import ResponseError

from persistence.checkpoint.manifest import make_id
from persistence.clock import SystemClock
from persistence.config import RedisConfig
from persistence.errors import ConfigError, RemoteUnavailable
from persistence.remote.contract import APPLIED, RemoteSession
from persistence.remote.redis import RedisTier
from tests.engine import eventually
from tests.redis_servers import (
    BINARIES,
    HOST,
    Group,
    Proxy,
    RedisServer,
    free_port,
    need_binary,
)
from tests.remote.conftest import Open
from tests.remote.sessions import create, end, new_record, next_record, touch, update
from tests.remote.test_announcements import listening

CHECKPOINT = make_id(1, "20260101T000000Z", "0123abcd", bytes(4))
ROOT = Path(__file__).parent.parent.parent


async def works(tier: RedisTier) -> None:
    record = new_record({"n": 1})
    assert await tier.commit([create("a", record)]) == [APPLIED]
    found = await tier.load("a")
    assert isinstance(found, RemoteSession)
    assert found.record == record


# --- ways in --------------------------------------------------------------------------------------


async def test_a_unix_socket_with_a_database(open_tier: Open, each_server: RedisServer) -> None:
    await works(await open_tier(f"unix://{each_server.socket_path}?db=3"))
    assert each_server.client(db=3).exists("test:session:{a}") == 1


async def test_a_database_in_the_path(open_tier: Open, each_server: RedisServer) -> None:
    await works(await open_tier(f"{each_server.url}/5"))
    assert each_server.client(db=5).exists("test:session:{a}") == 1


@pytest.fixture
async def locked(own_server: RedisServer) -> RedisServer:
    """A server that asks for a password with characters that URLs must escape."""
    own_server.ask("CONFIG", "SET", "requirepass", "p@ss/w?rd")
    own_server.password = "p@ss/w?rd"
    return own_server


async def test_a_password_escaped_in_the_url(open_tier: Open, locked: RedisServer) -> None:
    await works(await open_tier(f"redis://:p%40ss%2Fw%3Frd@{HOST}:{locked.port}"))


@pytest.mark.parametrize("userinfo", ["", ":hunter2@", "nobody:hunter2@"])
async def test_a_wrong_or_missing_password_is_an_error_of_the_configuration(
    open_tier: Open, locked: RedisServer, userinfo: str
) -> None:
    with pytest.raises(ConfigError, match=r"redis\.url.*password") as caught:
        await open_tier(f"redis://{userinfo}{HOST}:{locked.port}")
    assert "hunter2" not in str(caught.value)


def run_openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for localhost, in one directory with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate of this test: apt-get install openssl")
    folder = tmp_path_factory.mktemp("tls")
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    subject = ("-days", "2", "-subj", "/CN=localhost", "-addext", names)
    files = ("-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem"))
    run_openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", *files, *subject)
    return folder


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[RedisServer]:
    """A server whose TLS port is ``tls_port``."""
    able = [binary for binary in BINARIES if binary.has_tls]
    if not able:
        pytest.skip("no server that can do TLS: apt-get install redis-server")
    options = {
        "tls-port": str(free_port()),
        "tls-cert-file": str(certificate / "cert.pem"),
        "tls-key-file": str(certificate / "key.pem"),
        "tls-ca-cert-file": str(certificate / "cert.pem"),
        "tls-auth-clients": "no",
    }
    server = RedisServer(able[-1], options).start()
    yield server
    server.close()


def tls_port(server: RedisServer) -> int:
    return int(server.options["tls-port"])


async def test_tls_with_a_certificate_that_is_checked(
    open_tier: Open, tls_server: RedisServer, certificate: Path
) -> None:
    url = f"rediss://localhost:{tls_port(tls_server)}?ssl_ca_certs={certificate}/cert.pem"
    tier = await open_tier(url)
    await works(tier)
    await listening(tier)


async def test_tls_with_an_unknown_certificate_is_refused_unless_that_is_asked_for(
    open_tier: Open, tls_server: RedisServer
) -> None:
    url = f"rediss://localhost:{tls_port(tls_server)}"
    with pytest.raises(RemoteUnavailable, match="certificate verify failed"):
        await open_tier(url)
    await works(await open_tier(f"{url}?ssl_cert_reqs=none"))


# --- refused, nothing changed ---------------------------------------------------------------------


@pytest.fixture
async def unchanged(shared_server: RedisServer) -> AsyncIterator[RedisServer]:
    """The shared server, on which the test must leave nothing behind."""
    yield shared_server
    assert shared_server.client().dbsize() == 0


async def test_a_database_that_does_not_exist(open_tier: Open, unchanged: RedisServer) -> None:
    with pytest.raises(ConfigError, match="has no such database"):
        await open_tier(f"{unchanged.url}/99")


async def test_a_server_older_than_6_2_is_refused_and_left_as_it_was(
    open_tier: Open, own_server: RedisServer, proxy_of_own: Proxy
) -> None:
    version = ".".join(map(str, own_server.binary.version)).encode()
    older = b"6.0" + version[version.rindex(b".") :]
    assert len(older) == len(version)
    proxy_of_own.rewrites = lambda data: data.replace(version, older)
    with pytest.raises(ConfigError, match=rf"Redis {older.decode()}; 6\.2 or newer is needed"):
        await open_tier(proxy_of_own.url)
    assert own_server.ask("DBSIZE") == 0


@pytest.fixture
async def proxy_of_own(own_server: RedisServer) -> AsyncIterator[Proxy]:
    """A proxy in front of the test's own server."""
    running = await Proxy(own_server.port).start()
    yield running
    await running.close()


async def test_a_server_that_evicts_is_refused_unless_allowed(
    open_tier: Open, own_server: RedisServer
) -> None:
    own_server.ask("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
    with pytest.raises(ConfigError, match=r"volatile-lru.*redis\.allow_eviction"):
        await open_tier(own_server.url)
    assert own_server.client().dbsize() == 0
    await works(await open_tier(own_server.url, allow_eviction=True))


async def test_the_kind_of_deployment_must_be_the_one_of_the_url(
    open_tier: Open, unchanged: RedisServer, cluster: Group, sentinel: Group
) -> None:
    with pytest.raises(ConfigError, match=r"cluster mode; write redis\+cluster://"):
        await open_tier(cluster.servers[0].url)
    with pytest.raises(ConfigError, match=r"sentinel mode; write redis\+sentinel://"):
        await open_tier(sentinel.servers[3].url)
    with pytest.raises(ConfigError, match=r"no Redis Cluster; write redis://"):
        await open_tier(unchanged.url.replace("redis://", "redis+cluster://"))
    with pytest.raises(ConfigError, match=r"is no sentinel .* or redis://"):
        await open_tier(unchanged.url.replace("redis://", "redis+sentinel://") + "/shop")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ("ssl_ca_certs={folder}/none.pem", "ssl_ca_certs '.*none.pem' cannot be used: No such"),
        ("ssl_ca_certs={folder}/text", "ssl_ca_certs '.*text' cannot be used: "),
        ("ssl_certfile={folder}/none.pem", "ssl_certfile '.*none.pem' cannot be used: No such"),
        (
            "ssl_certfile={folder}/cert.pem&ssl_keyfile={folder}/text",
            "ssl_certfile '.*cert.pem' with ssl_keyfile '.*text' cannot be used: ",
        ),
    ],
)
async def test_a_file_for_tls_that_cannot_be_used_is_named(
    open_tier: Open, certificate: Path, options: str, fault: str
) -> None:
    (certificate / "text").write_text("this is no certificate")
    with pytest.raises(ConfigError, match=fault):
        await open_tier(f"rediss://127.0.0.1:1?{options.format(folder=certificate)}")


async def test_a_server_that_is_not_there(open_tier: Open) -> None:
    for url in ("redis://127.0.0.1:1", "unix:///nowhere.sock", "redis://nowhere.invalid"):
        with pytest.raises(RemoteUnavailable, match="cannot be reached"):
            await open_tier(url, timeout_seconds=1)


async def test_opening_succeeds_once_the_server_is_there(own_server: RedisServer) -> None:
    own_server.kill()
    tier = RedisTier(RedisConfig(url=own_server.url), SystemClock())
    with pytest.raises(RemoteUnavailable):
        await tier.open()
    own_server.start()
    await tier.open()
    await works(tier)
    await tier.close()


@pytest.mark.parametrize(
    "foreign",
    [
        ("SET", "test:session:{a}", "x"),
        ("HSET", "test:session:{a}", "f", "x"),
        ("SET", "test:else", "x"),
        ("RPUSH", "test:epoch:{0}", "x"),
        ("SET", "test:epoch:{0}", "x"),
        ("RPUSH", "test:checkpoints", "x"),
        ("HSET", "test:checkpoints", "f", "x"),
        ("HSET", "test:checkpoints:started", "f", "1"),
        ("SET", "test:checkpoint:{foo}", "x"),
        ("SET", "test:checkpointed", "x"),
    ],
    ids=[
        "string",
        "hash",
        "other",
        "epoch",
        "epoch of another kind",
        "list",
        "manifests",
        "started",
        "chunk",
        "prefix",
    ],
)
async def test_keys_of_somebody_else_under_the_prefix(
    open_tier: Open, shared_server: RedisServer, foreign: tuple[str, ...]
) -> None:
    shared_server.ask(*foreign)
    with pytest.raises(ConfigError, match=r"redis\.namespace: key 'test:.* was not written by"):
        await open_tier(shared_server.url)
    assert shared_server.client().keys() == [foreign[1].encode()]
    await open_tier(shared_server.url, namespace="other")


@pytest.mark.parametrize("setting", ["maxmemory", "min-replicas-to-write"])
async def test_an_empty_server_that_takes_no_writes_is_unavailable_and_not_damaged(
    own_server: RedisServer, setting: str
) -> None:
    """Its epoch is missing and cannot be made now."""
    own_server.ask("CONFIG", "SET", setting, "1")
    tier = RedisTier(RedisConfig(url=own_server.url, namespace="test"), SystemClock())
    with pytest.raises(RemoteUnavailable, match=setting):
        await tier.open()
    own_server.ask("CONFIG", "SET", setting, "0")
    await tier.open()
    await works(tier)
    await tier.close()


def ask_whoever_takes_it(deployment: Group, *command: str) -> None:
    """Run a command that writes: replicas, sentinels and other nodes of a Cluster refuse it."""
    taken = []
    for server in deployment.servers:
        with suppress(ResponseError):
            taken.append(server.ask(*command))
    assert len(taken) == 1


@pytest.mark.parametrize(
    "ours",
    [
        ("HSET", "test:checkpoints", CHECKPOINT, "manifest", "f", "x"),
        ("HSET", "test:checkpoints:started", CHECKPOINT, "1"),
        ("SET", f"test:checkpoint:{{{CHECKPOINT}-0}}", "x"),
        ("RPUSH", f"test:checkpoint:{{{CHECKPOINT}-12}}", "damaged"),
    ],
    ids=["manifests", "started", "chunk", "damaged"],
)
async def test_keys_of_checkpoints_keep_no_worker_from_opening(
    open_tier: Open, deployment: Group, ours: tuple[str, ...]
) -> None:
    tier = await open_tier(deployment.url)
    await tier.close()
    ask_whoever_takes_it(deployment, *ours)
    await works(await open_tier(deployment.url))


async def test_a_list_that_a_cluster_keeps_on_any_node_is_looked_at(
    open_tier: Open, deployment: Group
) -> None:
    ask_whoever_takes_it(deployment, "HSET", "test:checkpoints", "f", "x")
    with pytest.raises(ConfigError, match=r"key 'test:checkpoints' .* was not written by"):
        await open_tier(deployment.url)


async def test_a_user_who_may_not_look_into_the_lists_gets_in(
    open_tier: Open, shared_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    rules = [rule for rule in documented_rules() if rule != "+hrandfield"]
    shared_server.ask("ACL", "SETUSER", "worker", "reset", *rules)
    try:
        await works(await open_tier(shared_server.url.replace("://", "://worker:PASSWORD@")))
    finally:
        shared_server.ask("ACL", "DELUSER", "worker")
    assert any("'test:checkpoints'" in message for message in caplog.messages)


async def test_a_namespace_with_glob_characters_touches_no_other(
    open_tier: Open, shared_server: RedisServer
) -> None:
    shared_server.ask("SET", "testing", "x")
    shared_server.ask("SET", "t:x", "x")
    for namespace in ("t*", "t?", "[t]", "t\\", "ü:ö"):
        tier = await open_tier(shared_server.url, namespace=namespace)
        await works(tier)
        assert [page async for page in tier.scan()] == [["a"]]


@pytest.mark.parametrize("namespace", ["two words", "bra{ce", "line\n", ""])
def test_a_namespace_that_would_not_do_is_refused(namespace: str) -> None:
    with pytest.raises(ConfigError, match=r"redis\.namespace"):
        RedisConfig(namespace=namespace)


# --- the restricted user --------------------------------------------------------------------------


def documented_rules() -> list[str]:
    """Return the rules of the ACL user as docs/redis.md prints them, for namespace ``test``."""
    text = (ROOT / "docs" / "redis.md").read_text(encoding="utf-8")
    match = re.search(r"^ACL SETUSER worker (.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert match, "docs/redis.md has the command"
    return match[1].replace("\\\n", " ").replace("NAMESPACE", "test").split()


async def test_a_user_with_exactly_the_documented_rules_can_do_everything(
    open_tier: Open, deployment: Group
) -> None:
    servers = [it for it in deployment.servers if "redis_mode:sentinel" not in it.told("INFO")]
    for server in servers:
        server.ask("ACL", "SETUSER", "worker", "reset", *documented_rules())
    try:
        url = deployment.url.replace("://", "://worker:PASSWORD@")
        tier = await open_tier(url)
        heard = await listening(await open_tier(url))
        first = new_record({"n": 0})
        second = next_record(first, {"m": 1})
        for server in servers:
            server.ask("SCRIPT", "FLUSH")
        results = await tier.commit(
            [
                create("a", first),
                touch("a", first, 9e9, 9e9),
                update("a", first, second),
                create("b", new_record({})),
                end("b"),
            ]
        )
        assert results == [APPLIED] * 5
        assert await tier.load("a") is not None
        assert await tier.stored(["a"]) != [None]
        assert [page async for page in tier.scan()] == [["a"]]
        await tier.ping()
        await eventually(lambda: len(heard.announcements) == 4)
        with pytest.raises(ConfigError, match="may not do that"):
            await open_tier(url, namespace="elsewhere")
    finally:
        for server in servers:
            server.ask("ACL", "DELUSER", "worker")


def test_there_is_a_server_to_test_against() -> None:
    assert need_binary().version >= (6, 2)
