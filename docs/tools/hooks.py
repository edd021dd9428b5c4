"""The hooks of mkdocs: run the tutorials and show their output and pictures, and check every link of the built site.

A page whose first lines hold `run: true` between two lines of `---` is run. One with `output_of: PAGE` has the same
code as that page, and shows its output. With VBDL_SITE=quick no code is run and pictures are blank: for prose.
"""

import os
import re
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

os.environ.setdefault("VBDL_COMPILE", "never")  # pages show what code prints, not how fast it is
os.environ.setdefault("MPLBACKEND", "agg")
sys.path.insert(0, str(Path(__file__).parent))

import cheatsheet  # noqa: E402
import names  # noqa: E402
from mkdocs.config.defaults import MkDocsConfig  # noqa: E402
from mkdocs.exceptions import PluginError  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402
from mkdocs.structure.pages import Page  # noqa: E402
from snippets import Session, blocks, with_output  # noqa: E402

ROOT = Path(__file__).parents[2]
PICTURES = (".svg", ".png")
OUTSIDE = {"CONTRIBUTING.md": "extend.md"}  # where a page of the site says what a file outside of it says

_OUTWARD = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+(?:CONTRIBUTING\.md|benchmarks/[^)]*|kernels/[^)]*|tests/[^)]*))\)")
_LOADED = re.compile(r"url\(\s*['\"]?((?:https?:)?//[^)'\"]+)|@import ['\"](https?:[^'\"]+)")
_outputs: dict[str, list[str]] = {}  # what the blocks of each page print, in order


def _option(text: str, name: str) -> str | None:
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    value = re.search(rf"^{name}: *(.+)$", front[1], re.MULTILINE) if front else None
    return value[1] if value else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Run the pages that ask for it, and add their pictures, the changelog, the citation and the cheat sheet."""
    import torch

    torch.set_num_threads(1)
    for file in list(files.documentation_pages()):
        text = file.content_string
        if _option(text, "run") != "true":
            continue
        if os.environ.get("VBDL_SITE") == "quick":
            for name in re.findall(r"""savefig\(["']([\w.-]+)["']""", text):
                uri = (Path(file.src_uri).parent / name).as_posix()
                files.append(File.generated(config, uri, content='<svg xmlns="http://www.w3.org/2000/svg"/>'))
            continue
        print(f"running {file.src_uri}", file=sys.stderr)
        _run(file, text, files, config)
    log = (ROOT / "CHANGELOG.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=log))
    files.append(File.generated(config, "assets/CITATION.cff", content=(ROOT / "CITATION.cff").read_text()))
    for suffix, content in cheatsheet.draw().items():
        files.append(File.generated(config, f"assets/cheatsheet.{suffix}", content=content))
    return files


def _run(file: File, text: str, files: Files, config: MkDocsConfig) -> None:
    import torch

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(file.src_uri, Path(folder))
        try:
            printed = session.run_all(text)
        except Exception as error:
            raise PluginError(f"{file.src_uri} does not run: {type(error).__name__}: {error}") from error
        _outputs[file.src_uri] = [printed.get(block.end, "") for block in blocks(text)]
        for picture in sorted(p for p in Path(folder).iterdir() if p.suffix in PICTURES):
            uri = (Path(file.src_uri).parent / picture.name).as_posix()
            if files.get_file_from_path(uri) is not None:
                raise PluginError(f"{file.src_uri} writes {uri}, which is there already: give the picture another name")
            files.append(File.generated(config, uri, content=picture.read_bytes()))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with the output of its code, and with links that lead out of the site made plain text."""
    source = page.meta.get("output_of", page.file.src_uri)
    if printed := _outputs.get(source):
        here = blocks(markdown)
        if len(here) != len(printed):
            raise PluginError(f"{page.file.src_uri} has {len(here)} blocks of code, {source} has {len(printed)}")
        markdown = with_output(markdown, {block.end: text for block, text in zip(here, printed, strict=True)})

    if "<!-- names -->" in markdown:
        markdown = markdown.replace("<!-- names -->", names.table())

    def inside(match: re.Match[str]) -> str:
        name, target = match.groups()
        path = os.path.normpath(Path(page.file.src_uri).parent / target)
        return f"[{name}]({OUTSIDE[path[3:]]})" if path[3:] in OUTSIDE else name

    return re.sub(
        r"\[([^\]]*)\]\(((?:\.\./)+(?:CONTRIBUTING\.md|benchmarks/[^)]*|kernels/[^)]*|tests/[^)]*))\)", inside, markdown
    )


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """State the language of the Chinese pages, for screen readers and fonts."""
    return output.replace('<html lang="en"', '<html lang="zh"', 1) if page.file.src_uri.startswith("zh/") else output


class _Links(HTMLParser):
    """The ids and links of one page, and what a browser would load to show it."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.ids.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        loads = tag == "link" and values.get("rel") not in ("canonical", "alternate", "next", "prev")
        if loads and "href" in values:
            self.loaded.append(values["href"])
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed", "object"):
            self.loaded += [values[name] for name in ("src", "data") if name in values]


def _unknown(fragment: str, page: _Links | None) -> bool:
    """Whether a page has no such heading; fragments with two underscores are made by the theme's script."""
    return bool(fragment) and not fragment.startswith("__") and page is not None and unquote(fragment) not in page.ids


def on_post_build(config: MkDocsConfig) -> None:
    """Raise an error that lists broken links, and everything that a page would load from another server."""
    site = Path(config.site_dir)
    pages: dict[Path, _Links] = {}
    for path in site.rglob("*.html"):
        pages[path] = parser = _Links()
        parser.feed(path.read_text())
    wrong = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links begin with the address that the site is served from
        name = path.relative_to(site)
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https") or link.startswith("//"):
                if link in page.loaded:
                    wrong.append(f"{name} loads {link} from another server")
                continue
            if parts.scheme in ("data", "mailto", "javascript"):
                continue
            target = path if not parts.path else Path(os.path.normpath(path.parent / unquote(parts.path)))
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                wrong.append(f"{name} links to {link}, which is not there")
            elif _unknown(parts.fragment, pages.get(target)):
                wrong.append(f"{name} links to {link}, which has no such heading")
    for path in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        for link in re.findall(
            r"url\(\s*['\"]?((?:https?:)?//[^)'\"]+)|@import ['\"](https?:[^'\"]+)", path.read_text()
        ):
            wrong.append(f"{path.relative_to(site)} loads {''.join(link)} from another server")
    if wrong:
        raise PluginError("the site has broken links:\n  " + "\n  ".join(sorted(set(wrong))))
