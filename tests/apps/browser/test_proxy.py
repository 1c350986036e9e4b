"""The studio behind a proxy that serves it under a path, as JupyterHub's does."""

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

pytestmark = pytest.mark.slow
PREFIX = "/user/x/proxy/7860"


@pytest.fixture
def proxy(address):
    """Return the address of a proxy that takes its path off, and calls the studio by its own name."""
    studio = urlsplit(address).netloc

    class Handler(BaseHTTPRequestHandler):
        def forward(self):
            if not self.path.startswith(f"{PREFIX}/"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            connection = http.client.HTTPConnection(studio)
            connection.request(self.command, self.path[len(PREFIX) :], body, {**self.headers, "Host": studio})
            answer = connection.getresponse()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() != "transfer-encoding":
                    self.send_header(name, value)
            self.end_headers()
            while part := answer.read1(65536):
                self.wfile.write(part)

        do_GET = do_POST = do_DELETE = forward

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}{PREFIX}/"
    server.shutdown()


def test_the_studio_works_under_the_path_of_a_proxy(open_studio, proxy, image_file):
    studio = open_studio(address=proxy)
    studio.make_clip()
    studio.check_plays()
    studio.select_tab("image_to_video")
    studio.upload("image", image_file)
    assert studio.page.url.startswith(proxy)
