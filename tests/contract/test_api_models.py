"""Models over HTTP, and whether the server is alive and ready."""

from __future__ import annotations

import httpx
import pytest

from serve_app.domain.catalog import ModelState
from serve_app.domain.fleet import ProviderStatus
from tests.contract.conftest import MakePlatform
from tests.doubles import MODELS, LocalPlatform

ID = "org/name:tag"


async def test_the_list_holds_every_model_and_how_the_providers_are(api: httpx.AsyncClient) -> None:
    listed = (await api.get("/api/models")).json()
    assert (listed["models"], listed["count"]) == ([ID, "test/chat"], 2)
    assert [item["name"] for item in listed["items"]] == listed["models"]
    assert [(provider["name"], provider["status"]) for provider in listed["providers"]] == [("huggingface", "ok")]


@pytest.mark.parametrize("name", [ID, f"huggingface/{ID}", ID.replace("/", "%2F").replace(":", "%3A")])
async def test_one_model_is_found_by_each_of_its_names(api: httpx.AsyncClient, name: str) -> None:
    response = await api.get(f"/api/models/{name}")
    assert response.status_code == 200
    assert (response.json()["id"], response.json()["contextLength"]) == (ID, 64)


async def test_a_name_that_means_nothing_suggests_another(api: httpx.AsyncClient) -> None:
    response = await api.get("/api/models/org/nam:tag")
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (404, "MODEL_NOT_FOUND")
    assert error["details"]["suggestions"] == [ID]


async def test_commands_reach_the_router_with_the_whole_id(platform: LocalPlatform, api: httpx.AsyncClient) -> None:
    path = f"/api/models/{ID}"
    assert (await api.post(f"{path}/unload")).json() == {"model": ID, "state": "cold", "reason": None}
    assert (await api.get(path)).json()["state"] == "cold"
    assert (await api.get(f"{path}/plan")).json()["verdict"] == "fits"
    assert (await api.post(f"{path}/load")).json()["state"] == "ready"
    assert (await api.get("/api/models/test/chat")).json()["state"] == "ready"


async def test_pinning_is_the_default_of_pin_and_can_be_undone(platform: LocalPlatform, api: httpx.AsyncClient) -> None:
    path = f"/api/models/{ID}"
    assert (await api.post(f"{path}/pin")).status_code == 200
    assert (await api.get(path)).json()["pinned"] is True
    assert (await api.post(f"{path}/pin", json={"pinned": False})).status_code == 200
    assert (await api.get(path)).json()["pinned"] is False
    assert (await api.post(f"{path}/pin", json={"pinned": "yes"})).status_code == 422
    assert (await api.post(f"{path}/pin", json={"pined": True})).status_code == 422


@pytest.mark.parametrize(("method", "action"), [("POST", "load"), ("POST", "unload"), ("POST", "pin"), ("GET", "plan")])
async def test_a_command_for_an_unknown_model_is_not_found(api: httpx.AsyncClient, method: str, action: str) -> None:
    response = await api.request(method, f"/api/models/nobody/nothing/{action}")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "MODEL_NOT_FOUND")


async def test_a_failed_model_shows_its_reason(platform: LocalPlatform, api: httpx.AsyncClient) -> None:
    platform.router.put(ID, ModelState.FAILED)
    item = (await api.get(f"/api/models/{ID}")).json()
    assert (item["state"], item["reason"]) == ("failed", "A file is missing.")


async def test_a_provider_in_trouble_does_not_fail_the_list(platform: LocalPlatform, api: httpx.AsyncClient) -> None:
    platform.router.providers = (ProviderStatus("ollama", "ollama", "error", 0, "connection refused"),)
    listed = (await api.get("/api/models")).json()
    assert listed["count"] == 2
    assert listed["providers"][0]["error"] == "connection refused"


async def test_the_server_lives_and_is_ready(api: httpx.AsyncClient) -> None:
    assert (await api.get("/health")).json() == {"status": "ok"}
    assert (await api.get("/ready")).json() == {"status": "ready", "reasons": []}


async def test_what_is_missing_for_readiness_is_said(platform: LocalPlatform, api: httpx.AsyncClient) -> None:
    platform.router.notes = ("Serve's REST API does not answer.",)
    response = await api.get("/ready")
    assert response.status_code == 503
    assert response.json()["reasons"] == ["Serve's REST API does not answer."]
    assert (await api.get("/health")).status_code == 200


async def test_a_model_can_be_asked_for_by_an_alias(make_platform: MakePlatform) -> None:
    platform = await make_platform(models=MODELS, aliases={"small": ID})
    async with platform.client() as api:
        response = await api.post("/api/stream-message", json={"message": "hi [[tokens=1]]", "model": "small"})
    assert response.status_code == 200
    assert f'"model":"{ID}"' in response.text
