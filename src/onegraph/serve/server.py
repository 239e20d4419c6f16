"""The server's life: a socket first, then the engine, then requests, and at a signal a drain.

Takes: the engine's and the server's settings. Gives: an exit code, once it has been told to stop. The socket is
there before the model is loaded, so that an address that can't be had is told at once; until the engine is ready
every request but a probe's is answered 503. uvicorn does the HTTP; signals are ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import uvicorn

from onegraph.config.engine import EngineConfig
from onegraph.errors import ServeError
from onegraph.models import BUILTIN_MODEL
from onegraph.serve.api_errors import Quiet
from onegraph.serve.app import make_app
from onegraph.serve.engine_client import EngineClient
from onegraph.serve.settings import ServeSettings

SIGNALS = (signal.SIGINT, signal.SIGTERM)
BACKLOG = 2048
GRACE_S = 2.0
"""What connections are given to take in their last bytes after the drain's time is over."""

Event = Literal["listening", "ready", "draining"]


class Server:
    """One engine behind one socket. `told` hears of events, with facts.

    Raises ServeError when the address can't be had.
    """

    def __init__(
        self,
        config: EngineConfig,
        settings: ServeSettings,
        *,
        told: Callable[[Event, dict[str, Any]], None] = lambda event, facts: None,
    ) -> None:
        self._settings = settings
        self._told = told
        self._socket = _listening_socket(settings.host, settings.port)
        root = str(config.model or Path(BUILTIN_MODEL).name)
        names = settings.served_model_name or (root,)
        self.client = EngineClient(config, settings)
        self.app = make_app(self.client, settings, names=names, root=root)
        self.names = names
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._stop_at_once = asyncio.Event()

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def serve(self) -> int:
        """Serves until a signal or `stop`; 0 when all was answered, 1 when the engine failed or it was ended at once.

        Signals are taken in the main thread. Raises what starting the engine raises.
        """
        return asyncio.run(self._serve())

    def stop(self) -> None:
        """Has it drain and end, from any thread; a second call ends it at once."""
        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(self._stop_asked)

    def _stop_asked(self) -> None:
        (self._stop_at_once if self._stop.is_set() else self._stop).set()

    async def _serve(self) -> int:
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._loop.add_signal_handler(number, self._stop_asked)
        http = _Uvicorn(
            uvicorn.Config(
                Quiet(self.app),
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                http="h11",
                ws="none",
                loop="asyncio",
                backlog=BACKLOG,
            )
        )
        self._told("listening", {"url": self.url, "models": list(self.names)})
        self.client.start()
        serving = asyncio.create_task(http.serve(sockets=[self._socket]))
        ready = asyncio.create_task(self._ready())
        stop = asyncio.create_task(self._stop.wait())
        stop_at_once = asyncio.create_task(self._stop_at_once.wait())
        try:
            await asyncio.wait({ready, stop}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
                await self._stop.wait()
            draining = asyncio.create_task(self._drain(http, serving))
            await asyncio.wait({draining, stop_at_once}, return_when=asyncio.FIRST_COMPLETED)
            failed = self.client.state == "failed"
            return 1 if failed or not draining.done() else 0
        finally:
            http.should_exit = True
            for task in (ready, stop, stop_at_once):
                task.cancel()
            await self.client.stop()  # answers what is still in flight with an error
            await asyncio.wait({serving}, timeout=GRACE_S)
            http.force_exit = True
            await asyncio.wait({serving}, timeout=GRACE_S)

    async def _ready(self) -> None:
        started = await self.client.ready()
        self._told("ready", {"url": self.url, "models": list(self.names), "started": started})

    async def _drain(self, http: uvicorn.Server, serving: asyncio.Task[None]) -> None:
        """Takes no new requests, and waits for those in flight; after the time for that they end with an error.

        Time at a breakpoint doesn't count.
        """
        self._told("draining", {"in_flight": self.client.num_requests, "timeout_s": self._settings.drain_timeout_s})
        self.client.thread.drain()
        http.should_exit = True
        done, _ = await asyncio.wait({serving}, timeout=self._settings.drain_timeout_s)
        while not done and self.client.thread.is_in_debugger:
            done, _ = await asyncio.wait({serving}, timeout=self._settings.drain_timeout_s)
        if not done:
            await self.client.stop()
            await asyncio.wait({serving}, timeout=GRACE_S)


class _Uvicorn(uvicorn.Server):
    """uvicorn without its handlers of signals, which would end the process by the signal after a drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listening_socket(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise ServeError(
            f"can't listen on {host}:{port}: {error.strerror or error}",
            where="--host and --port",
            hint="stop what uses the address, or give another; --port 0 takes a free one",
        ) from error
