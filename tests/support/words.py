"""Words that documentation and code may not use."""

from __future__ import annotations

import re

BANNED = re.compile(
    r"\b([Ww]hoever|[Nn]obody|[Ss]omebody|Who|who (asks|is beyond|connects)|whom)\b"
    r"|\b(of before|of ours|in no circles|hangs? together|as a rule|a look|the look|in the line|for want of)\b"
    r"|\b(reckon\w*|is sent away|(is|are) (told|asked for)|will do|what is no|(is|are) no number)\b"
)
"""Words that hide the subject of a sentence, private words for terms of the field, and passives without an actor."""
