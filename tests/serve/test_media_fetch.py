"""Films are fetched from allowed hosts with public addresses, at the very address that was checked, within limits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from tieredkv.errors import OptionError
from tieredkv.serve.errors import ApiError
from tieredkv.serve.media import fetch as fetch_module
from tieredkv.serve.media.addresses import is_public
from tieredkv.serve.media.connect import PublicTransport, permitted, resolve
from tieredkv.serve.media.fetch import Fetcher
from tieredkv.serve.media.store import Store
from tieredkv.serve.settings import Settings

MIB = 2**-10
"""In GiB."""
FILM = b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 400


class Web:
    """A server on this machine, which stands for all of the internet: names lead to it, and it counts what comes."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str]]] = []
        self._tasks: list[asyncio.Task] = []
        self.pages: dict[str, Callable[..., list[bytes | float]]] = {}
        self.asked: list[str] = []
        self.addresses: dict[str, list[list[str]]] = {}
        """What a name resolves to, the first time, the second ..."""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.append(asyncio.current_task())
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.strip().split("\r\n")
            path = first.split()[1]
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            self.requests.append((path, headers))
            for part in self.pages[path.partition("?")[0]](headers):
                if isinstance(part, float):
                    await asyncio.sleep(part)
                else:
                    writer.write(part)
                    await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def resolve(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        answers = self.addresses.get(host)
        if answers is None:
            return ["127.0.0.1"] if host.endswith(".example") else await resolve(host, port)
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def transport(self) -> PublicTransport:
        """Takes this machine for a public one, and nothing else that is not."""
        return PublicTransport(self.resolve, lambda address: address == "127.0.0.1" or permitted(address))


def answer(body: bytes = FILM, status: str = "200 OK", **headers: str) -> Callable[..., list[bytes | float]]:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    fields = {"Content-Type": "video/mp4", "Content-Length": str(len(body)), **given}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return lambda sent: [f"HTTP/1.1 {status}\r\n{lines}\r\n".encode(), body]


@pytest.fixture
async def web():
    web = Web()
    await web.start()
    yield web
    await web.stop()


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Store(MIB, 4 * MIB)
    store.open()
    yield store
    store.close()


@pytest.fixture
def fetcher(web, store) -> Fetcher:
    hosts = (f"films.example:{web.port}", f"*.sub.example:{web.port}", f"evil.example:{web.port}")
    return Fetcher(store, hosts, False, web.transport, idle_s=0.5, total_s=3.0)


def url(web: Web, path: str = "/film.mp4", host: str = "films.example") -> str:
    return f"http://{host}:{web.port}{path}"


async def refusal(fetcher: Fetcher, url: str) -> ApiError:
    with pytest.raises(ApiError) as refused:
        await fetcher.fetch(url)
    assert fetcher._store.bytes == 0
    return refused.value


async def test_a_film_is_downloaded_as_it_is(web, fetcher):
    web.pages["/film.mp4"] = answer()
    entry = await fetcher.fetch(url(web, "/film.mp4?token=secret"))
    assert entry.path.read_bytes() == FILM
    assert entry.name == url(web)
    assert entry.path.suffix == ".mp4"
    (path, headers) = web.requests[0]
    assert path == "/film.mp4?token=secret"
    assert headers["host"] == f"films.example:{web.port}"
    assert headers["accept-encoding"] == "identity"
    assert "cookie" not in headers


# ---- which hosts


@pytest.mark.parametrize(
    "host", ["other.example", "films.example.evil.example", "sub.example", "xfilms.example", "127.0.0.1", "localhost"]
)
async def test_hosts_that_are_not_listed_are_refused_unseen(web, fetcher, host):
    refused = await refusal(fetcher, url(web, host=host))
    assert (refused.status, refused.code) == (403, "host_refused")
    assert web.asked == []


@pytest.mark.parametrize("host", ["a.sub.example", "a.b.sub.example", "FILMS.example", "films.example."])
async def test_listed_hosts_and_those_below_a_star_are_allowed(web, fetcher, host):
    web.pages["/film.mp4"] = answer()
    web.addresses["films.example."] = [["127.0.0.1"]]
    assert (await fetcher.fetch(url(web, host=host))).bytes == len(FILM)


@pytest.mark.parametrize("host", ["films.example", "*.sub.example", "films.example:8080", "8.8.8.8", "2606:4700::1111"])
def test_hosts_may_be_written_so(host):
    assert Settings(hosts=(host,)).check().hosts == (host,)


@pytest.mark.parametrize("host", ["", "*", "*.", "http://films.example", "films.example/a", "a b", "films.example:x"])
def test_what_is_no_host_is_refused_at_the_start(host):
    with pytest.raises(OptionError, match="no host to fetch from"):
        Settings(hosts=(host,)).check()


async def test_a_port_must_be_listed(web, store):
    for listed, any_host in ((("films.example",), False), ((), True)):
        fetcher = Fetcher(store, listed, any_host, web.transport)
        assert (await refusal(fetcher, url(web))).code == "host_refused"
    assert web.asked == []


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ("http://user:secret@films.example/film.mp4", "invalid_url"),
        ("http://films.example\\@evil.example/film.mp4", "invalid_url"),
        ("http://[::1/film.mp4", "invalid_url"),
        ("http:///film.mp4", "invalid_url"),
        ("http://films.example:99999/film.mp4", "invalid_url"),
        ("http://films.example/" + "x" * 9000, "invalid_url"),
        ("ftp://films.example/film.mp4", "invalid_url"),
    ],
)
async def test_other_urls_are_refused_without_telling_their_secrets(web, store, bad, code):
    refused = await refusal(Fetcher(store, (), True, web.transport), bad)
    assert refused.status in (400, 403)
    assert "secret" not in str(refused)
    assert web.asked == []


