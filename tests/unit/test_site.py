"""The site of the documents is built without a warning; what its pages link to is there."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]


class Links(HTMLParser):
    """What a page links to and shows, and the anchors that it has."""

    def __init__(self, text):
        super().__init__()
        self.to, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found["id"]} if "id" in found else set()
        self.to += [found[name] for name in ("href", "src") if found.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-c", "docs", ".", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return out


def test_every_document_is_a_page(site):
    documents = [
        p.relative_to(ROOT)
        for folder in (".", "docs", "docs/cards", "benchmarks")
        for p in (ROOT / folder).glob("*.md")
    ]
    assert len(documents) > 12
    for document in documents:
        assert (site / document.with_suffix(".html")).is_file(), document
    api = (site / "docs/api.html").read_text()
    for name in ("load", "create", "list_models", "Model.embed_images", "Model.segment", "Detected"):
        assert f'id="visionfm_jax.api.{name}"' in api
    assert 'id="visionfm_jax.export.export"' in api


def test_links_inside_the_site_lead_somewhere(site):
    pages = {page.resolve(): Links(page.read_text()) for page in site.rglob("*.html")}
    seen = 0
    for page, links in pages.items():
        for link in links.to:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("data:"):
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.exists(), f"{page.name}: {link}"
            if parts.fragment and target in pages and not re.fullmatch(r"L\d+", parts.fragment):
                assert unquote(parts.fragment) in pages[target].anchors, f"{page.name}: {link}"
                seen += 1
    assert seen > 100
