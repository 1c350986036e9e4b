"""Who may use the server, and what browsers may do with its pages."""

import hmac
import ipaddress
import re
import secrets
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dit_video.apps.pages import render_message
from dit_video.core.errors import UserError

MIN_TOKEN = 8
"""Minimum number of characters of a token."""
_USER_COOKIE, _TOKEN_COOKIE = "dit_video_user", "dit_video_token"
"""Names of cookies. Browsers send them to all ports of a host, so the port is added to the name of the token's, which
differs from server to server."""
_USER = re.compile(r"[0-9a-f]{32}")
_COOKIE_SECONDS = 365 * 24 * 3600
_LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; style-src 'self'; script-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Return whether a server at this address is reached from its own machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_token() -> str:
    """Return a random token."""
    return secrets.token_urlsafe(18)


@dataclass(frozen=True, kw_only=True)
class AccessRules:
    """Rules for requests.

    Raises:
      UserError: If the token is too short, or has characters that addresses and cookies change.
    """

    is_local: bool
    """Whether the server is reached from its own machine alone. Then a page of another name, which leads here by DNS,
    is refused."""
    token: str | None = None
    """Text that browsers send to be let in; None for none."""

    def __post_init__(self):
        if self.token is not None and not re.fullmatch(rf"[A-Za-z0-9_-]{{{MIN_TOKEN},200}}", self.token):
            rule = f"it must have {MIN_TOKEN} or more letters, digits, - and _"
            raise UserError(f"token={self.token!r} is invalid: {rule}. Use --token {make_token()}")


class Access:
    """ASGI middleware that lets browsers in, gives each a cookie, and limits what its pages may load.

    The cookie is what tells users apart: `scope["state"]["user"]`. It is set by pages; other requests need it.
    """

    def __init__(self, app: ASGIApp, rules: AccessRules):
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        cookies: list[str] = []

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
                for cookie in cookies:
                    headers.append("Set-Cookie", cookie)
            await send(message)

        response = self._refuse(scope, cookies)
        await (response or self._app)(scope, receive, send_with_headers)

    def _refuse(self, scope: Scope, cookies: list[str]) -> Response | None:
        """Return the answer to a request that is not passed on; note the cookies that the answer sets."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = (urlsplit(f"//{host}").hostname or "").lower() if host else ""  # without the port
        if self._rules.is_local and name not in _LOCAL_NAMES:
            advice = "Use this server by its own address, such as http://127.0.0.1, or start it with --token."
            return _make_refusal(scope, 403, advice)
        origin = headers.get("origin")
        site = headers.get("sec-fetch-site")
        is_foreign = origin is not None and urlsplit(origin).netloc != host if site is None else site != "same-origin"
        if scope["method"] not in ("GET", "HEAD") and is_foreign:
            return _make_refusal(scope, 403, "This request came from a page of another server.")
        own, token_cookie = _read_cookies(headers), _name_token_cookie(host)
        if (token := self._rules.token) is not None:
            query = parse_qsl(scope["query_string"].decode("latin-1"))
            sent = dict(query).get("token")
            if sent is not None and hmac.compare_digest(sent.encode(), token.encode()) and scope["method"] == "GET":
                cookies.append(_format_cookie(token_cookie, token))
                rest = urlencode([(name, value) for name, value in query if name != "token"])
                here = scope["path"].rpartition("/")[2] or "."  # relative, as a proxy may have put a path before it
                return RedirectResponse(here + (f"?{rest}" if rest else ""), status_code=303)
            if not hmac.compare_digest(own.get(token_cookie, "").encode(), token.encode()):
                return _make_refusal(
                    scope, 401, "Open the address that the server printed when it started: it ends with ?token=…."
                )
        user = own.get(_USER_COOKIE, "")
        if not _USER.fullmatch(user):
            if _is_api(scope):
                return _make_refusal(scope, 401, "Open the studio's page first, and allow its cookie.")
            user = secrets.token_hex(16)
            cookies.append(_format_cookie(_USER_COOKIE, user))
        scope.setdefault("state", {})["user"] = user
        return None


def _is_api(scope: Scope) -> bool:
    return scope["path"].startswith(("/api/", "/media/"))


def _make_refusal(scope: Scope, status: int, text: str) -> Response:
    if _is_api(scope):
        return JSONResponse({"error": text, "field": None}, status_code=status)
    return render_message("Not here", text, title="dit_video", has_run=False, status=status, path=scope["path"])


def _name_token_cookie(host: str) -> str:
    """Return the name of the token's cookie for a Host header."""
    port = host.rpartition(":")[2]
    return f"{_TOKEN_COOKIE}_{port}" if port.isascii() and port.isdecimal() else _TOKEN_COOKIE


def _read_cookies(headers: Headers) -> dict[str, str]:
    try:
        return {name: cookie.value for name, cookie in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}


def _format_cookie(name: str, value: str) -> str:
    return f"{name}={value}; Path=/; Max-Age={_COOKIE_SECONDS}; HttpOnly; SameSite=Strict"
