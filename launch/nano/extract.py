"""Turn documentation files of several formats into typed text blocks.

Every reader returns a list of (kind, text) in reading order, kind being one of
"h" heading, "p" paragraph, "li" list item, "td" loose cell, "dt" term, "code" (text dropped).
"""

from __future__ import annotations

import bz2
import gzip
import html
import pathlib
import re

Block = tuple[str, str]

_TAG = re.compile(
    r"<!--.*?-->|<!\[CDATA\[.*?\]\]>|<[!?][^>]*>"
    r"|<(/?)([A-Za-z][\w:.-]*)([^>\"']*(?:\"[^\"]*\"[^>\"']*|'[^']*'[^>\"']*)*)>",
    re.S,
)
_SKIP = {
    "script", "style", "head", "nav", "header", "footer", "pre", "svg", "math", "form", "select",
    "button", "textarea", "noscript", "programlisting", "screen", "synopsis", "cmdsynopsis",
    "funcsynopsis", "literallayout", "info", "bookinfo", "articleinfo", "sectioninfo",
    "refmeta", "refsynopsisdiv", "indexterm", "remark", "informaltable", "tgroup", "sup",
    "iframe", "object", "audio", "video", "authorgroup", "legalnotice", "revhistory",
    "eqn", "equation", "informalequation", "links", "media", "mediaobject",
}  # fmt: skip
_CODE = {"pre", "programlisting", "screen", "synopsis", "literallayout", "cmdsynopsis", "math"}
_KIND = {
    **dict.fromkeys(["h1", "h2", "h3", "h4", "h5", "h6", "title", "refname"], "h"),
    **dict.fromkeys(["p", "para", "simpara", "dd", "blockquote", "refpurpose"], "p"),
    **dict.fromkeys(["li", "listitem", "item"], "li"),
    **dict.fromkeys(["dt", "term"], "dt"),
    **dict.fromkeys(["td", "th", "tr", "table", "entry", "caption"], "td"),
    **dict.fromkeys(
        ["div", "section", "article", "body", "ul", "ol", "dl", "hr", "center", "main", "chapter",
         "sect1", "sect2", "sect3", "itemizedlist", "orderedlist", "variablelist", "note", "list",
         "steps", "terms", "aside", "figure", "details", "summary"],
        "div",
    ),
}  # fmt: skip
_VOID = {"br", "img", "hr", "input", "meta", "link", "col", "area", "base", "wbr"}
_NOISE = re.compile(
    r"\b(?:class|id|role)\s*=\s*[\"'](?:[^\"']*\s)?(?:nav(?:bar|igation|header|footer|igate)?"
    r"|toc[\w-]*|contents|toctree-wrapper|sphinxsidebar[\w-]*|sidebar[\w-]*|related|footer[\w-]*"
    r"|breadcrumbs?|headerlink|anchor|indextable|genindextable|copyright|legalnotice|highlight[\w-]*"
    r"|programlisting|screen|synopsis|menu|footnotes?|footnote-reference|noprint|search[\w-]*"
    r"|pagination|backlinks?|releaseinfo|revhistory|authorgroup|memproto|fragment|linenos"
    r"|versionbox|manualnavbar|prevnext|editlink|trail|actionbar|popupmenu|dropdown|qt-nav\w*"
    r"|viewcode-link|permalink|srclink|sourceline|wy-nav-side|wy-nav-top|rst-versions"
    r"|toplang|bottomlang|qindex|btools|pageheader|nodeheader)(?:\s[^\"']*)?[\"']",
    re.I,
)
_NOISE_TAGS = {"div", "span", "ul", "ol", "dl", "p", "table", "a", "td", "tr", "small"}


