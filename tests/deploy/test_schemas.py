"""Everything that is sent to a cluster is what the last versions of Kubernetes take, field by field."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.deploy.manifests import K8S, OVERLAYS, WITH_COMPONENTS, Object, render, render_with_components

# Each is there twice: strict and not.
VERSIONS = list(dict.fromkeys(kubernetes_validate.utils.all_versions()))[-4:]
# Kinds that a cluster learns from others, whose schemas Kubernetes does not have.
FOREIGN = {
    ("monitoring.coreos.com/v1", "PrometheusRule"),
    ("monitoring.coreos.com/v1", "ServiceMonitor"),
    ("traefik.io/v1alpha1", "IngressRouteTCP"),
    ("helm.cattle.io/v1", "HelmChartConfig"),
}


def check(objects: Iterable[Object], version: str) -> int:
    """Validate all but foreign kinds; how many."""
    own = [item for item in objects if (item["apiVersion"], item["kind"]) not in FOREIGN]
    for item in own:
        kubernetes_validate.validate(item, version, strict=True)
    return len(own)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_is_valid(overlay: str, version: str) -> None:
    assert check(render(K8S / "overlays" / overlay).objects, version) >= 9


@pytest.mark.parametrize("version", VERSIONS)
def test_the_base_is_valid_by_itself(version: str) -> None:
    assert check(render(K8S / "base").objects, version) == 7


@pytest.mark.parametrize("overlay", WITH_COMPONENTS)
def test_an_overlay_with_every_component_is_valid(overlay: str, tmp_path: Path) -> None:
    for version in VERSIONS:
        assert check(render_with_components(tmp_path, overlay).objects, version) >= 9


@pytest.mark.parametrize("path", sorted((K8S / "outside").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_ways_in_from_outside_are_valid(path: Path) -> None:
    for version in VERSIONS:
        check(yaml.safe_load_all(path.read_text()), version)


def test_a_field_that_does_not_exist_is_noticed() -> None:
    (service,) = render(K8S / "base").of("Service")
    wrong = {**service, "spec": {**service["spec"], "selectors": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        check([wrong], VERSIONS[-1])
