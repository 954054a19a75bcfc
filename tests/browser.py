"""A headless Chromium, spoken to by its DevTools protocol."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tornado.websocket import websocket_connect

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_WAIT_S = 60.0


@dataclass
class Page:
    """What a page did while it was open.

    Attributes
    ----------
    values : list
        What the expressions gave.
    complaints : list of str
        Errors and warnings of its console, exceptions, and what its policy refused.
    requests : list of str
        URLs that it asked for, but for ``data:``.
    """

    values: list[Any] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def visit(path: Path, *expressions: str, width: int = 1280, dark: bool = False) -> Page:
    """Open a file, wait until it is drawn, and evaluate JavaScript expressions in it; skip without a Chromium."""
    program = next((p for p in map(shutil.which, _NAMES) if p), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, _started(program, profile) as port:
        return asyncio.run(_visit(port, path, expressions, width, dark))


@contextlib.contextmanager
def _started(program: str, profile: str) -> Iterator[int]:
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            told = Path(profile) / "DevToolsActivePort"
            deadline = time.monotonic() + _WAIT_S
            while not (told.exists() and told.read_text().count("\n")):
                assert process.poll() is None, "Chromium ended"
                assert time.monotonic() < deadline, "Chromium did not start"
                time.sleep(0.05)
            yield int(told.read_text().split()[0])
        finally:
            process.terminate()
            process.wait(30)


async def _visit(port: int, path: Path, expressions: tuple[str, ...], width: int, dark: bool) -> Page:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
        target = next(t for t in json.load(answer) if t["type"] == "page")
    socket = await websocket_connect(target["webSocketDebuggerUrl"], max_message_size=2**28)
    page, number = Page(), 0

    async def call(method: str, **params: Any) -> Any:
        nonlocal number
        number += 1
        await socket.write_message(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(await asyncio.wait_for(_read(socket), _WAIT_S))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            _note(message, page)

    for domain in ("Page", "Runtime", "Log", "Network"):
        await call(f"{domain}.enable")
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    await call("Emulation.setEmulatedMedia", features=[scheme])
    await call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    await call("Page.navigate", url=path.as_uri())
    await _value(
        call, "new Promise(d => document.readyState == 'complete' ? d() : addEventListener('load', () => d()))"
    )
    await _value(call, "new Promise(done => setTimeout(done, 1500))")
    page.values = [await _value(call, expression) for expression in expressions]
    socket.close()
    return page


async def _read(socket: Any) -> str:
    message = await socket.read_message()
    assert message is not None, "Chromium ended"
    return str(message)


async def _value(call: Any, expression: str) -> Any:
    answer = await call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
    assert "exceptionDetails" not in answer, answer
    return answer["result"].get("value")


def _note(message: dict[str, Any], page: Page) -> None:
    method, params = message.get("method"), message.get("params", {})
    if method == "Runtime.exceptionThrown":
        page.complaints.append(str(params["exceptionDetails"]))
    elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
        page.complaints.append(" ".join(str(a.get("value", a)) for a in params["args"]))
    elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
        page.complaints.append(params["entry"]["text"])
    elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
        page.requests.append(params["request"]["url"])
