"""The operator's API: calls to a running aggregator. The command line stands on it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, cast

from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedgrpc.errors import LinkError
from fedgrpc.model_client import ModelClient
from fedgrpc.rpc.address import dialled
from fedgrpc.rpc.channel import Tls, open_channel
from fedgrpc.rpc.diagnosis import explain
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import identity_pb2
from fedgrpc.v1.aggregator_pb2_grpc import AggregatorStub
from fedgrpc.v1.identity_pb2_grpc import IdentityStub
from fedgrpc.v1.privacy_pb2 import PrivacyLedger
from fedgrpc.v1.round_pb2 import Round

_TIMEOUT_S = 10.0
# The aggregator waits for a round that is committing, and copies the model.
_COMMIT_TIMEOUT_S = 600.0
_PAGE = 1000

# Settings of a run by their keys in a settings file; several values where a setting may be given more than once.
Settings = Mapping[str, str | Sequence[str]]


class Calls:
    """Calls to one aggregator. Every method raises `LinkError` when it cannot be reached.

    Calls about a run are about `run_name`; "": the one that the aggregator was started with, else its only one.
    They raise `NotFound` where there is no such run, and `UsageError` where none is named and there are several.
    """

    def __init__(self, channel: Any, address: str, tls: Tls | None = None, run_name: str = "") -> None:
        stub: Any = AggregatorStub
        self._stub = stub(channel)
        self._health: Any = health_pb2_grpc.HealthStub(channel)
        self.address = address
        self.run_name = run_name
        self._channel = channel
        self._tls = tls
        identity: Any = IdentityStub
        self.identities = IdentityClient(identity(channel), self._reaching)
        self.models = ModelClient(channel, self._reaching)

    def of(self, run_name: str) -> Calls:
        """Return a client of another run of the same aggregator, over the same connection."""
        return Calls(self._channel, self.address, self._tls, run_name)

    async def runs(self) -> list[pb.RunSummary]:
        """Return every run of the aggregator, oldest first."""
        runs: list[pb.RunSummary] = []
        request = pb.ListRunsRequest()
        while True:
            with self._reaching():
                answer = await self._stub.ListRuns(request, timeout=_TIMEOUT_S)
            runs += answer.runs
            request.page_token = answer.next_page_token
            if not request.page_token:
                return runs

    async def submit(self, name: str, settings: Settings) -> pb.Run:
        """Start a run with these settings, by their keys in a settings file. Raises `UsageError`, `Exhausted`."""
        request = pb.SubmitRunRequest(name=name, settings=_run_settings(settings))
        with self._reaching():
            answer: pb.SubmitRunResponse = await self._stub.SubmitRun(request, timeout=_COMMIT_TIMEOUT_S)
        return answer.run

    async def change(self, settings: Settings) -> Mapping[str, str]:
        """Change settings of the run from its next round on. Returns `OLD -> NEW` by setting.

        Raises `UsageError` for a setting that may not change, `IllegalTransition` once the run has ended.
        """
        request = pb.SetRunRequest(run=self.run_name, settings=_run_settings(settings))
        with self._reaching():
            answer: pb.SetRunResponse = await self._stub.SetRun(request, timeout=_COMMIT_TIMEOUT_S)
        return dict(answer.changed)

    async def clone(self, name: str, settings: Settings, version: int = 0) -> pb.Run:
        """Start a run called `name` with the settings of this one, and from one of its versions; 0: from none."""
        request = pb.CloneRunRequest(
            run=self.run_name, name=name, settings=_run_settings(settings), version=version
        )
        with self._reaching():
            answer: pb.CloneRunResponse = await self._stub.CloneRun(request, timeout=_COMMIT_TIMEOUT_S)
        return answer.run

    async def remove(self) -> None:
        """Remove the run, which has ended, with its models. Raises `NotFound`, `IllegalTransition`."""
        with self._reaching():
            await self._stub.RemoveRun(pb.RemoveRunRequest(run=self.run_name), timeout=_COMMIT_TIMEOUT_S)

    async def run(self) -> pb.Run:
        """Return the run."""
        request = pb.GetRunRequest(run=self.run_name)
        with self._reaching():
            answer: pb.GetRunResponse = await self._stub.GetRun(request, timeout=_TIMEOUT_S)
        return answer.run

    async def privacy(self) -> PrivacyLedger:
        """Return the run's releases with noise. Raises `NotFound` where it releases its versions without."""
        request = pb.GetPrivacyRequest(run=self.run_name)
        with self._reaching():
            answer: pb.GetPrivacyResponse = await self._stub.GetPrivacy(request, timeout=_TIMEOUT_S)
        return answer.ledger

    async def healthy(self) -> bool:
        """Return whether the aggregator serves: not while its data folder fails, nor while it ends."""
        with self._reaching():
            answer = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def workers(self) -> list[pb.WorkerRecord]:
        """Return every worker that has registered, pi-2 before pi-10."""
        workers: list[pb.WorkerRecord] = []
        request = pb.ListWorkersRequest(run=self.run_name)
        while True:
            with self._reaching():
                answer = await self._stub.ListWorkers(request, timeout=_TIMEOUT_S)
            workers += answer.workers
            request.page_token = answer.next_page_token
            if not request.page_token:
                return sorted(workers, key=lambda record: natural_order(record.worker))

    async def latest_rounds(self, count: int, whole: bool = True) -> list[Round]:
        """Return the last `count` rounds, oldest first; unless `whole`, without tasks that a page leaves out."""
        rounds = []
        async for record in self.rounds_back(min(count, _PAGE), whole):
            rounds.append(record)
            if len(rounds) == count:
                break
        return rounds[::-1]

    async def all_rounds(self) -> list[Round]:
        """Return every round, oldest first."""
        return [record async for record in self.rounds_back()][::-1]

    async def rounds_back(self, page_size: int = _PAGE, whole: bool = True) -> AsyncIterator[Round]:
        """Yield every round, newest first, each with all of its tasks if `whole`."""
        request = pb.ListRoundsRequest(page_size=page_size, run=self.run_name)
        while True:
            with self._reaching():
                answer = await self._stub.ListRounds(request, timeout=_TIMEOUT_S)
            for record in answer.rounds:
                yield await self._whole(record) if whole and record.tasks_left_out else record
            request.page_token = answer.next_page_token
            if not request.page_token:
                return

    async def _whole(self, record: Round) -> Round:
        """Return the round with the tasks that its record has left out."""
        request = pb.GetRoundRequest(number=record.number, run=self.run_name)
        whole: Round | None = None
        while True:
            with self._reaching():
                answer = await self._stub.GetRound(request, timeout=_TIMEOUT_S)
            if whole is None:
                whole = answer.round
            else:
                whole.tasks.extend(answer.round.tasks)
            request.page_token = answer.next_page_token
            if not request.page_token:
                whole.ClearField("tasks_left_out")
                whole.ClearField("accepted_left_out")
                return whole

    async def round(self, number: int) -> Round:
        """Return a round with all of its tasks. Raises `NotFound`."""
        return await self._whole(Round(number=number))

    async def watch(self, max_rate_hz: float = 0.0) -> AsyncIterator[pb.WatchRoundsResponse]:
        """Yield the run and its current round each time they change, until the run ends."""
        request = pb.WatchRoundsRequest(max_rate_hz=max_rate_hz, run=self.run_name)
        with self._reaching():
            async for news in self._stub.WatchRounds(request):
                yield news

    async def pause(self) -> pb.Run:
        """Open no further round. Raises `IllegalTransition` once the run has ended."""
        request = pb.PauseRunRequest(run=self.run_name)
        with self._reaching():
            answer: pb.PauseRunResponse = await self._stub.PauseRun(request, timeout=_TIMEOUT_S)
        return answer.run

    async def resume(self) -> pb.Run:
        """Open rounds again. Raises `IllegalTransition` once the run has ended."""
        request = pb.ResumeRunRequest(run=self.run_name)
        with self._reaching():
            answer: pb.ResumeRunResponse = await self._stub.ResumeRun(request, timeout=_TIMEOUT_S)
        return answer.run

    async def roll_back(self, version: int, reason: str) -> pb.Run:
        """Continue from a kept version; 0: from a new first model. Raises `NotFound`, `IllegalTransition`."""
        request = pb.RollBackRunRequest(version=version, reason=reason, run=self.run_name)
        with self._reaching():
            answer: pb.RollBackRunResponse = await self._stub.RollBackRun(request, timeout=_COMMIT_TIMEOUT_S)
        return answer.run

    async def stop(self, reason: str) -> pb.Run:
        """End the run, and record the reason."""
        request = pb.StopRunRequest(reason=reason, run=self.run_name)
        with self._reaching():
            answer: pb.StopRunResponse = await self._stub.StopRun(request, timeout=_TIMEOUT_S)
        return answer.run

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            with domain_errors():
                yield
        except LinkError as error:
            why = explain(dialled(self.address), self._tls) or "is it running?"
            raise LinkError(f"cannot reach an aggregator at {self.address}: {why} ({error})") from error