def read_text(path: pathlib.Path) -> str:
    """File content as text; .gz and .bz2 are opened; bytes that are not UTF-8 read as Latin-1."""
    raw = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        raw = gzip.decompress(raw)
    elif path.suffix == ".bz2":
        raw = bz2.decompress(raw)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def markup(text: str) -> list[Block]:
    """Blocks of an HTML, DocBook or Mallard file."""
    blocks: list[Block] = []
    buffer: list[str] = []
    kind, skip, depth, at = "div", "", 0, 0
    for match in _TAG.finditer(text):
        if not skip and match.start() > at:
            buffer.append(text[at : match.start()])
        at = match.end()
        if match.group(2) is None:
            continue
        closing = match.group(1) == "/"
        name = match.group(2).lower().rpartition(":")[2]
        attributes = match.group(3)
        if skip:
            if name == skip and not attributes.endswith("/"):
                depth += -1 if closing else 1
                if depth == 0:
                    skip = ""
            continue
        if name in _VOID:
            buffer.append(" ")
            continue
        noisy = name in _SKIP or (name in _NOISE_TAGS and attributes and _NOISE.search(attributes))
        if noisy and not closing and not attributes.endswith("/"):
            if name in _CODE or (name in ("div", "p") and "highlight" in attributes):
                _flush(blocks, buffer, kind)
                blocks.append(("code", ""))
            skip, depth = name, 1
            continue
        if name in _KIND:
            _flush(blocks, buffer, kind)
            if not closing:
                # a paragraph inside a list item or a cell keeps its own kind
                kind = "li" if kind == "li" and name in ("p", "para", "simpara") else _KIND[name]
            else:
                kind = "div"
    if not skip:
        buffer.append(text[at:])
    _flush(blocks, buffer, kind)
    return blocks


def _flush(blocks: list[Block], buffer: list[str], kind: str) -> None:
    text = " ".join(html.unescape("".join(buffer)).split())
    buffer.clear()
    if text:
        blocks.append(("p" if kind == "div" else kind, text))


_ROFF_FONT = re.compile(r"\\f(?:\(..|\[[^\]]*\]|.)|\\s[-+]?\d|\\[&|^/,%:]|\\m\[[^\]]*\]")
_ROFF_CHAR = {
    "\\-": "-", "\\(aq": "'", "\\(dq": '"', "\\(lq": '"', "\\(rq": '"', "\\(oq": "'", "\\(cq": "'",
    "\\(bu": "-", "\\(em": " - ", "\\(en": "-", "\\(co": "(c)", "\\e": "\\", "\\ ": " ", "\\~": " ",
    "\\0": " ", "\\'": "'", "\\`": "`", "\\(ti": "~", "\\(ha": "^", "\\(rs": "\\", "\\*(Aq": "'",
    "\\*(lq": '"', "\\*(rq": '"', "\\[aq]": "'", "\\[dq]": '"', "\\[rs]": "\\", "\\[lq]": '"',
    "\\[rq]": '"', "\\[em]": " - ", "\\(mu": "x", "\\(ga": "`", "\\(>=": ">=", "\\(<=": "<=",
}  # fmt: skip


def manual_page(text: str) -> list[Block]:
    """Blocks of a manual page in the man macros; mdoc pages give nothing."""
    if re.search(r"^\.Dd\b", text, re.M):
        return []
    blocks: list[Block] = []
    lines: list[str] = []
    raw, term, section = 0, False, ""

    def flush(kind="p"):
        body = " ".join(" ".join(lines).split())
        lines.clear()
        if body and section not in ("NAME", "SYNOPSIS", "AUTHOR", "AUTHORS", "SEE ALSO",
                                    "COPYRIGHT", "COLOPHON", "REPORTING BUGS"):  # fmt: skip
            blocks.append((kind, body))

    for line in text.split("\n"):
        line = line.split('\\"')[0] if line.startswith((".", "'")) else line
        macro = re.match(r"[.']\s*([A-Za-z]+)\s*(.*)", line)
        if macro:
            name, rest = macro.groups()
            if name in ("nf", "EX", "TS", "de", "ig"):
                flush()
                blocks.append(("code", ""))
                raw += 1
            elif name in ("fi", "EE", "TE"):
                raw = 0
            elif raw:
                raw = 0 if name in ("SH", "SS") else raw
            if name in ("SH", "SS"):
                flush()
                section = rest.strip('" ').upper()
                blocks.append(("h", _roff(rest.strip('" ')).capitalize()))
            elif name in ("PP", "P", "LP", "HP", "sp", "RS", "RE", "TP", "IP", "TQ"):
                flush()
                term = name in ("TP", "TQ")
            elif not raw and name in ("B", "I", "BR", "BI", "IB", "IR", "RB", "RI", "SM", "SB"):
                words = re.findall(r'"((?:[^"]|"")*)"|(\S+)', _roff(rest))
                words = [a or b for a, b in words]
                joined = ("" if len(name) == 2 and name not in ("SM", "SB") else " ").join(words)
                if term:
                    term = False
                else:
                    lines.append(joined)
            continue
        if raw or line.startswith((".", "'")):
            continue
        if not line.strip():
            flush()
        elif term:
            term = False
        elif line.startswith((" ", "\t")):
            flush()
            blocks.append(("code", ""))
        else:
            lines.append(_roff(line))
    flush()
    return blocks


