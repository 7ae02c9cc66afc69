"""The page outside of this machine: browsers show certificates, and the table of roles decides."""

import socket
import ssl

import httpx
import pytest

from fedgrpc.rpc.channel import Tls
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.web.page import PageSettings
from fedgrpc.web.tls import AuthorityPageTls, FileTls, context_of
from tests.support.certificates import make_authority, make_certificate
from tests.support.joining import OUTSIDE, joined, operator, revoke
from tests.support.pages import served_page
from tests.support.running_federation import running_aggregator

# Every address of this machine, as an aggregator outside of it has.
EVERYWHERE = "0.0.0.0:0"


def page_tls(running):
    trust = running.aggregator.trust
    return AuthorityPageTls(trust.identities, ("localhost", "127.0.0.1"), trust.folder)


def browser(url, tls, shows=True):
    context = ssl.create_default_context(cafile=str(tls.ca))
    if shows:
        context.load_cert_chain(tls.certificate, tls.key)
    port = httpx.URL(url).port
    return httpx.AsyncClient(base_url=f"https://localhost:{port}", verify=context, timeout=60)


def outside(running):
    return served_page(running, page_tls(running), EVERYWHERE, ("localhost",))


async def test_a_viewer_looks_and_changes_nothing(tmp_path):
    async with running_aggregator(tmp_path, rounds=2, **OUTSIDE) as running, outside(running) as url:
        viewer = await operator(running, tmp_path, "vera", "viewer")
        async with browser(url, viewer) as client:
            shown = await client.get("/runs/default")
            assert shown.status_code == 200
            assert "vera, viewer" in shown.text
            assert "Pause" not in shown.text
            ours = {"origin": str(client.base_url).rstrip("/")}
            assert (await client.post("/runs/default/pause", headers=ours)).status_code == 403
            assert (await client.get("/sign-in")).status_code == 404
        assert (await running.run()).phase == pb.RUN_PHASE_RUNNING


async def test_an_operator_steers_and_the_audit_log_has_their_name_and_address(tmp_path):
    async with running_aggregator(tmp_path, rounds=2, **OUTSIDE) as running, outside(running) as url:
        await joined(running, tmp_path, "pi-1")
        async with browser(url, await operator(running, tmp_path, "olga", "operator")) as client:
            ours = {"origin": str(client.base_url).rstrip("/")}
            assert "Pause" in (await client.get("/runs/default")).text
            assert (await client.post("/runs/default/pause", headers=ours)).status_code == 303
            assert (await running.run()).phase == pb.RUN_PHASE_PAUSED
            assert (await client.post("/fleet/pi-1/revoke", headers=ours)).status_code == 400
            answer = await client.post("/fleet/pi-1/revoke", data={"why": "stolen"}, headers=ours)
            assert answer.status_code == 303
            assert "revoked" in (await client.get("/fleet/pi-1")).text
            log = (await client.get("/audit?text=olga")).text
            assert "Aggregator/PauseRun" in log
            assert "Identity/RevokeMember" in log
            assert "127.0.0.1" in log
            assert "through the page" in log


@pytest.mark.parametrize("role", ["trainer", "nobody"])
async def test_a_device_and_who_shows_no_certificate_see_nothing(tmp_path, role):
    async with running_aggregator(tmp_path, **OUTSIDE) as running, outside(running) as url:
        device = await joined(running, tmp_path, "pi-1")
        async with browser(url, device, shows=role == "trainer") as client:
            for path in ("/runs", "/runs/default", "/runs/default/live", "/runs/default/series.json", "/audit"):
                answer = await client.get(path)
                assert answer.status_code == 403, path
                assert "serving" not in answer.text


async def test_a_revoked_operator_sees_nothing_from_the_next_request_on(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running, outside(running) as url:
        olga = await operator(running, tmp_path, "olga", "operator")
        async with browser(url, olga) as client:
            assert (await client.get("/fleet")).status_code == 200
            async with client.stream("GET", "/runs/default/live") as stream:
                lines = stream.aiter_lines()
                assert (await anext(lines)).startswith("data: ")
                await revoke(running, "olga", why="left")
                # The stream ends, and the browser's next try has the reason.
                assert not [line async for line in lines if line.startswith("data: ")]
            refused = await client.get("/fleet")
            assert refused.status_code == 403
            assert "left" in refused.text


async def test_a_certificate_of_another_authority_ends_in_the_handshake(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    async with running_aggregator(tmp_path / "one", **OUTSIDE) as running, outside(running) as url:
        ours = await operator(running, tmp_path / "one", "olga", "operator")
        async with running_aggregator(tmp_path / "two", **OUTSIDE) as another:
            theirs = await operator(another, tmp_path / "two", "mallory", "admin")
        context = ssl.create_default_context(cafile=str(ours.ca))
        context.load_cert_chain(theirs.certificate, theirs.key)
        port = httpx.URL(url).port
        async with httpx.AsyncClient(base_url=f"https://localhost:{port}", verify=context) as client:
            with pytest.raises(httpx.TransportError):
                await client.get("/runs")


def test_a_page_on_every_address_has_the_names_of_all_of_them():
    hosts = PageSettings("0.0.0.0:8443", ("fleet.example",)).hosts
    assert {"localhost", "127.0.0.1", socket.gethostname().lower(), "fleet.example"} <= {*hosts}
    assert "0.0.0.0" not in hosts
    assert PageSettings("fleet.example:8443").hosts == ("fleet.example", socket.gethostname().lower())


async def test_the_key_of_the_page_is_in_no_file(tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running, outside(running):
        assert not list((running.settings.data_dir / "identity").glob("page*"))


def test_certificates_of_ones_own_authority_are_read_from_files(tmp_path):
    make_authority(tmp_path)
    make_certificate(tmp_path, "page")
    tls = FileTls(Tls(*(tmp_path / name for name in ("ca.pem", "page.pem", "page.key"))))
    before = tls.revision()
    assert context_of(tls, 0.0).verify_mode is ssl.CERT_OPTIONAL
    make_certificate(tmp_path, "page")
    assert tls.revision() != before
