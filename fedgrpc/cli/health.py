"""`fedgrpc health`: the state of a service by grpc.health.v1, for container health checks and scripts.

It starts every few seconds on small devices, so it imports no more than it needs.

exit code 0     SERVING
          1     anything else, or no answer
"""

from __future__ import annotations

from typing import Any

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedgrpc.cli.connection import client_settings, client_tls
from fedgrpc.cli.options import Declare, SettingsCommand
from fedgrpc.cli.values import DURATION
from fedgrpc.rpc.address import dialled
from fedgrpc.rpc.channel import Tls, client_options
from fedgrpc.rpc.diagnosis import explain

_where = Declare("Where")

_UNREACHED = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
SETTINGS = [
    _where("--address", "Aggregator, or a worker's own service.", default="127.0.0.1:50051", metavar="HOST:PORT"),
    _where(
        "--service",
        "One service of the process, as fedgrpc.v1.Aggregator; without: all.",
        default="",
        metavar="NAME",
    ),
    _where("--timeout", "Longest wait for the answer.", name="timeout_s", type=DURATION, default=3.0),
    *client_settings(),
]


def _run(**values: Any) -> int:
    tls = client_tls(values)
    answer = health_of(values["address"], values["service"], values["timeout_s"], tls)
    click.echo(answer)
    if answer in _UNREACHED and (why := explain(dialled(values["address"]), tls)):
        click.echo(why, err=True)
    return 0 if answer == "SERVING" else 1


def health_of(address: str, service: str, timeout_s: float, tls: Tls | None) -> str:
    """Return SERVING, NOT_SERVING, or the status code of the failed call, such as UNAVAILABLE.

    Raises:
        UsageError: the address or a TLS file is unusable.
    """
    where = dialled(address)
    options = client_options(where, tls)
    if tls is None:
        channel = grpc.insecure_channel(where.target, options=options)
    else:
        channel = grpc.secure_channel(where.target, tls.client_credentials(), options=options)
    with channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


COMMAND = SettingsCommand("health", _run, SETTINGS, "Check the health of a service; exit code 0: it is serving.")