def _roff(text: str) -> str:
    text = _ROFF_FONT.sub("", text)
    for name, char in _ROFF_CHAR.items():
        text = text.replace(name, char)
    return text


def pod(text: str) -> list[Block]:
    """Blocks of Perl's plain old documentation."""
    blocks: list[Block] = []
    inside, skip = False, False
    for part in re.split(r"\n\s*\n", text):
        if part.startswith("="):
            command, _, rest = part.partition(" ")
            inside = command != "=cut"
            if command in ("=begin", "=for"):
                skip = command == "=begin"
            elif command == "=end":
                skip = False
            elif command.startswith("=head"):
                blocks.append(("h", _pod_plain(rest)))
        elif not inside or skip:
            continue
        elif part.startswith((" ", "\t")):
            blocks.append(("code", ""))
        else:
            blocks.append(("p", _pod_plain(part)))
    return blocks


def _pod_plain(text: str) -> str:
    text = re.sub(r"[XZ]<[^>]*>", "", text)
    for _ in range(3):
        text = re.sub(r"L<(?:([^|<>]*)\|)?([^<>]*)>", lambda m: m[1] or m[2].lstrip("/"), text)
        text = re.sub(r"[BCFISE]<<+ (.*?) >>+", r"\1", text, flags=re.S)
        text = re.sub(r"E<lt>", "<", re.sub(r"E<gt>", ">", text))
        text = re.sub(r"[BCFIS]<([^<>]*)>", r"\1", text)
    return " ".join(text.split())


def info(text: str) -> list[Block]:
    """Blocks of a GNU Info file: node headers, menus and deeply indented examples go."""
    blocks: list[Block] = []
    for node in text.split("\x1f")[1:]:
        body = node.split("\n", 2)[-1].split("\n* Menu:")[0]
        blocks += _plain_paragraphs(body, code_indent=5, underline="*=-.")
    return blocks


def plain(text: str, suffix: str = ".txt") -> list[Block]:
    """Blocks of plain text, reStructuredText, Markdown or a Vim help file."""
    if suffix == ".vim":
        text = re.sub(r"(?m)^(.*?) ?>\n((?:[ \t].*\n|\n)+)<?", r"\1\n\n     x\n\n", text)
        text = re.sub(r"(?m)^.*\*\S+\*\s*$|[=~-]{20,}|\s~$", "", text)
        text = re.sub(r"\|([^|\s]+)\|", r"\1", text)
        text = re.sub(r"\n\t+", "\n", text)
    elif suffix in (".md", ".mdwn", ".markdown"):
        text = re.sub(r"(?ms)^\s*(```|~~~).*?^\s*\1\s*$", "\n\n     x\n\n", text)
        text = re.sub(r"!\[[^\]]*\]\([^)]*\)|\[\[!.*?\]\]|<[^<>\n]*>", "", text)
        text = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]]*)\]\]", r"\1", text)
        text = re.sub(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])", r"\1", text)
        text = re.sub(r"(?m)^(#+) *(.*?) *#*$", r"\n\2\n====\n", text)
        text = re.sub(r"\*\*|`|(?<=\s)[_*](?=\w)|(?<=\w)[_*](?=[\s.,;:)])", "", text)
    elif suffix in (".rst", ".txt"):
        text = re.sub(r"(?m)^[ \t]*\.\. .*\n(?:[ \t]+.*\n|[ \t]*\n(?=[ \t]))*", "\n", text)
        text = re.sub(r"::\s*\n\s*\n((?:[ \t]+.*\n|[ \t]*\n)+)", ":\n\n     x\n\n", text)
        text = re.sub(r":[\w:+-]+:`~?\.?([^`<]*?)(?: *<[^`>]*>)?`", r"\1", text)
        text = re.sub(r"``?([^`<]*?)(?: <[^`>]*>)?``?_*", r"\1", text)
        text = re.sub(r"\*\*?(\w[^*\n]*)\*\*?", r"\1", text)
    return _plain_paragraphs(text, code_indent=4, underline="=-~^\"'*#+`.")


