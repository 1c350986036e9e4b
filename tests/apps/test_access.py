"""Access to the server: cookies, tokens, names, origins and headers."""

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from dit_video.apps.access import Access, AccessRules, is_loopback
from dit_video.core.errors import UserError

LOCAL = AccessRules(is_local=True)
TOKEN = AccessRules(is_local=False, token="correct-horse")


def make_client(rules, base="http://127.0.0.1:7860"):
    def answer(request):
        return JSONResponse({"user": request.state.user})

    routes = [Route(path, answer, methods=["GET", "POST"]) for path in ("/", "/api/state", "/media/x")]
    return TestClient(Starlette(routes=routes, middleware=[Middleware(Access, rules=rules)]), base_url=base)


def test_a_page_sets_the_cookie_that_tells_users_apart():
    first, second = make_client(LOCAL), make_client(LOCAL)
    users = {client.get("/").json()["user"] for client in (first, second)}
    assert len(users) == 2
    assert first.get("/api/state").json()["user"] in users
    cookie = make_client(LOCAL).get("/").headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie


def test_the_interface_needs_the_cookie_of_a_page():
    client = make_client(LOCAL)
    assert client.get("/api/state").status_code == 401
    assert client.get("/media/x").status_code == 401
    client.cookies.set("dit_video_user", "../../etc/passwd")
    assert client.get("/api/state").status_code == 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", ""])
def test_a_local_server_refuses_other_names(host):
    assert make_client(LOCAL).get("/", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1", "[::1]:7860"])
def test_a_local_server_answers_to_names_of_its_machine(host):
    assert make_client(LOCAL).get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}]
)
def test_pages_of_other_servers_cannot_post(headers):
    client = make_client(LOCAL)
    client.get("/")
    assert client.post("/api/state", headers={"Origin": "http://127.0.0.1:7860"}).status_code == 200
    assert client.post("/api/state", headers=headers).status_code == 403


def test_a_proxy_that_calls_the_server_by_another_name_passes_posts_of_its_own_pages():
    client = make_client(LOCAL)
    client.get("/")
    headers = {"Origin": "https://hub.example", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/api/state", headers=headers).status_code == 200
    assert client.post("/api/state", headers={**headers, "Sec-Fetch-Site": "same-site"}).status_code == 403


def test_a_token_is_needed_once_and_leaves_the_address():
    client = make_client(TOKEN, base="http://gpu.example:7860")
    assert client.get("/").status_code == 401
    assert client.get("/?token=wrong-horse").status_code == 401
    answer = client.get("/?token=correct-horse&checkpoint=20", follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"] == ".?checkpoint=20"
    assert client.get("/api/?token=correct-horse", follow_redirects=False).headers["location"] == "."
    assert client.get("/api/state?token=correct-horse", follow_redirects=False).headers["location"] == "state"
    assert client.get("/").status_code == 200
    assert client.get("/api/state").status_code == 200
    assert make_client(TOKEN, base="http://gpu.example:7860").get("/api/state").status_code == 401


def test_a_proxy_that_keeps_its_own_name_needs_a_token():
    headers = {"Host": "hub.example", "Origin": "https://hub.example"}
    refusal = make_client(LOCAL).get("/", headers=headers)
    assert (refusal.status_code, "--token" in refusal.text) == (403, True)
    client = make_client(TOKEN, base="http://hub.example")
    assert client.get("/?token=correct-horse", headers=headers).status_code == 200
    assert client.post("/api/state", headers=headers).status_code == 200


def test_servers_of_one_host_do_not_lock_each_other_out():
    first = make_client(TOKEN, base="http://gpu.example:7860")
    other = AccessRules(is_local=False, token="battery-staple")
    second = make_client(other, base="http://gpu.example:7861")
    assert first.get("/?token=correct-horse").status_code == 200
    second.cookies = first.cookies  # as in a browser, whose cookies do not depend on the port
    user = first.get("/api/state").json()["user"]
    assert second.get("/").status_code == 401
    assert second.get("/?token=battery-staple").status_code == 200
    assert second.get("/api/state").status_code == 200
    first.cookies = second.cookies
    assert first.get("/api/state").json()["user"] == user


@pytest.mark.parametrize("host", ["gpu.example", "gpu.example:443", "[::1]", "[::1]:7860", "gpu.example:x;y=1", "a:٣"])
def test_a_token_is_kept_whatever_the_name_of_the_server(host):
    client = make_client(TOKEN, base="http://gpu.example")
    answer = client.get("/?token=correct-horse", headers={"Host": host.encode()}, follow_redirects=False)
    name, _, rest = answer.headers["set-cookie"].partition("=")
    assert name.replace("_", "").isalnum()
    assert rest.startswith("correct-horse; Path=/;")
    assert client.get("/", headers={"Host": host.encode(), "Cookie": f"{name}=correct-horse"}).status_code == 200


def test_pages_load_only_what_the_server_has():
    headers = make_client(LOCAL).get("/").headers
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("token", ["short", "with space and more", "a;b;c;d;e;f", ""])
def test_tokens_that_cookies_would_change_are_refused(token):
    with pytest.raises(UserError, match=r"Use --token"):
        AccessRules(is_local=False, token=token)


def test_loopback_addresses():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "192.168.1.2", "::", "gpu.example")))