# ---- which addresses


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "198.18.0.1", "224.0.0.1", "240.0.0.1",
        "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:8.8.8.8",
        "::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2001::1", "fe80::1",
        "fe80::1%eth0",
        "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "nonsense", "",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00::1"])
def test_addresses_that_are(address):
    assert is_public(address)


def test_the_addresses_of_this_machine_are_refused_however_public(monkeypatch):
    monkeypatch.setattr("tieredkv.serve.media.connect.own_addresses", lambda: frozenset({"8.8.8.8"}))
    assert not permitted("8.8.8.8")
    assert permitted("1.1.1.1")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "169.254.169.254", "10.0.0.1", "100.64.0.1",
        "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "0", "localhost",
    ],
)  # fmt: skip
async def test_no_way_to_write_an_address_leads_inside(store, host):
    """The real resolver, for what needs no network."""
    refused = await refusal(Fetcher(store, (), True), f"http://{host}/film.mp4")
    assert refused.status in (400, 403)
    assert "no public address" in str(refused) or "not a URL" in str(refused) or "gaierror" in str(refused)


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["127.0.0.1", "10.0.0.1"], ["::1"], []])
async def test_a_name_with_one_private_address_is_refused(web, fetcher, addresses):
    web.addresses["films.example"] = [addresses]
    refused = await refusal(fetcher, url(web))
    assert (refused.status, refused.code) == (403, "host_refused")
    assert "10.0.0.1" not in str(refused)
    assert web.requests == []


async def test_a_name_that_is_public_when_checked_and_private_afterwards_gains_nothing(web, fetcher, monkeypatch):
    """The connection goes to the address that was checked: the name is resolved once, and nobody else resolves it."""
    web.pages["/film.mp4"] = answer()
    web.addresses["films.example"] = [["127.0.0.1"], ["10.0.0.1"]]
    connected = []
    connect = asyncio.BaseEventLoop.create_connection

    async def noted(loop, factory, host=None, *given, **options):
        connected.append(host)
        return await connect(loop, factory, host, *given, **options)

    monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", noted)
    assert (await fetcher.fetch(url(web))).bytes == len(FILM)
    assert web.asked == ["films.example"]
    assert set(connected) == {"127.0.0.1"}
    store = fetcher._store
    store.delete(store._entries[next(iter(store._entries))])
    assert (await refusal(fetcher, url(web))).code == "host_refused"


# ---- redirects


