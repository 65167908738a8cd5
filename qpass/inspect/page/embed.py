"""JSON inside HTML: no text of a model can end the element that holds it, or be read as markup."""

from __future__ import annotations

import json
from typing import Any

from qpass.errors import QpassError

# What could end a script element, start a comment or an entity, or break a line of JavaScript.
ESCAPES = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})


def json_text(value: Any, what: str) -> str:
    """A value as JSON that may stand in a script element; the same value comes back from any JSON parser.

    what: named in the message where the value holds something that is no JSON, such as NaN.
    """
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise QpassError(
            f"{what} of the report holds a value that JSON cannot carry: {error}. Expected text, finite numbers, "
            "true, false, null, and lists and mappings of them; write null where nothing was measured."
        ) from error
    return text.encode("utf-8", "replace").decode("utf-8").translate(ESCAPES)


def script(identity: str, kind: str, text: str) -> str:
    """A script element with a text that cannot end it.

    >>> script("a", "text/plain", "one")
    '<script id="a" type="text/plain">one</script>\\n'
    """
    if "</script" in text.lower() or "<!--" in text:
        raise ValueError(f"{identity} holds text that would end its script element")
    return f'<script id="{identity}" type="{kind}">{text}</script>\n'
