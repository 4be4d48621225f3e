"""The site of docs/ builds without a warning, its links lead somewhere, and it loads nothing from elsewhere.

Links to other sites are not followed: ``pytest tests/test_site.py -k elsewhere -rP`` lists them.
"""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.test_layers import PACKAGE, REPOSITORY

LOADED = {"script": "src", "img": "src", "iframe": "src", "object": "data", "link": "href"}


class Page(HTMLParser):
    """What a page links to, loads, and can be linked to at."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in LOADED and LOADED[tag] in given and given.get("rel") != "canonical":
            self.loads.append(given[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    folder = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={folder}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path: Page(path) for path in folder.rglob("*.html")}


def test_links_within_the_site_lead_to_pages_and_places_that_are_there(site):
    for path, page in site.items():
        if path.name == "404.html":  # a server shows it at any address, so that its links are from the root
            continue
        for link in page.links:
            target = urlsplit(link)
            if target.scheme:
                continue
            file = (path.parent / unquote(target.path)).resolve() if target.path else path
            assert file.is_file(), f"{path.name}: {link}"
            if target.fragment and file in site and target.fragment != "__skip":
                assert unquote(target.fragment) in site[file].anchors, f"{path.name}: {link}"


def test_what_a_page_loads_is_beside_it(site):
    for path, page in site.items():
        for address in page.loads:
            target = urlsplit(address)
            assert not target.scheme and not target.netloc, f"{path.name} loads {address}"
            if path.name != "404.html":
                assert (path.parent / unquote(target.path)).is_file(), f"{path.name}: {address}"


def test_links_elsewhere_are_encrypted(site):
    found = sorted({link for page in site.values() for link in page.links if urlsplit(link).scheme})
    print(*found, sep="\n")
    assert found
    assert all(urlsplit(link).scheme == "https" for link in found)


def test_the_reference_has_every_class_and_function_that_is_exported(site):
    """By the two that others rely on most; a new folder of the package that is not in the nav fails the build."""
    anchors = {anchor for page in site.values() for anchor in page.anchors}
    assert {"dit_jax.models.dit.DiT", "dit_jax.drawing.pipeline.Pipeline", "dit_jax.encoders.frozen.VAE"} <= anchors
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"bench"}
    assert folders <= {path.stem for path in site}


def test_the_search_knows_the_pages(site):
    root = next(path.parent for path in site if path.name == "404.html")
    index = json.loads((root / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert {"index.html", "reliability.html"} <= {entry["location"] for entry in index["docs"]}
