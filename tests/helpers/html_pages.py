"""Report pages as a browser reads them: balanced, self-contained, with their text and images."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

_VOID = {"meta", "img", "br", "link", "input", "hr"}


class Html(HTMLParser):
    """Checks that tags are balanced; collects tags, links, headings, images and visible text."""

    def __init__(self, text: str) -> None:
        """Parse ``text``."""
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.headings: list[str] = []
        self.images: dict[str, list[bytes]] = {}
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag and its links."""
        self.tags.add(tag)
        values = {name: value or "" for name, value in attrs}
        self.links += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        if tag == "img":
            data = base64.b64decode(values["src"].split(",", 1)[1])
            self.images.setdefault(values["alt"], []).append(data)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag that closes itself, as in SVG."""
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        """Check the balance."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect text."""
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.words.append(data)


def page(folder: Path) -> Html:
    """The report in ``folder``, which needs nothing from outside."""
    html = Html((folder / "report.html").read_text(encoding="utf-8"))
    assert "script" not in html.tags
    assert all(link.startswith(("data:image/", "#")) for link in html.links)
    for images in html.images.values():
        for data in images:
            Image.open(io.BytesIO(data)).verify()
    return html
