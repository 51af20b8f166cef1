"""Asking whether the Hugging Face hub answers takes bounded time."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from circuit_breaking.runs import hub


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.hub_answers.cache_clear()
    yield
    hub.hub_answers.cache_clear()


def test_asking_the_hub_takes_bounded_time():
    with socket.socket() as silent:  # accepts connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.perf_counter()
        assert not hub.answers(f"http://127.0.0.1:{silent.getsockname()[1]}", wait=0.3)
        assert time.perf_counter() - begun < 2
    assert not hub.answers("http://no-such-host.invalid", wait=0.3)


@pytest.mark.parametrize("status", [200, 404])
def test_a_server_that_answers(status, monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert hub.answers(url, wait=10)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        assert hub.hub_answers()
        hub.hub_answers.cache_clear()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert not hub.hub_answers()
        server.shutdown()
