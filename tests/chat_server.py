"""A local HTTP server for chat completions that can inject faults.

An answer depends only on the request, like that of a seeded model. Faults depend on the request and
on its number of attempts, so that every request is eventually answered.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "500", "slow", "torn body", "broken connection", "no json", "empty")


def digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def some_answer(request: dict) -> dict:
    """A choice of a completion, determined by prompt, seed and temperature."""
    asked = json.dumps([request["messages"], request.get("seed"), request.get("temperature")])
    number = digest(asked)
    words = ["list", "map", "tree", "node", "key", "loop", "file", "line", "sort", "join"]
    text = " ".join(words[(number >> shift) % 10] for shift in range(0, 30, 3))
    finish = "length" if number % 11 == 0 else "stop"
    return {"message": {"role": "assistant", "content": text}, "finish_reason": finish, "index": 0}


class ChatServer:
    """`with ChatServer() as server:` serves at `server.url` and records `server.requests`.

    `answer` maps a request to the choice of a completion. `faulty` is the share of requests whose
    first attempt fails with one of `faults`. While `answers_up_to` is a number, later requests
    wait, so that a client cannot finish before a test kills it.
    """

    def __init__(
        self,
        answer: Callable[[dict], dict] = some_answer,
        faulty: float = 0.0,
        faults: tuple[str, ...] = FAULTS,
        slow: float = 3.0,  # seconds; must exceed the client's timeout
        pause: float = 0.0,
        key: str | None = None,
    ) -> None:
        self.requests: list[dict] = []
        self.tries: Counter[str] = Counter()
        self.met: Counter[str] = Counter()
        self.answers_up_to: int | None = None
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                request = json.loads(body)
                with lock:
                    outer.requests.append(request)
                    place = len(outer.requests)
                    outer.tries[body] += 1
                    first = outer.tries[body] == 1
                if key and self.headers["Authorization"] != f"Bearer {key}":
                    message = f"Incorrect API key provided: {self.headers['Authorization']}"
                    return self.reply(401, json.dumps({"error": {"message": message}}))
                number = digest(body)
                fault = None
                if first and number % 1000 < 1000 * faulty:
                    fault = faults[number // 1000 % len(faults)]
                    outer.met[fault] += 1
                time.sleep(slow if fault == "slow" else pause)
                while (last := outer.answers_up_to) is not None and place > last:
                    time.sleep(0.01)
                whole = {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": f"{request['model']}-2026",
                    "choices": [answer(request)],
                    "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
                }
                text = json.dumps(whole)
                if "refused" in whole["choices"][0]:
                    refusal = {"error": {"message": whole["choices"][0]["refused"]}}
                    return self.reply(400, json.dumps(refusal))
                match fault:
                    case "429" | "500":
                        self.reply(int(fault), '{"error": {"message": "later"}}')
                    case "torn body":
                        self.reply(200, text[: len(text) // 2])
                    case "no json":
                        self.reply(200, "<html>a proxy was here</html>", "text/html")
                    case "empty":
                        self.reply(200, '{"choices": []}')
                    case "broken connection":
                        self.reply(200, text[: len(text) // 2], length=len(text))
                        self.close_connection = True
                    case _:
                        self.reply(200, text)

            def reply(self, status: int, text: str, kind="application/json", length=None) -> None:
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(length or len(text)))
                    self.send_header("retry-after-ms", "30")
                    self.end_headers()
                    self.wfile.write(text.encode())
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client was killed or has given up

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
