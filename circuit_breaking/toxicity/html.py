"""The HTML of a 4chan post as plain text.

lxml is used directly: it parsed 57,000 posts per second, where BeautifulSoup with the same parser reached 6,500. The
dump has 134 million posts.
"""

import re

from lxml import etree

_PARSER = etree.HTMLParser(remove_comments=True, remove_pis=True)
_REMOVED = {"script", "style", "template"}  # elements without text for readers
_REMOVED_CLASSES = {"quotelink", "deadlink"}  # ">>12345", a link to another post, is not language
_BLOCKS = {"p", "div", "pre", "blockquote", "li", "tr", "table", "hr", "h1", "h2", "h3", "h4", "h5", "h6"}
_CELLS = {"td", "th"}

# Control characters except tab and line ends, surrogates, noncharacters, zero-width space, direction overrides and BOM.
# These include all characters that lxml refuses. The joiners U+200C and U+200D stay: Persian and emoji need them.
_DROPPED = re.compile(
    "[\x00-\x08\v\f\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069"
    "\ud800-\udfff\ufeff\ufffe\uffff]"
)
_SOURCE_SPACE = re.compile("[\t\n\r\x85]")
_BARE_QUOTELINK = re.compile(r"(?<!\S)>>>?(?:/\w+/)?\d{4,}(?!\w)")  # a link as plain text, without an element


def clean_html(source: str) -> str:
    """The text of a post.

    `<br>` and block elements end a line, `<wbr>` joins, links to other posts are removed, and entities are decoded
    once. Greentext (`<span class="quote">`), spoilers (`<s>`), code and ordinary links keep their text. Control
    characters and empty lines are removed, and white space within a line becomes one space. Any string is accepted;
    broken HTML is read as libxml2 recovers it. Returns "" if no text is left.
    """
    source = _DROPPED.sub("", source.replace("\v", " ").replace("\f", " "))
    if "<pre" not in source:  # as in a browser, a line end in the source is a space except in preformatted text
        source = _SOURCE_SPACE.sub(" ", source)
    # the leading <div> is a root for bare text, and keeps an XML declaration at the start from taking effect
    root = etree.HTML("<div>" + source, _PARSER)
    if root is None:
        return ""
    for element in list(root.iter()):
        tag = element.tag
        if tag == "br":
            element.tail = _after("\n", element.tail)
        elif tag in _REMOVED or not _REMOVED_CLASSES.isdisjoint(element.get("class", "").split()):
            element.clear(keep_tail=True)
        elif tag in _BLOCKS:
            element.text = _after("\n", element.text)
            element.tail = _after("\n", element.tail)
        elif tag in _CELLS:
            element.tail = _after(" ", element.tail)
    text = _DROPPED.sub("", "".join(root.itertext()))
    if ">>" in text:
        text = _BARE_QUOTELINK.sub("", text)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _after(mark: str, text: str | None) -> str:
    """`text` after `mark`, without control characters, which character references can produce."""
    return mark + _DROPPED.sub("", text) if text else mark
