"""The page at ``/graphql``: for browsers only, and complete without any other site."""

from __future__ import annotations

import base64
import hashlib
import re

import httpx
import pytest

from serve_app.api.graphql.ide import ASSETS, FOLDER

BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
# As the npm packages of LICENSES.md deliver them; strawberry-graphql publishes the same digests.
SHA384 = {
    "graphiql.min.js": "HbRVEFG0JGJZeAHCJ9Xm2+tpknBQ7QZmNlO/DgZtkZ0aJSypT96YYGRNod99l9Ie",
    "graphiql.min.css": "Mq3vbRBY71jfjQAt/DcjxUIYY33ksal4cgdRt9U/hNPvHBCaT2JfJ/PTRiPKf0aM",
    "react.production.min.js": "tMH8h3BGESGckSAVGZ82T9n90ztNXxvdwvdM6UoR56cYcf+0iGXBliJ29D+wZ/x8",
    "react-dom.production.min.js": "bm7MnzvK++ykSwVJ2tynSE5TRdN+xL418osEVF2DE/L/gfWHj91J2Sphe582B1Bh",
}


async def test_a_browser_is_shown_a_page_whose_every_part_is_served_here(api: httpx.AsyncClient):
    page = await api.get("/graphql", headers=BROWSER)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "http" not in policy and "unsafe-eval" not in policy
    parts = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    local = [part for part in parts if not part.startswith("data:")]
    assert {part.rpartition("/")[2] for part in local} == ASSETS
    for part in local:
        answer = await api.get(httpx.URL("http://localhost/graphql").join(part))
        kind = "text/css" if part.endswith(".css") else "text/javascript"
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind), part
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("accept", ["*/*", "application/json", ""])
async def test_a_program_is_not_shown_the_page(api: httpx.AsyncClient, accept: str):
    answer = await api.get("/graphql", headers={"accept": accept})
    assert answer.status_code == 400 and answer.json()["errors"]


async def test_a_query_in_the_address_is_answered_to_a_browser_too(api: httpx.AsyncClient):
    answer = await api.get("/graphql", params={"query": "{ __typename }"}, headers=BROWSER)
    assert answer.json()["data"] == {"__typename": "Query"}


@pytest.mark.parametrize("name", ["LICENSES.md", "index.html", "..%2f..%2fschema.graphql", "nothing.js", "%00"])
async def test_nothing_else_is_served(api: httpx.AsyncClient, name: str):
    assert (await api.get(f"/graphql/ide/{name}")).status_code == 404


def test_the_parts_of_others_are_what_their_packages_deliver():
    assert SHA384.keys() == ASSETS - {"page.js", "page.css"}
    for name, digest in SHA384.items():
        assert base64.b64encode(hashlib.sha384((FOLDER / name).read_bytes()).digest()).decode() == digest, name