def dictionary(text: str) -> list[Block]:
    """Blocks of a dictd database: head words at the margin, entries indented below them."""
    blocks: list[Block] = []
    for part in re.split(r"\n\s*\n|\n(?=\S)", text):
        head, _, body = part.partition("\n")
        if head[:1].strip():
            blocks.append(("h", re.sub(r"\s*\\.*", "", head.strip())))
        else:
            body = part
        body = re.sub(r"^\s*<[^>]*>|[{}]", "", body)
        blocks.append(("p", " ".join(body.split())))
    return blocks


def lyx(text: str) -> list[Block]:
    """Blocks of a LyX document; insets (notes, formulas, cross references) are left out."""
    blocks: list[Block] = []
    kind, depth, lines = "p", 0, []
    for line in text.split("\n"):
        if line.startswith("\\begin_inset"):
            depth += 1
        elif line.startswith("\\end_inset"):
            depth -= 1
        elif depth:
            continue
        elif line.startswith("\\begin_layout"):
            name = line.split()[-1]
            kind = "h" if "ection" in name or name in ("Title", "Chapter", "Part") else "p"
            kind = "li" if name in ("Itemize", "Enumerate") else kind
            kind = "code" if "Code" in name else kind
            lines = []
        elif line.startswith("\\end_layout"):
            text = "" if kind == "code" else "".join(lines)
            blocks.append((kind, " ".join(text.split())))
        elif not line.startswith("\\"):
            lines.append(line)
    return blocks


def _plain_paragraphs(text: str, code_indent: int, underline: str) -> list[Block]:
    blocks: list[Block] = []
    for part in re.split(r"\n[ \t]*(?:\n[ \t]*)+", text.expandtabs(8).replace("\r", "")):
        part = part.strip("\n")
        lines = part.split("\n")
        while len(lines) >= 2 and len(set(lines[1].strip())) == 1 and lines[1][:1] in underline:
            blocks.append(("h", " ".join(lines[0].split())))
            lines = lines[2:]
        if lines and lines[0] and len(set(lines[0].strip())) == 1:
            lines = lines[1:]
        if not lines or not "".join(lines).strip():
            continue
        bullet = re.match(r"\s*(?:[-*+o]|\d+[.)])\s+", lines[0])
        if bullet:
            for item in re.split(r"\n\s*(?:[-*+o]|\d+[.)])\s+", "\n" + "\n".join(lines))[1:]:
                blocks.append(("li", " ".join(item.split())))
            continue
        indents = [len(x) - len(x.lstrip()) for x in lines if x.strip()]
        if min(indents) >= code_indent or (len(indents) > 1 and max(indents[1:]) > indents[1] + 2):
            blocks.append(("code", ""))
            continue
        blocks.append(("p", " ".join(" ".join(lines).split())))
    return blocks


def read_blocks(path: pathlib.Path) -> list[Block]:
    """Blocks of one file by its name; a file of no known format gives an empty list."""
    name = re.sub(r"\.(gz|bz2)$", "", path.name)
    suffix = pathlib.PurePath(name).suffix.lower()
    parts = path.parts
    if suffix in (".html", ".htm", ".xhtml", ".docbook", ".page", ".xml") or (
        name == "index.cache" and "HTML" in parts
    ):
        return markup(read_text(path))
    if suffix == ".pod":
        return pod(read_text(path))
    if "man" in parts and re.fullmatch(r"\.[1-8]\w*", suffix):
        return manual_page(read_text(path))
    if "info" in parts and ".info" in name:
        return info(read_text(path))
    if "vim" in str(path) and "doc" in parts and suffix == ".txt":
        return plain(read_text(path), ".vim")
    if suffix == ".lyx":
        return lyx(read_text(path))
    if name.endswith(".dict.dz"):
        return dictionary(read_text(path))
    if suffix in (".txt", ".rst", ".md", ".mdwn", ".markdown"):
        return plain(read_text(path), suffix)
    return []
