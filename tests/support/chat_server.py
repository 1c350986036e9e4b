"""A stand-in for a server with OpenAI's interface."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StandIn:
    """A server whose answers are a function of the number of the request and its body."""

    def __init__(self):
        self.requests, self.headers, self.answer = [], [], lambda number, body: complete(f"caption {number}")
        self._lock, stand_in = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stand_in._lock:
                    number = len(stand_in.requests)
                    stand_in.requests.append((self.path, body))
                    stand_in.headers.append(self.headers)
                status, headers, content = stand_in.answer(number, body)
                if status is None:  # cut the connection in the middle
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(content)
                    self.wfile.flush()
                    self.connection.close()
                    return
                self.send_response(status)
                headers = {"Retry-After-Ms": "1", **headers} if status >= 400 else headers
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def complete(text, *, finish="stop", **message):
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage}).encode()


def fail(status, text="no", **headers):
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, text.encode()
