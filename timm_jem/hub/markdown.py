"""Text of any origin in Markdown, where it says what it says and does nothing else.

CommonMark with GitHub's tables and automatic links, and the Hub's formulas. A link that is only written out becomes one even
where its characters are escaped (GitHub's autolinks are found in finished text), but not in a code span.
"""

import re

from timm_jem.hub.provenance import printable

__all__ = ["fenced", "inline"]

_ACTIVE = re.compile(r"([`*\[\]<>&|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")  # within a word, _ is only itself
_LINK_OR_FORMULA = re.compile(r"[\\$@]|://|www\.", re.IGNORECASE)


def inline(text: str) -> str:
    """One line of text within a paragraph, heading or table cell: as it is, or as code where it could be a link or formula."""
    text = printable(text)
    if not _LINK_OR_FORMULA.search(text):
        return _ACTIVE.sub(r"\\\1", text) or "(empty)"
    text = text.replace("|", "¦")  # in a table, it would end the cell even in code
    ticks = "`" * (_longest_run(text) + 1)
    return f"{ticks} {text} {ticks}"  # of the spaces, one at each end is not shown


def fenced(text: str, language: str) -> str:
    """Lines of text as a code block that none of them ends."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
