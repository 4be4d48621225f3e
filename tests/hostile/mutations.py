"""Files that were right once: a few bytes flipped, cut, put in, moved, or a number that is another one."""

import json
import re

from hypothesis import strategies as st

NUMBER = re.compile(rb"-?\d+")
NUMBERS = ("0", "-1", "1", "3", "1.5", "null", "[]", '"1"', "true", "1e999", "NaN", str(2**31), str(2**63), str(2**64),
           "9" * 30, "9" * 4000)  # fmt: skip
WORDS = (
    b"",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\n",
    b"{",
    b"}",
    b"[" * 3000,
    b'"',
    b",",
    b"..",
    b"/",
    b"\\",
    b"\xed\xa0\x80",
)
INTEGERS = (0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)


@st.composite
def mutated(draw, valid: bytes) -> bytes:
    """Bytes that differ from valid ones in one to four places."""
    content = valid
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        end = at + draw(st.integers(0, 64))
        how = draw(st.integers(0, 8))
        if how == 0:
            content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
        elif how == 1:
            content = content[:at]
        elif how == 2:
            content = content[:at] + content[end:]
        elif how == 3:
            content = content[:at] + draw(st.sampled_from(WORDS) | st.binary(max_size=16)) + content[at:]
        elif how == 4:
            to = draw(st.integers(0, len(content)))
            content = content[:to] + content[at:end] + content[to:]
        elif how == 5:
            content = content[:at] + draw(st.sampled_from(INTEGERS)).to_bytes(8, "little") + content[at + 8 :]
        else:
            places = list(NUMBER.finditer(content[:20_000]))
            if places:
                one = places[draw(st.integers(0, len(places) - 1))]
                content = content[: one.start()] + draw(st.sampled_from(NUMBERS)).encode() + content[one.end() :]
    return content


# What JSON can hold, with text that a JSON of surrogates, of NUL and of several lines has too.
TEXT = st.text(max_size=12) | st.sampled_from(["F8_E4M3", "\0", "\ud800", "a\nb", "../x", "/etc/passwd", "x" * 5000])
LEAVES = st.none() | st.booleans() | st.integers() | st.sampled_from(INTEGERS) | st.floats() | TEXT
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8
)


@st.composite
def changed(draw, valid: object) -> bytes:
    """A valid JSON one to three values of which are others, or are gone."""
    found = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        place = found
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 3)):
                place = place[key]
                continue
            if draw(st.integers(0, 4)):
                place[key] = draw(JSON)
            else:
                del place[key]
            break
    return json.dumps(found).encode()
