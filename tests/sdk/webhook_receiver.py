"""A receiver of webhooks, as a customer would write one: the `standardwebhooks` package and the standard library.

It prints one JSON object a line: its port, then every connection and every request. The query says what it answers:

    /hook?answers=500,stall,200     the n-th request gets the n-th answer, later ones the last; `stall` answers never

Requests are verified with the secrets of WEBHOOK_SECRETS, a JSON list; POST /secrets with another replaces them.
"""

import json
import os
import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

lock = threading.Lock()
secrets: list[str] = json.loads(os.environ["WEBHOOK_SECRETS"])
answered: dict[str, int] = {}


def say(**line) -> None:
    with lock:
        print(json.dumps(line), flush=True)


def verified_by(body: bytes, headers: dict[str, str]) -> list[int]:
    """Which of the secrets, by their place in the list, a request is verified with."""

    def verifies(secret: str) -> bool:
        try:
            Webhook(secret).verify(body, headers)
        except WebhookVerificationError:
            return False
        return True

    return [index for index, secret in enumerate(secrets) if verifies(secret)]


def next_answer(path: str) -> str:
    answers = parse_qs(urlsplit(path).query).get("answers", ["200"])[0].split(",")
    with lock:
        index = answered.get(path, 0)
        answered[path] = index + 1
    return answers[min(index, len(answers) - 1)]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/secrets":
            secrets[:] = json.loads(body)
            self.answer(204)
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = next_answer(self.path)
        say(path=self.path, headers=headers, body=json.loads(body), verified_by=verified_by(body, headers), answer=answer)
        if answer == "stall":
            # Until the sender has had enough.
            self.rfile.read(1)
        else:
            self.answer(int(answer))

    def do_GET(self) -> None:
        say(path=self.path, method="GET")
        self.answer(200)

    def answer(self, status: int) -> None:
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("location", "/redirected")
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_args) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def verify_request(self, _request, client_address) -> bool:
        say(connected=client_address[1])
        return True

    def handle_error(self, request, client_address) -> None:
        """A sender that hangs up, or does not trust the certificate, is no error of the receiver's."""


def main() -> None:
    server = Server(("127.0.0.1", 0), Handler)
    if len(sys.argv) == 3:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[1], sys.argv[2])
        # The handshake is the handler's thread's business: one that fails must not end the accepting.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    say(port=server.server_address[1])
    server.serve_forever()


main()