class IdentityClient:
    """Calls about members and join tokens. Raises as `Calls`, and what identity.proto says of each call."""

    def __init__(self, stub: Any, reaching: Callable[[], AbstractContextManager[None]]) -> None:
        self._stub = stub
        self._reaching = reaching

    async def _call(self, name: str, request: Any) -> Any:
        with self._reaching():
            return await getattr(self._stub, name)(request, timeout=_TIMEOUT_S)

    async def create_token(self, request: identity_pb2.CreateTokenRequest) -> identity_pb2.CreateTokenResponse:
        """Make a join token; the answer has its text, which nobody can show again."""
        return cast(identity_pb2.CreateTokenResponse, await self._call("CreateToken", request))

    async def tokens(self) -> list[identity_pb2.Token]:
        """Return every join token."""
        return list((await self._call("ListTokens", identity_pb2.ListTokensRequest())).tokens)

    async def delete_token(self, token_id: str) -> None:
        """Let nobody join with a token any more."""
        await self._call("DeleteToken", identity_pb2.DeleteTokenRequest(id=token_id))

    async def audit_lines(self, offset: int = 0) -> AsyncIterator[bytes]:
        """Yield lines of the audit log from an offset on, as they are; `audit.check_line` checks their seals."""
        request = identity_pb2.ReadAuditRequest(offset=offset)
        while answer := await self._call("ReadAudit", request):
            if not answer.lines:
                return
            for line in answer.lines.splitlines(keepends=True):
                yield line
            request.offset = answer.next_offset

    async def members(self) -> list[identity_pb2.Member]:
        """Return every device and operator, pi-2 before pi-10."""
        members: list[identity_pb2.Member] = []
        request = identity_pb2.ListMembersRequest()
        while True:
            answer = await self._call("ListMembers", request)
            members += answer.members
            request.page_token = answer.next_page_token
            if not request.page_token:
                return sorted(members, key=lambda member: natural_order(member.name))

    async def approve(self, name: str) -> identity_pb2.Member:
        """Let a member call that waits for it."""
        answer = await self._call("ApproveMember", identity_pb2.ApproveMemberRequest(name=name))
        return cast(identity_pb2.Member, answer.member)

    async def revoke(self, name: str, why: str, drop_updates: bool = False) -> identity_pb2.Member:
        """Let a member call no more, and end its open calls."""
        request = identity_pb2.RevokeMemberRequest(name=name, why=why, drop_updates=drop_updates)
        return cast(identity_pb2.Member, (await self._call("RevokeMember", request)).member)

    async def rename(self, name: str, new_name: str) -> identity_pb2.Member:
        """Give a member another name."""
        request = identity_pb2.RenameMemberRequest(name=name, new_name=new_name)
        return cast(identity_pb2.Member, (await self._call("RenameMember", request)).member)

    async def forget(self, name: str) -> None:
        """Remove a member, and free its name."""
        await self._call("ForgetMember", identity_pb2.ForgetMemberRequest(name=name))

    async def create_operator(
        self, name: str, role: identity_pb2.Role, signing_request: bytes
    ) -> identity_pb2.Credentials:
        """Make an operator of whoever has the key of a signing request."""
        request = identity_pb2.CreateOperatorRequest(name=name, role=role, signing_request=signing_request)
        return cast(identity_pb2.Credentials, (await self._call("CreateOperator", request)).credentials)

    async def rotate_authority(self) -> identity_pb2.Authority:
        """Make a new authority, trusted beside the one before."""
        answer = await self._call("RotateAuthority", identity_pb2.RotateAuthorityRequest())
        return cast(identity_pb2.Authority, answer.authority)

    async def authorities(self) -> list[identity_pb2.Authority]:
        """Return the authorities that are trusted, the one that signs first."""
        return list((await self._call("ListAuthorities", identity_pb2.ListAuthoritiesRequest())).authorities)

    async def retire_authority(self, name: str, force: bool = False) -> None:
        """Trust an authority no more; with `force` also while members need it."""
        await self._call("RetireAuthority", identity_pb2.RetireAuthorityRequest(name=name, force=force))

    async def renew(self) -> identity_pb2.Credentials:
        """Return a new certificate for the caller."""
        return cast(identity_pb2.Credentials, (await self._call("Renew", identity_pb2.RenewRequest())).credentials)


@asynccontextmanager
async def connect(address: str, tls: Tls | None = None, run_name: str = "") -> AsyncIterator[Calls]:
    """Dial an aggregator for the length of the block."""
    async with open_channel(address, tls) as channel:
        yield Calls(channel, address, tls, run_name)


def _run_settings(settings: Settings) -> list[pb.RunSetting]:
    return [
        pb.RunSetting(name=name, values=[value] if isinstance(value, str) else value)
        for name, value in settings.items()
    ]


def natural_order(name: str) -> tuple[object, ...]:
    """A sorting key by which pi-2 comes before pi-10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name))
