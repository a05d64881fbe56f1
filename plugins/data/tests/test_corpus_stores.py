"""Inputs in S3 and over SFTP, from real servers on loopback: read whole, with credentials of the environment, over connections that
break."""

import asyncio
import gzip
import json
import select
import socket
import struct
import threading
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kernelm.testing.parts import absent
from kernelm_contracts.data import Input, PrepareRequest, Split, Store
from kernelm_data.corpus import remote
from kernelm_data.corpus.effects import inputs_of
from kernelm_data.corpus.pipeline import Sources, prepare
from kernelm_data.corpus.store import Rows
from kernelm_data.settings import DataSettings
from kernelm_sdk.errors import ClientFault, PluginFault

missing = [name for name in ("s3fs", "sshfs", "moto", "flask_cors") if find_spec(name) is None]
if missing:
    absent(f"{', '.join(missing)} not installed: pip install 'kernelm-data[s3,sftp]' 'moto[s3]' flask-cors")

import asyncssh  # noqa: E402
from moto.server import ThreadedMotoServer  # noqa: E402

SECRET = "wJalrXUtnFEMI-of-this-test-alone"
COUNT = 2_000


def text(n: int) -> str:
    return f"Entry {n} of {chr(97 + n % 26) * 4}: {n * 7919} things that are in no other entry, {n}, nor near it, {n * 104729}."


def files() -> dict[str, bytes]:
    """Lines, packed lines, a table and a text: COUNT + 201 documents in all."""
    lines = [json.dumps({"text": text(n)}).encode() + b"\n" for n in range(COUNT + 100)]
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [text(n) for n in range(COUNT + 100, COUNT + 200)]}), table)
    return {"a.jsonl": b"".join(lines[:COUNT]), "more/b.jsonl.gz": gzip.compress(b"".join(lines[COUNT:])),
            "more/c.parquet": table.getvalue().to_pybytes(), "d.txt": text(COUNT + 200).encode()}  # fmt: skip


