"""Who gets in: keys, cookies, hosts, origins, kinds of bodies; and what is logged."""

from __future__ import annotations

import logging

import httpx
import pytest
from serve_fakes import FakeEngine, FakeLibrary

from tieredkv.errors import OptionError
from tieredkv.serve.app import create_app
from tieredkv.serve.logs import Redacted
from tieredkv.serve.security import COOKIE_S, Keys
from tieredkv.serve.settings import Settings

KEY, OTHER = "sk-first-key", "sk-second-key"
BEARER = {"Authorization": f"Bearer {KEY}"}
QUESTION = {
    "model": "fake/model",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "video_url", "video_url": {"url": "https://a.example/f.mp4"}},
                {"type": "text", "text": "What?"},
            ],
        }
    ],
}


def connected(tmp_path, **settings) -> httpx.AsyncClient:
    app = create_app(Settings(**settings), FakeEngine(), FakeLibrary(tmp_path))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")


@pytest.fixture
def keyed(tmp_path) -> httpx.AsyncClient:
    return connected(tmp_path, api_keys=(KEY, OTHER))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/tieredkv"),
        ("GET", "/metrics"),
        ("GET", "/nothing"),
        ("GET", "/v1/files/file-x/content"),
        ("GET", "//health"),
        ("GET", "/page/../v1/models"),
        ("GET", "/v1/models?api_key=sk-first-key"),
        ("POST", "/"),
        ("POST", "/health"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/tieredkv/login"),
        ("DELETE", "/v1/files/file-x"),
        ("OPTIONS", "/v1/models"),
    ],
)
async def test_without_a_key_nothing_answers(keyed, method, path):
    reply = await keyed.send(keyed.build_request(method, f"http://127.0.0.1:8000{path}"))
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.json()["error"]["type"] == "authentication_error"
    assert reply.json()["error"]["code"] == "no_api_key"


@pytest.mark.parametrize("path", ["/", "/health", "/page/page.css"])
async def test_the_page_and_the_health_need_no_key(keyed, path):
    assert (await keyed.get(path)).status_code == 200
    assert (await keyed.head(path)).status_code in (200, 405)


@pytest.mark.parametrize(
    "header",
    [
        "Bearer",
        "Bearer ",
        "Bearer sk-first-ke",
        f"Bearer {KEY}x",
        f"Basic {KEY}",
        KEY,
        f"Bearer {KEY} {OTHER}",
        "Bearer é",
    ],
)
async def test_a_wrong_key_is_told_from_none(keyed, header):
    reply = await keyed.get("/v1/models", headers={"Authorization": header.encode("latin-1")})
    assert reply.status_code == 401
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert "sk-" not in reply.text


@pytest.mark.parametrize("key", [KEY, OTHER])
async def test_each_key_gets_in(keyed, key):
    assert (await keyed.get("/v1/models", headers={"Authorization": f"bearer {key}"})).status_code == 200


async def test_two_keys_in_one_request_are_refused(keyed):
    reply = await keyed.get("/v1/models", headers=[("Authorization", f"Bearer {KEY}")] * 2)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_header")


async def test_a_login_reads_and_does_not_write(keyed):
    reply = await keyed.post("/v1/tieredkv/login", headers=BEARER)
    assert reply.status_code == 204
    stated = reply.headers["set-cookie"].lower()
    assert "httponly" in stated
    assert "samesite=strict" in stated
    assert KEY not in stated
    assert (await keyed.get("/v1/models")).status_code == 200
    assert (await keyed.post("/v1/chat/completions", json=QUESTION)).status_code == 401
    assert (await keyed.delete("/v1/files/file-x")).status_code == 401


@pytest.mark.parametrize("other", ["a=b", 'a={"b": 1}', "a=b c", "a", ""])
async def test_a_login_is_found_among_the_cookies_of_other_servers(keyed, other):
    keyed.headers["Authorization"] = f"Bearer {KEY}"
    login = (await keyed.post("/v1/tieredkv/login")).cookies["tieredkv"]
    del keyed.headers["Authorization"]
    keyed.cookies.clear()
    reply = await keyed.get("/v1/models", headers={"Cookie": f"{other}; tieredkv={login}"})
    assert reply.status_code == 200


@pytest.mark.parametrize("cookie", ["", "x", "a.b.c", "key-1.99999999999.00", ".", "..", "key-é.1.2"])
async def test_a_forged_login_is_none(keyed, cookie):
    reply = await keyed.get("/v1/models", headers={"Cookie": f"tieredkv={cookie}".encode("latin-1")})
    assert reply.status_code == 401


