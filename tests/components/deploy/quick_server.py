"""``python quick_server.py VERSION PORT``: answers as a served model does, naming its version.

A version named ``slow...`` takes longer; one named ``flaky...`` fails after its first answers.
"""

import itertools
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VERSION, PORT = sys.argv[1], int(sys.argv[2])
ANSWERED = itertools.count(1)


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        time.sleep(0.3 if VERSION.startswith("slow") else 0)
        failed = VERSION.startswith("flaky") and next(ANSWERED) > 2
        body = b'{"choices": [{"text": " %s"}]}' % VERSION.encode()
        self._answer(body, 500 if failed else 200)

    def _answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


ThreadingHTTPServer(("127.0.0.1", PORT), Answer).serve_forever()