async def test_redirects_are_followed(web, fetcher):
    web.pages["/one"] = answer(b"", "302 Found", Location="/two")
    web.pages["/two"] = answer(b"", "307 Temporary Redirect", Location=url(web, host="a.sub.example"))
    web.pages["/film.mp4"] = answer()
    assert (await fetcher.fetch(url(web, "/one"))).bytes == len(FILM)
    assert web.asked == ["films.example", "films.example", "a.sub.example"]


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/", "http://169.254.169.254/latest/meta-data/", "http://10.0.0.1/", "http://[::1]/",
        "file:///etc/passwd", "ftp://films.example/a", "http://user:secret@films.example/", "gopher://films.example:70/",
        "http://other.example/?secret", "data:video/mp4;base64,AAAA", "http://[",
    ],
)  # fmt: skip
async def test_a_redirect_is_checked_like_a_url(web, fetcher, location):
    web.pages["/film.mp4"] = answer(b"", "302 Found", Location=location)
    refused = await refusal(fetcher, url(web))
    assert refused.status in (400, 403)
    assert "secret" not in str(refused)
    assert len(web.requests) == 1


async def test_a_redirect_to_a_name_with_a_private_address_is_refused(web, fetcher):
    web.pages["/film.mp4"] = answer(b"", "302 Found", Location=url(web, host="evil.example"))
    web.addresses["evil.example"] = [["192.168.0.1"]]
    assert (await refusal(fetcher, url(web))).code == "host_refused"


async def test_redirects_end(web, fetcher):
    web.pages["/film.mp4"] = answer(b"", "302 Found", Location="/film.mp4")
    assert "more than 5 redirects" in str(await refusal(fetcher, url(web)))
    assert len(web.requests) == 6


# ---- bodies


async def test_a_stated_length_over_the_limit_is_refused_at_once(web, fetcher):
    web.pages["/film.mp4"] = answer(Content_Length=str(2**40))
    assert (await refusal(fetcher, url(web))).status == 413


async def test_an_endless_body_is_cut_at_the_limit(web, fetcher):
    web.pages["/film.mp4"] = lambda sent: [b"HTTP/1.1 200 OK\r\n\r\n", *[bytes(2**18)] * 1000]
    assert (await refusal(fetcher, url(web))).status == 413


async def test_an_endless_chunked_body_is_cut_at_the_limit(web, fetcher):
    chunk = b"40000\r\n" + bytes(2**18) + b"\r\n"
    web.pages["/film.mp4"] = lambda sent: [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[chunk] * 1000]
    assert (await refusal(fetcher, url(web))).status == 413


@pytest.mark.parametrize("stated", [len(FILM) + 1000, len(FILM) - 1000])
async def test_a_length_that_lies_gains_nothing(web, fetcher, stated):
    web.pages["/film.mp4"] = answer(Content_Length=str(stated))
    if stated > len(FILM):
        assert "RemoteProtocolError" in str(await refusal(fetcher, url(web)))
    else:
        assert (await fetcher.fetch(url(web))).bytes == stated


async def test_an_answer_of_nothing_is_refused(web, fetcher):
    web.pages["/film.mp4"] = answer(b"")
    assert "empty" in str(await refusal(fetcher, url(web)))


async def test_a_compressed_answer_is_refused(web, fetcher):
    web.pages["/film.mp4"] = answer(Content_Encoding="gzip")
    assert "compressed" in str(await refusal(fetcher, url(web)))


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"<!DOCTYPE html><p>film", "text/html"),
        (b"  <html>", "video/mp4"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\nhttp://10.0.0.1/\n", "video/mp4"),
        (b"#EXTM3U\nfile:///etc/passwd\n", "application/vnd.apple.mpegurl"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "video/mp4"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><MPD/>", "video/mp4"),
        (FILM, "text/plain"),
    ],
)
async def test_pages_and_playlists_are_refused(web, fetcher, body, kind):
    web.pages["/film.mp4"] = answer(body, Content_Type=kind)
    assert (await refusal(fetcher, url(web))).code == "not_a_film"


@pytest.mark.parametrize("status", ["404 Not Found", "500 Oops", "206 Partial Content", "304 Not Modified", "204 No"])
async def test_other_answers_are_one_sentence(web, fetcher, status):
    web.pages["/film.mp4"] = answer(b"", status)
    refused = await refusal(fetcher, url(web, "/film.mp4?key=secret"))
    assert f"its server answers {status[:3]}" in str(refused)
    assert "secret" not in str(refused)