class Cutting:
    """A relay in front of a server that resets its first `cuts` connections after `most` bytes of answers each; then, if it is
    `mortal`, it takes no more."""

    def __init__(self, port: int, cuts: int, most: int = 60_000, mortal: bool = False) -> None:
        self._to, self._most, self.left, self.mortal = port, most, cuts, mortal
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            if self.mortal and not self.left:
                client.close()
                continue
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        passed = 0
        with client, socket.create_connection(("127.0.0.1", self._to)) as server:
            while True:
                ready, _, _ = select.select([client, server], [], [])
                for side in ready:
                    try:
                        data = side.recv(16_384)
                        (client if side is server else server).sendall(data)
                    except OSError:  # one of them has hung up
                        return
                    if not data:
                        return
                    passed += len(data) if side is server else 0
                if passed > self._most and self.left > 0:
                    self.left -= 1
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
                    return

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def bucket(monkeypatch):
    """The port of an S3 server that has the files in a bucket."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    for name, value in (("ACCESS_KEY_ID", "one"), ("SECRET_ACCESS_KEY", SECRET), ("DEFAULT_REGION", "us-east-1"),
                        ("EC2_METADATA_DISABLED", "true"), ("ENDPOINT_URL", f"http://127.0.0.1:{port}")):  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    s3 = fsspec.filesystem("s3", skip_instance_cache=True)
    if not s3.exists("corpus"):  # what an S3 server holds lasts as long as its process
        s3.mkdir("corpus")
    s3.pipe({f"corpus/texts/{name}": data for name, data in files().items()})
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield port
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


@pytest.fixture
def host(tmp_path, monkeypatch):
    """The port of an SFTP server that has the files below /texts, for the key of this user, and that this user knows."""
    home, root = tmp_path / "home", tmp_path / "root"
    (home / ".ssh").mkdir(parents=True)
    for name, data in files().items():
        (root / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "texts" / name).write_bytes(data)
    mine, theirs = asyncssh.generate_private_key("ssh-ed25519"), asyncssh.generate_private_key("ssh-ed25519")
    mine.write_private_key(str(home / ".ssh" / "id_ed25519"))
    mine.write_public_key(str(home / ".ssh" / "id_ed25519.pub"))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    keys = asyncssh.import_authorized_keys(mine.export_public_key().decode())
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def listen() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen("127.0.0.1", 0, server_host_keys=[theirs], authorized_client_keys=keys,
                                     sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=str(root)))  # fmt: skip

    acceptor = asyncio.run_coroutine_threadsafe(listen(), loop).result()
    (home / ".ssh" / "known_hosts").write_text(f"* {theirs.export_public_key().decode()}")
    yield acceptor.get_port()
    fsspec.get_filesystem_class("sftp").clear_instance_cache()

    async def end() -> None:
        acceptor.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:  # of connections
            task.cancel()

    asyncio.run_coroutine_threadsafe(end(), loop).result()
    loop.call_soon_threadsafe(loop.stop)


def corpus(tmp_path: Path, url: str):
    """The card and the texts of the corpus at a URL, by this process: workers have the environment that their server began with."""
    work, out = tmp_path / "work", tmp_path / "out"
    out.mkdir()
    request = PrepareRequest("", "auto", inputs=(Input(url=url),), split=Split(0, 0), store=Store(shard_mb=0.1))
    inputs = inputs_of(request, DataSettings(urls=(url,)))
    card = prepare(Sources(inputs, (None,)), request, work, out, lambda *_: None)
    rows = Rows(out, columns=["id", "text"])
    return card, [rows[i]["text"] for i in range(len(rows))]


EVERY = sorted(text(n) for n in range(COUNT + 201))


def test_s3_with_credentials_of_the_environment_that_are_written_nowhere(tmp_path, bucket):
    card, texts = corpus(tmp_path, "s3://corpus/texts")
    assert sorted(texts) == EVERY
    assert card.sources == {"jsonl": COUNT + 100, "parquet": 100, "text": 1}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize(("url", "word"), [("s3://nowhere", "bucket"), ("s3://corpus/none", "no files")])
def test_what_is_not_in_s3_is_named(tmp_path, bucket, url, word):
    with pytest.raises(ClientFault, match=word) as caught:
        corpus(tmp_path, url)
    assert url in str(caught.value)
    assert caught.value.code in ("unreadable", "empty_source")


@pytest.fixture
def asked(monkeypatch):
    """The URLs that were asked for, each time."""
    urls, real = [], remote._file_system
    monkeypatch.setattr(remote, "_file_system", lambda url: (urls.append(url), real(url))[1])
    return urls


@pytest.mark.parametrize(("without", "profile", "word", "remedy"), [
    (("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"), "", r"\(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY not set\)", "environment"),
    (("SECRET_ACCESS_KEY",), "", r"missing: AWS_SECRET_ACCESS_KEY \(AWS_SECRET_ACCESS_KEY not set\)", "set AWS_ACCESS_KEY_ID and"),
    (("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"), "nobody", "nobody", "AWS_PROFILE"),
])  # fmt: skip
def test_what_s3_lacks_to_let_us_in_is_named_at_once(tmp_path, bucket, monkeypatch, asked, without, profile, word, remedy):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in without:
        monkeypatch.delenv(f"AWS_{name}")
    if profile:
        monkeypatch.setenv("AWS_PROFILE", profile)
    with pytest.raises(ClientFault, match=word) as caught:
        corpus(tmp_path, "s3://corpus/texts")
    assert caught.value.code == "no_credentials"
    assert remedy in caught.value.remedy
    assert len(asked) == 1  # asking again would change nothing


def test_a_key_that_sftp_does_not_know_is_named_at_once(tmp_path, host, asked):
    stranger = asyncssh.generate_private_key("ssh-ed25519")
    stranger.write_private_key(str(tmp_path / "home" / ".ssh" / "id_ed25519"))
    stranger.write_public_key(str(tmp_path / "home" / ".ssh" / "id_ed25519.pub"))
    with pytest.raises(ClientFault, match=r"(?i)denied") as caught:
        corpus(tmp_path, f"sftp://127.0.0.1:{host}/texts")
    assert caught.value.code == "no_credentials"
    assert "SSH_AUTH_SOCK" in caught.value.remedy
    assert len(asked) == 1


def test_an_object_in_s3_that_was_written_over_is_read_again(tmp_path, bucket):
    (tmp_path / "one").mkdir()
    url, s3 = "s3://corpus/changed", fsspec.filesystem("s3", skip_instance_cache=True)
    for word in ("Oslo", "Bonn"):  # of one size
        s3.pipe("corpus/changed/a.jsonl", b"".join(json.dumps({"text": f"{word}: {text(n)}"}).encode() + b"\n" for n in range(50)))
        card, texts = corpus(tmp_path / "one", url)
        assert {found[:4] for found in texts} == {word}
        (tmp_path / "one" / "out").rename(tmp_path / word)
    assert len(texts) == card.splits["train"].documents == 50


def test_s3_over_a_connection_that_breaks(tmp_path, bucket, monkeypatch):
    relay = Cutting(bucket, 4)
    monkeypatch.setattr(remote, "PAUSE_S", 0.001)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relay.port}")
    _, texts = corpus(tmp_path, "s3://corpus/texts")
    relay.close()
    assert sorted(texts) == EVERY
    assert relay.left < 4


def test_sftp_with_the_keys_of_the_user(tmp_path, host):
    card, texts = corpus(tmp_path, f"sftp://127.0.0.1:{host}/texts")
    assert sorted(texts) == EVERY
    assert card.sources == {"jsonl": COUNT + 100, "parquet": 100, "text": 1}


def test_sftp_over_a_connection_that_breaks(tmp_path, host, monkeypatch):
    relay = Cutting(host, 4)
    monkeypatch.setattr(remote, "PAUSE_S", 0.001)
    _, texts = corpus(tmp_path, f"sftp://127.0.0.1:{relay.port}/texts")
    relay.close()
    assert sorted(texts) == EVERY
    assert relay.left < 4


def test_sftp_speaks_to_no_host_whose_key_is_not_known(tmp_path, host, asked):
    (tmp_path / "home" / ".ssh" / "known_hosts").write_text("")
    with pytest.raises(ClientFault, match=r"(?i)host key") as caught:
        corpus(tmp_path, f"sftp://127.0.0.1:{host}/texts")
    assert (caught.value.code, len(asked)) == ("unknown_host", 1)


def test_a_server_that_is_gone_ends_the_job_which_then_goes_on(tmp_path, host, monkeypatch):
    relay = Cutting(host, 1, 300_000, mortal=True)
    monkeypatch.setattr(remote, "PAUSE_S", 0.001)
    url = f"sftp://127.0.0.1:{relay.port}/texts"
    with pytest.raises(PluginFault) as caught:
        corpus(tmp_path, url)
    assert (caught.value.code, caught.value.retriable) == ("connection_lost", True)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("book.json")}
    assert done
    relay.mortal = False
    (tmp_path / "out").rmdir()
    _, texts = corpus(tmp_path, url)
    relay.close()
    assert sorted(texts) == EVERY
    assert {path: path.stat().st_mtime_ns for path in done} == done


@pytest.mark.parametrize("url", [f"sftp://jane:{SECRET}@host/texts", f"https://jane:{SECRET}@host/texts"])
def test_no_password_in_an_address(url):
    request = PrepareRequest("", "auto", inputs=(Input(url=url),))
    with pytest.raises(ClientFault) as caught:
        inputs_of(request, DataSettings())
    assert caught.value.code == "credentials_in_url"
    assert SECRET not in str(caught.value)
