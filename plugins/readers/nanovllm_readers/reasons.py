"""What is wrong with a piece of JSON, in sentences for whoever wrote it: Python's parser says what it expected.

Its messages begin alike in every version of Python; one that is not known here is passed on as it is.
"""

from __future__ import annotations

import re

from nanovllm_core.data.decoding import utf16_guess

LONGEST = 15  # characters of a word that is quoted
COMMA = "no comma may stand before it"
DIGITS = frozenset("0123456789")
SENTENCES = {
    "Expecting ':' delimiter": "expecting ':' behind a key",
    "Unterminated string": r"a string begins here and does not end; a line break within a string is written \n",
    "Invalid control character": r"a control character within a string, where it must be written as \n, \t or \u and four digits",
    "Invalid \\escape": r"a backslash within a string that begins no escape; a backslash itself is written \\",
    "Invalid \\uXXXX escape": r"\u within a string without four hexadecimal digits behind it",
    "Illegal trailing comma": "a comma behind the last item of an array or object",
}
PYTHON = {"None": "null", "True": "true", "False": "false"}
_WORD = re.compile(r'[^\s\[\]{}:,"]+|\S')


def of_parser(message: str, text: str, start: int, position: int) -> str:
    """The sentence for a message of Python's parser about a character of the value that begins at `start`."""
    found = _found(text, start, position)
    if message.startswith("Expecting value"):
        return f"expecting a value{found}"
    if message.startswith("Expecting property name"):
        return f"expecting a key in double quotes{found}"
    if message.startswith("Expecting ',' delimiter"):
        return of_number(text, position) or f"expecting ',' or the end of the array or object{found}"
    known = (sentence for begin, sentence in SENTENCES.items() if message.startswith(begin))
    return next(known, message[:1].lower() + message[1:])


def of_number(text: str, position: int) -> str:
    """What is wrong with the number that ends before `position`, because of what follows it; empty if nothing is."""
    last, here = text[position - 1 : position], text[position : position + 1]
    if last == "0" and here in DIGITS:
        return "a number may not begin with 0"
    if last in DIGITS and (here.isalnum() or here in ("_", ".", "'")):
        return f"a number may not go on with {here!r}: it has digits, and perhaps a fraction such as .5 and an exponent such as e3"
    return ""


def of_nul(data: bytes, byte: int) -> str:
    """Of a NUL. `data`: what stands around it, from a byte of the file on; nothing where that cannot be UTF-16."""
    if utf16_guess(data, byte):
        mend = "the file is probably UTF-16 without a byte order mark: save it as UTF-8"
    else:
        mend = "remove it; or, if the file is UTF-16 without a byte order mark, save it as UTF-8"
    return f"a NUL character, which JSON does not allow; {mend}"


def _found(text: str, start: int, position: int) -> str:
    word = _WORD.match(text, position, position + LONGEST)
    if not word:
        return "; the text ends here"
    found = word.group()
    if found in ("]", "}") and text[start:position].rstrip(" \t\r\n").endswith(","):
        return f", found {found!r}; {COMMA}"
    if found in PYTHON:
        return f", found {found}; JSON writes {PYTHON[found]}"
    if found.startswith("'"):
        return ", found a single quote; strings stand in double quotes"
    if found[0] in "+." and found[1:2] in DIGITS:
        return f", found {_short(found)}; a number begins with a digit, or with - and a digit"
    return f", found {_short(found)}"


def _short(text: str) -> str:
    return repr(text if len(text) < LONGEST else text[:-3] + "...")