def test_a_login_ends_after_its_time_and_with_the_server():
    keys = Keys([KEY])
    cookie = keys.login("key-1", now=0.0)
    assert keys.of_login(cookie, now=COOKIE_S - 1.0) == "key-1"
    assert keys.of_login(cookie, now=COOKIE_S + 1.0) is None
    assert Keys([KEY]).of_login(cookie, now=0.0) is None


def test_keys_are_different_clients():
    keys = Keys([KEY, OTHER])
    names = {keys.client(KEY), keys.client(OTHER)}
    assert len(names) == 2
    assert not any(KEY in str(name) or OTHER in str(name) for name in names)
    assert keys.client("sk-third") is None


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost@evil", "", "[", "x" * 300]
)
async def test_another_host_than_this_is_refused(tmp_path, host):
    async with connected(tmp_path) as client:
        reply = await client.get("/health", headers={"Host": host})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "wrong_host")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "192.0.2.7", "films.example", "localhost."]
)
async def test_this_host_is_known_by_its_names_and_addresses(tmp_path, host):
    async with connected(tmp_path, allowed_hosts=("films.example",)) as client:
        assert (await client.get("/health", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:3000"},
        {"Origin": "http://localhost:8000"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
async def test_a_page_of_another_origin_cannot_write(tmp_path, headers):
    async with connected(tmp_path) as client:
        reply = await client.post("/v1/chat/completions", json=QUESTION, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "other_origin")
    assert "access-control-allow-origin" not in reply.headers


async def test_the_servers_own_page_can_write(tmp_path):
    async with connected(tmp_path) as client:
        headers = {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}
        assert (await client.post("/v1/chat/completions", json=QUESTION, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
async def test_json_must_be_called_json(tmp_path, kind):
    async with connected(tmp_path) as client:
        reply = await client.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": kind})
    assert (reply.status_code, reply.json()["error"]["code"]) == (415, "wrong_type")


@pytest.mark.parametrize("path", ["/", "/v1/models", "/nothing", "/v1/tieredkv"])
async def test_replies_say_what_browsers_may_do(tmp_path, path):
    async with connected(tmp_path) as client:
        reply = await client.get(path, headers={"Origin": "https://evil.example"})
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in reply.headers["content-security-policy"] or "sandbox" in str(reply.headers)
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("sent Authorization: Bearer sk-other-key-1", "sk-other-key-1"),
        (f"a key {KEY} in a text", KEY),
        ('{"url": "data:video/mp4;base64,AAAAIGZ0eXBpc29t"}', "AAAAIGZ0"),
        ("https://films.example/a.mp4?X-Amz-Signature=0123abcd", "0123abcd"),
        ("https://films.example/a.mp4#token", "token"),
        ("https://user:hunter2@films.example/a.mp4", "hunter2"),
    ],
)
def test_a_log_holds_no_secret(text, secret):
    formatter = Redacted([KEY])
    try:
        raise ValueError(text)
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "f.py", 1, "%s", (text,), (ValueError, error, None))
    said = formatter.format(record)
    assert secret not in said
    assert "ValueError" in said


async def test_the_log_of_a_request_has_no_query_and_one_line(tmp_path, caplog):
    with caplog.at_level("INFO", logger="tieredkv.serve"):
        async with connected(tmp_path) as client:
            await client.get("/v1/models/a%0Ab?key=sk-secret")
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("GET")]
    assert line.startswith("GET /v1/models/a%0Ab 404 ")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host": "0.0.0.0"}, "lets other machines in without a key"),
        ({"host": "films.example"}, "lets other machines in without a key"),
        ({"host": "::"}, "lets other machines in without a key"),
        ({"host": " "}, "host="),
        ({"port": -1}, "port=-1"),
        ({"port": 65536}, "at most 65535"),
        ({"api_keys": ("",)}, "an API key has no characters"),
        ({"api_keys": ("two words",)}, "an API key has no characters"),
        ({"queue": 0}, "queue=0"),
        ({"timeout": 0.0}, "timeout=0.0"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"grace": -1.0}, "grace=-1.0"),
        ({"open_gb": 0.0}, "open_gb=0.0"),
        ({"upload_gb": 5.0, "uploads_gb": 1.0}, "raise that"),
        ({"hosts": ("https://a.example",)}, "is no host to fetch from"),
        ({"allowed_hosts": ("a.example:80",)}, "is not the name of a host"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(OptionError, match=said):
        Settings(**settings).check()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"host": "::1"},
        {"host": "127.0.0.5"},
        {"host": "0.0.0.0", "api_keys": (KEY,)},
        {"host": "::", "insecure": True},
    ],
)
def test_settings_that_keep_others_out_are_accepted(settings):
    assert Settings(**settings).check() == Settings(**settings)