async def test_a_server_that_says_nothing_is_given_up(web, fetcher):
    web.pages["/film.mp4"] = lambda sent: [10.0]
    assert "nothing came for 0.5 s" in str(await refusal(fetcher, url(web)))


async def test_a_server_that_stops_in_the_middle_is_given_up(web, fetcher):
    web.pages["/film.mp4"] = lambda sent: [*answer()(sent)[:1], FILM[:5000], 10.0]
    assert "nothing came for 0.5 s" in str(await refusal(fetcher, url(web)))


async def test_a_slow_server_is_given_up_in_the_end(web, store):
    web.pages["/film.mp4"] = lambda sent: [answer()(sent)[0], *[b"x", 0.05] * 1000]
    fetcher = Fetcher(store, (f"films.example:{web.port}",), False, web.transport, idle_s=1, total_s=0.5)
    assert "more than 0.5 s" in str(await refusal(fetcher, url(web)))


async def test_what_is_no_http_is_one_sentence(web, fetcher):
    web.pages["/film.mp4"] = lambda sent: [b"220 smtp ready\r\n"]
    assert "RemoteProtocolError" in str(await refusal(fetcher, url(web)))


async def test_a_request_that_goes_away_leaves_nothing(web, fetcher, monkeypatch):
    monkeypatch.setattr(fetch_module, "_BLOCK", 1000)
    web.pages["/film.mp4"] = lambda sent: [*answer()(sent)[:1], FILM[:5000], 10.0]
    task = asyncio.create_task(fetcher.fetch(url(web)))
    async with asyncio.timeout(5):
        while not fetcher._store.bytes:
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert fetcher._store.bytes == 0


# ---- once


@pytest.mark.parametrize(
    ("given", "asks"),
    [({"ETag": '"1"'}, {"if-none-match": '"1"'}), ({"Last_Modified": "yesterday"}, {"if-modified-since": "yesterday"})],
)
async def test_a_film_is_downloaded_once_as_long_as_it_is_the_same(web, fetcher, given, asks):
    def page(sent):
        known = all(sent.get(name) == value for name, value in asks.items())
        return answer(b"", "304 Not Modified", Content_Length="")(sent) if known else answer(**given)(sent)

    web.pages["/film.mp4"] = page
    first = await fetcher.fetch(url(web))
    assert await fetcher.fetch(url(web)) is first
    assert len(web.requests) == 2
    web.pages["/film.mp4"] = answer(FILM + b"more", ETag='"2"')
    assert (await fetcher.fetch(url(web))).sha256 != first.sha256


async def test_a_film_without_a_version_is_kept_for_a_while(web, fetcher, monkeypatch):
    web.pages["/film.mp4"] = answer()
    first = await fetcher.fetch(url(web))
    assert await fetcher.fetch(url(web)) is first
    assert len(web.requests) == 1
    monkeypatch.setattr(fetch_module, "_FRESH_S", 0.0)
    assert await fetcher.fetch(url(web)) is not first
    assert await fetcher.fetch(url(web, "/film.mp4?other")) is not first


async def test_a_film_that_left_the_store_is_downloaded_again(web, fetcher):
    web.pages["/film.mp4"] = answer(ETag='"1"')
    first = await fetcher.fetch(url(web))
    fetcher._store.delete(first)
    assert (await fetcher.fetch(url(web))).sha256 == first.sha256
    assert "if-none-match" not in web.requests[1][1]


async def test_two_requests_for_one_url_download_it_once(web, fetcher):
    web.pages["/film.mp4"] = lambda sent: [0.1, *answer()(sent)]
    one, other = await asyncio.gather(fetcher.fetch(url(web)), fetcher.fetch(url(web)))
    assert one is other
    assert len(web.requests) == 1


async def test_nothing_of_a_url_is_logged_but_its_public_part(web, fetcher, caplog, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://10.0.0.1:3128")
    monkeypatch.setenv("ALL_PROXY", "http://10.0.0.1:3128")
    web.pages["/film.mp4"] = answer()
    with caplog.at_level(logging.INFO):
        await fetcher.fetch(url(web, "/film.mp4?token=secret"))
    assert "secret" not in caplog.text
