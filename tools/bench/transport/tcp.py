"""Raw TCP: blocking sockets, whole models in memory, numpy's mean. What the machine itself can do."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection

import numpy as np

from tools.bench.transport.meter import Mark, Usage
from tools.bench.transport.workload import Array, Noise, flat, initial_model


def serve(pipe: Connection, width: int, workers: int, rounds: int) -> None:
    """Process target of the server."""
    model = flat(initial_model(width))
    received = [np.empty_like(model) for _ in range(workers)]
    marks = []
    with socket.create_server(("127.0.0.1", 0), backlog=workers) as listener:
        pipe.send(listener.getsockname()[1])
        links = [listener.accept()[0] for _ in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        marks.append(Mark.now())
        for _ in range(rounds):
            list(pool.map(partial(_exchange, model), links, received))
            model = np.mean(received, axis=0)
            marks.append(Mark.now())
    for link in links:
        link.close()
    pipe.send(Usage.of(marks))


def _exchange(model: Array, link: socket.socket, received: Array) -> None:
    link.sendall(model.data.cast("B"))
    _receive(link, received)


def _receive(link: socket.socket, into: Array) -> bool:
    view = into.data.cast("B")
    while view:
        size = link.recv_into(view)
        if not size:
            return False
        view = view[size:]
    return True


def work(pipe: Connection, port: int, number: int, width: int) -> None:
    """Process target of a worker."""
    noise, model = Noise(number), flat(initial_model(width))
    marks = [Mark.now()]
    with socket.create_connection(("127.0.0.1", port)) as link:
        while _receive(link, model):
            noise.shift()
            link.sendall(noise.add_to(model).data.cast("B"))
            marks.append(Mark.now())
    pipe.send(Usage.of(marks))
