"""What comes from a record or a file is shown as it is, whatever it holds: it never becomes markup, a link or a script.

Values enter the text at one place, the ``finalize`` of the templates' environment, which calls :func:`escaped`. Markup
of our own is :class:`Markdown`. What is made of it, by joining or formatting, is an ordinary text, which is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

SPECIAL = re.compile(r"""[][!"#$&()*+<=>?@\\^_`{|}~-]""")  # ASCII punctuation but . , : ; ' % /
POLICY = "default-src 'none'; img-src data:; style-src {}; script-src {}; base-uri 'none'; form-action 'none'"


class Markdown(str):
    """A text that is pandoc's Markdown, and ours. In a template, the filter ``safe`` makes one."""

    __slots__ = ()


def escaped(value: Any) -> Markdown:
    r"""Return pandoc's Markdown that shows a value as it is, in running text, in a table or as an attribute.

    Args:
        value: of a ``{{ }}`` in a template. Markdown stays as it is, and a number, which may be part of a formula.

    Example:
        >>> print(escaped("a <b> [c](d)"), escaped(0.5), escaped(Markdown("*a*")))
        a \<b\> \[c\]\(d\) 0.5 *a*
    """
    if isinstance(value, (Markdown, int, float)):
        return Markdown(value)
    return Markdown(SPECIAL.sub(r"\\\g<0>", re.sub(r"\s", " ", str(value))))


def code(value: Any) -> Markdown:
    """Return a code span of pandoc's Markdown that shows a value as it is.

    Example:
        >>> print(code("a*b"), code("`"))
        `a*b` `` ` ``
    """
    text = re.sub(r"\s", " ", str(value))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return Markdown(f"{fence}{pad}{text}{pad}{fence}")


def policy(page: str) -> str:
    """Return the content security policy of an HTML page: the styles and scripts that it holds now, and nothing else.

    Example:
        >>> policy("<style>p {}</style>").split("; ")[2]
        "style-src 'sha256-SNJDlN1Iy2mnt7DOjQIyDb2LQE6O5PQiSZomcdzawQ4='"
    """
    return POLICY.format(*(_hashes(page, tag) or "'none'" for tag in ("style", "script")))


def _hashes(page: str, tag: str) -> str:
    texts = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
