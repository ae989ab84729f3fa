"""Clients that send requests without a pause, so that a lost request shows."""

import concurrent.futures
import os
import ssl
import threading
import time

import httpx


class Stream:
    """``clients`` request completions from ``endpoint`` until stopped; ``faults`` has failures."""

    def __init__(
        self, endpoint: str, model: str, token: str = "", *, prompt: str = "Hi", clients: int = 3
    ) -> None:
        self.texts: list[str] = []
        self.faults: list[str] = []
        self.answered = 0
        authority = os.environ.get("NUDGE_SERVING_CA")
        self._verify = ssl.create_default_context(cafile=authority) if authority else True
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0.0}
        self._stop = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(clients)
        self._ended = [self._pool.submit(self._ask, endpoint) for _ in range(clients)]

    def _ask(self, endpoint: str) -> None:
        with httpx.Client(timeout=60.0, headers=self._headers, verify=self._verify) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(f"{endpoint}/v1/completions", json=self._body)
                    answer.raise_for_status()
                    self.texts.append(answer.json()["choices"][0]["text"])
                    self.answered += 1
                except (httpx.HTTPError, KeyError) as error:
                    self.faults.append(repr(error))
                    time.sleep(0.1)

    def seen(self) -> set[str]:
        """The distinct answers since the last call."""
        texts, self.texts = self.texts, []
        return set(texts)

    def next(self, count: int) -> set[str]:
        """The distinct answers among the next ``count``."""
        while len(self.texts) < count:
            for ended in self._ended:
                assert not ended.done(), ended.exception()
            time.sleep(0.05)
        return self.seen()

    def stop(self) -> None:
        self._stop.set()
        concurrent.futures.wait(self._ended)
        self._pool.shutdown()
        for ended in self._ended:
            ended.result()
