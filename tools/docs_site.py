"""What the site has beside docs/: an API page for every folder of the package, and the files that pages link to.

A hook of MkDocs (mkdocs.yml). On the disk, and where a repository is browsed, a page links to a file outside docs/ by
its relative path. A site holds nothing but its own pages, so that such a file becomes one.
"""

import ast
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "dit_jax"
LEFT_OUT = {"assets", "bench"}  # data, and a program
LINK = re.compile(r"(?<=\]\()(?:\.\./)+[^)#\s]+")
LANGUAGES = {".py": "python", ".sh": "bash", ".md": "markdown", ".yaml": "yaml", ".diff": "diff"}


def api_pages() -> dict[str, str]:
    """Markdown by name: a page for every folder of the package, and one for the files at its top."""
    pages: dict[str, list[str]] = {}
    for source in sorted(PACKAGE.rglob("*.py")):
        inside = source.relative_to(PACKAGE)
        if inside.parts[0] in LEFT_OUT or not ast.parse(source.read_text(encoding="utf-8")).body:
            continue
        module = ".".join(["dit_jax", *inside.with_suffix("").parts]).removesuffix(".__init__")
        page = inside.parts[0] if len(inside.parts) > 1 else "dit_jax"
        pages.setdefault(page, []).append(f"::: {module}\n")
    return {name: f"# {title(name)}\n\n" + "\n".join(modules) for name, modules in pages.items()}


def title(page: str) -> str:
    return page if page == "dit_jax" else f"dit_jax.{page}"


def outside(page: str, docs: Path, text: str) -> dict[str, Path]:
    """Of a page, its links to files of the tree that are not below docs/."""
    links = {link: ((docs / page).parent / link).resolve() for link in LINK.findall(text)}
    return {
        link: path
        for link, path in links.items()
        if path.is_file() and path.is_relative_to(REPOSITORY) and not path.is_relative_to(docs)
    }


def shown(path: Path) -> str:
    """A page that holds a file as it is."""
    language = LANGUAGES.get(path.suffix, "text")
    return f"# {path.relative_to(REPOSITORY)}\n\n`````{language}\n{path.read_text(encoding='utf-8')}`````\n"


def place(path: Path) -> str:
    return f"tree/{path.relative_to(REPOSITORY).as_posix()}.md"


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made here."""
    docs = Path(config.docs_dir)
    found = {
        path
        for page in files.documentation_pages()
        for path in outside(page.src_uri, docs, page.content_string).values()
    }
    for path in sorted(found):
        files.append(File.generated(config, place(path), content=shown(path)))
    for name, text in api_pages().items():
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Turns links to files outside docs/ into links to their pages."""
    here = page.file.src_uri
    for link, path in outside(here, Path(config.docs_dir), markdown).items():
        markdown = markdown.replace(f"]({link})", f"]({os.path.relpath(place(path), os.path.dirname(here))})")
    return markdown
